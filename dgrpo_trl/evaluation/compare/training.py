"""Curves of training: what `trainer_state.json` logged and what evaluated checkpoints scored, by optimizer step."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..results import mean_score, read_run
from .statistics import over_seeds, round_figure


# Metric of training -> what the page calls it, and whether it should rise: then areas and steps to a value are counted
TRAINING_METRICS = {
    "accuracy": ("Score of checkpoints", True),
    "reward": ("Mean reward", True),
    "eval_reward": ("Mean reward on held-out prompts", True),
    "distill/divergence": ("KL(student || teacher), nats per token", False),
    "loss": ("Loss (of each method its own)", False),
    "distill/grpo_loss": ("GRPO part of the loss", False),
    "distill/loss": ("Teacher part of the loss", False),
}
Points = Sequence[tuple[int, float]]


def steps_to_reach(points: Sequence[tuple[float, float]], value: float) -> float | None:
    """First step at which a curve of `(step, value)` is at `value` or above, on straight lines between its points.

    It is that of the first point if that is high enough; `None` if the curve stays below.
    """
    last_step, last_height = 0.0, float("nan")
    for i, (step, height) in enumerate(points):
        if height >= value:
            return (
                last_step + (step - last_step) * (value - last_height) / (height - last_height) if i else float(step)
            )
        last_step, last_height = step, height
    return None


def area_under_curve(points: Sequence[tuple[float, float]]) -> float:
    """Area under a curve by the trapezoid rule, divided by its steps: the mean height, in the unit of the values."""
    if not points:
        raise ValueError("A curve without points has no area. Leave it out.")
    if len(points) == 1:
        return float(points[0][1])
    pairs = itertools.pairwise(points)
    area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairs)
    return area / (points[-1][0] - points[0][0])


def read_training(folder: str | Path) -> dict[str, Points]:
    """Curves of one training: `(step, value)` by metric, of [`TRAINING_METRICS`].

    The `trainer_state.json` of its output folder is read, or that of the newest `checkpoint-*` in it. `accuracy` is
    the mean score of the `results.json` in each `checkpoint-*`, or one folder below, over the samples of the cells
    that all have.

    Raises:
        FileNotFoundError: If none of this is there.
    """
    folder = Path(folder)
    checkpoints = {
        int(number): path
        for path in folder.glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdigit()
    }
    checkpoints = dict(sorted(checkpoints.items()))
    states = [path / "trainer_state.json" for path in (folder, *reversed(checkpoints.values()))]
    state = next((path for path in states if path.is_file()), None)
    log_history = [] if state is None else json.loads(state.read_text(encoding="utf-8"))["log_history"]
    curves: dict[str, Points] = {
        metric: [(entry["step"], float(entry[metric])) for entry in log_history if metric in entry]
        for metric in TRAINING_METRICS
    }
    curves["accuracy"] = _checkpoint_scores(checkpoints)
    curves = {metric: list(dict(points).items()) for metric, points in curves.items() if points}  # a step's last value
    if not curves:
        raise FileNotFoundError(
            f"{folder} has no curve: no `trainer_state.json` that logs one of {', '.join(TRAINING_METRICS)}, there or "
            "in `checkpoint-*`, and no `results.json` of a checkpoint. Give the `output_dir` of a training."
        )
    return curves


def _checkpoint_scores(checkpoints: Mapping[int, Path]) -> Points:
    scored: dict[int, dict[tuple[str, int], dict]] = {}
    for step, folder in checkpoints.items():
        for file in sorted([*folder.glob("results.json"), *folder.glob("*/results.json")])[:1]:
            scored[step] = {(cell["task"], cell["length"]): cell for cell in read_run(file).results["cells"]}
    common = set.intersection(*(set(cells) for cells in scored.values())) if scored else set()
    return [(step, mean_score(cells[key] for key in common)) for step, cells in scored.items()] if common else []


def compare_training(logs: Mapping[str, Sequence[str | Path]], reach: Sequence[float] = ()) -> dict[str, Any]:
    """Curves of training of groups, steps to given values and areas.

    Logged values are means of the last tenth of the entries up to a step; accuracies of checkpoints are as they are.

    Args:
        logs (`Mapping[str, Sequence[str or Path]]`):
            From the name of a group to the folders of its trainings, one per seed; see [`read_training`].
        reach (`Sequence[float]`, *optional*):
            Values for which the steps are counted, of each metric that should rise; by default the lowest of the
            groups' last values, which nearly all reach.

    Returns:
        `dict`: by metric, `curves` (by group, `[step, mean, lowest seed, highest seed]` at the steps that all its
        seeds have), `steps` (the range that all groups have), and for a metric that should rise `areas` (by group:
        mean height over that range, with a t interval over seeds) and `reached` (a list of `value`, `group`,
        `num_reached` and, if all seeds reach it, `steps`).
    """
    trainings = {name: [read_training(folder) for folder in folders] for name, folders in logs.items()}
    result = {}
    for metric, (_, rises) in TRAINING_METRICS.items():
        lines = {
            name: [_smooth(curves[metric], metric) for curves in members]
            for name, members in trainings.items()
            if all(metric in curves for curves in members)
        }
        if lines:
            result[metric] = _compared(lines, reach, rises)
    return result


def _compared(lines: Mapping[str, Sequence[Points]], reach: Sequence[float], rises: bool) -> dict[str, Any]:
    first = max(line[0][0] for members in lines.values() for line in members)
    last = min(line[-1][0] for members in lines.values() for line in members)
    result: dict[str, Any] = {"steps": [first, last]}
    result["curves"] = {name: _band(members) for name, members in lines.items()}
    if not rises:
        return result
    if first < last:
        result["areas"] = {
            name: over_seeds([area_under_curve([p for p in line if first <= p[0] <= last]) for line in members])
            for name, members in lines.items()
        }
    values = reach or [min(sum(line[-1][1] for line in members) / len(members) for members in lines.values())]
    result["reached"] = [_reached(name, members, value) for value in values for name, members in lines.items()]
    return result


def _smooth(points: Points, metric: str) -> Points:
    """At each step the mean of the last tenth of the values, or of as many as there are; scores as they are."""
    window = 1 if metric == "accuracy" else max(1, len(points) // 10)
    values = [value for _, value in points]
    return [
        (step, sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1)) for i, (step, _) in enumerate(points)
    ]


def _band(members: Sequence[Points]) -> list[list[float]]:
    by_step = [dict(line) for line in members]
    steps = sorted(set.intersection(*(set(line) for line in by_step)))
    rows = ((step, [line[step] for line in by_step]) for step in steps)
    return [[step, *map(round_figure, (sum(y) / len(y), min(y), max(y)))] for step, y in rows]


def _reached(name: str, members: Sequence[Points], value: float) -> dict[str, Any]:
    steps = [steps_to_reach(line, value) for line in members]
    reached = [step for step in steps if step is not None]
    figures = over_seeds(reached) if len(reached) == len(members) else None
    if figures and figures["interval"]:
        figures["interval"][0] = max(0.0, figures["interval"][0])
    found = {"value": round_figure(value), "group": name, "num_reached": len(reached), "num_runs": len(members)}
    return {**found, "steps": figures, "per_run": steps}
