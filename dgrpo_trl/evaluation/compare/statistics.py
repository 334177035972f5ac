"""Runs against each other: differences with paired intervals over samples and seeds, and curves of training.

All runs answer the same samples, so that a difference is taken sample by sample, in each cell (task and length). A
score over several cells is the mean over the cells, each the mean of its samples.
"""

import json
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..scores import wilson_interval
from .training import area_under_curve, metric_points, read_log_history, steps_to_reach, trailing_means


try:
    from scipy.special import stdtrit
except ImportError as error:
    raise ImportError("The comparison needs scipy. Install it with `pip install dgrpo-trl[demo]`.") from error


FORMAT = 1
CONFIDENCE = 0.95

# Metric of training -> whether more of it is better, so that steps to a value and areas are counted
TRAINING_METRICS = {"accuracy": True, "reward": True, "eval_reward": True, "distill/divergence": False}


@dataclass(frozen=True)
class Run:
    """An evaluated model, as `results.json` has it.

    Args:
        name (`str`):
            Its name.
        path (`Path`):
            The file it was read from.
        results (`dict`):
            What the file holds.
        cells (`dict[tuple[str, int], dict[str, dict]]`):
            From task and length to its samples by `id`.
    """

    name: str
    path: Path
    results: dict
    cells: dict[tuple[str, int], dict[str, dict]]


def read_run(path: str | Path) -> Run:
    """Read a run.

    Args:
        path (`str` or `Path`):
            A folder with `results.json`, or the file.

    Raises:
        FileNotFoundError: if there is no such file: an evaluation writes it at its end.
        ValueError: if the file has another format, or a sample twice in one cell.
    """
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {file}. An evaluation writes it at its end. Give the folder of a finished one, or let "
            "it end: the same command goes on where it stopped."
        )
    results = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        found = results.get("format") if isinstance(results, dict) else None
        raise ValueError(
            f"{file} has format {found!r}, and {FORMAT} is read. Evaluate again with scripts/evaluate.py."
        )
    cells = {}
    for cell in results["cells"]:
        samples = {sample["id"]: sample for sample in cell["samples"]}
        if len(samples) != len(cell["samples"]):
            raise ValueError(
                f"{file} has an id twice in {cell['task']} at {cell['length']:,} tokens. Samples are paired by id. "
                "Give each its own."
            )
        if samples:
            cells[cell["task"], cell["length"]] = samples
    return Run(results["name"], file, results, cells)


def compare_runs(
    groups: Mapping[str, Sequence[Run]],
    baseline: str | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> dict:
    """Scores of groups of runs and their differences to a baseline, with 95 % intervals.

    A group is one method: one run, or one for each seed of its training. Of single runs an interval says how much
    other samples might change the figure: percentiles of a bootstrap that draws the samples of each cell anew, the
    same ones for all runs. With several seeds it says in addition how much other seeds might: estimate +- t standard
    errors, where the variance is that of the bootstrap plus, for each group, the variance between its seeds divided by
    their number, and t has the degrees of freedom of Welch and Satterthwaite. Seeds of two groups are not paired. In
    simulations with three seeds each these intervals held the true difference in 96 to 99 % of the cases, and
    percentiles of a bootstrap over seeds and samples in 80 to 99 %: of three seeds it sees 2/3 of the variance.

    Args:
        groups (`Mapping[str, Sequence[Run]]`):
            From the name of a group to its runs, in the order to show.
        baseline (`str`, *optional*):
            Name of the group that the others are compared with; the first if not given.
        num_resamples (`int`, *optional*, defaults to `10_000`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap; a cell is drawn alike whatever other cells there are.

    Returns:
        `dict`, as `comparison.json` has it. `scores` and `differences` are lists with `group`, `task` and `length`
        (`None` for the mean over all), `num_cells`, `num_samples`, `score` or `difference`, `interval`, and `per_run`:
        a group's scores seed by seed, on the cells compared. Scores are shares in [0, 1]. In `scores` each group has
        the cells that all its runs have, and `complete` says whether no other group has more of them; in `differences`
        both have the cells that both have.

    Raises:
        ValueError: if `baseline` is unknown, a group has no runs or a run no cells, two groups have no cell in common,
            or the samples of a cell differ.
    """
    baseline = _checked_baseline(groups, baseline)
    runs = [run for members in groups.values() for run in members]
    notes = _check_samples(runs) + _notes_on_settings(runs)
    columns, start = {}, 0
    for name, members in groups.items():
        columns[name] = list(range(start, start + len(members)))
        start += len(members)
    tasks = list(dict.fromkeys(task for run in runs for task, _ in run.cells))  # as the first run has them
    cells = sorted({c for run in runs for c in run.cells}, key=lambda cell: (tasks.index(cell[0]), cell[1]))
    exact, resampled = {}, {}
    for cell in cells:
        exact[cell], resampled[cell] = _cell_means(cell, runs, num_resamples, seed)
    held = {name: [cell for cell in cells if all(cell in run.cells for run in groups[name])] for name in groups}
    num_samples = {cell: len(next(run.cells[cell] for run in runs if cell in run.cells)) for cell in cells}

    def means(name: str, selected: list) -> tuple[np.ndarray, np.ndarray]:
        """Means over cells: exact, `(runs of the group,)`, and resampled, `(num_resamples,)`, over its runs too."""
        per_run = np.mean([exact[cell][columns[name]] for cell in selected], axis=0)
        return per_run, np.mean([resampled[cell][:, columns[name]].mean(1) for cell in selected], axis=0)

    scores, differences = [], []
    for name in groups:
        for task, length, selected in _selections(held[name], with_cells=True):
            per_run, over_samples = means(name, selected)
            count = sum(num_samples[cell] for cell in selected)
            interval = _interval(per_run.mean(), over_samples, [per_run])
            if per_run.mean() in (0.0, 1.0):  # a bootstrap of equal scores has no width
                interval = wilson_interval(count if per_run.mean() else 0, count)
            wanted = {cell for cell in cells if task in (None, cell[0]) and length in (None, cell[1])}
            scores.append(
                {
                    **{"group": name, "task": task, "length": length, "num_cells": len(selected)},
                    **{"num_samples": count, "complete": len(selected) == len(wanted)},
                    "score": _round(per_run.mean()),
                    "interval": [_round(min(1.0, max(0.0, end))) for end in interval],
                    "per_run": [_round(value) for value in per_run],
                }
            )
        if name == baseline or not cells:  # only figures of lm-evaluation-harness
            continue
        common = [cell for cell in held[name] if cell in held[baseline]]
        if not common:
            raise ValueError(
                f"{name!r} and {baseline!r} have no cell in common. A difference is taken in the same task at the "
                "same length. Evaluate both on the same tasks and lengths."
            )
        for task, length, selected in _selections(common, with_cells=False):
            (ours, our_samples), (theirs, their_samples) = means(name, selected), means(baseline, selected)
            difference = ours.mean() - theirs.mean()
            low, high = (_round(end) for end in _interval(difference, our_samples - their_samples, [ours, theirs]))
            differences.append(
                {
                    **{"group": name, "task": task, "length": length, "num_cells": len(selected)},
                    "num_samples": sum(num_samples[cell] for cell in selected),
                    "difference": _round(difference),
                    "interval": [low, high],
                    "excludes_zero": low > 0 or high < 0,
                    "per_run": [_round(value) for value in ours],
                    "baseline_per_run": [_round(value) for value in theirs],
                }
            )
    return {
        **{"format": FORMAT, "baseline": baseline, "num_resamples": num_resamples, "seed": seed},
        "groups": {name: [_description(run) for run in members] for name, members in groups.items()},
        "notes": notes + _notes_on_cells(groups, held, cells) + _notes_on_numbers(groups, num_samples),
        **{"scores": scores, "differences": differences, "harness": _harness(groups)},
    }


def _checked_baseline(groups: Mapping[str, Sequence[Run]], baseline: str | None) -> str:
    for name, members in groups.items():
        for run in members:
            if not run.cells and not run.results.get("harness"):
                raise ValueError(f"{run.path} has no samples. There is nothing to compare. Evaluate it on some tasks.")
        if not members:
            raise ValueError(f"Group {name!r} has no runs. Give it at least one.")
    if not groups:
        raise ValueError("There are no runs. Give at least one.")
    baseline = next(iter(groups)) if baseline is None else baseline
    if baseline not in groups:
        raise ValueError(f"Baseline {baseline!r} is none of {', '.join(map(repr, groups))}. Name one of them.")
    return baseline


def _check_samples(runs: Sequence[Run]) -> list[str]:
    """Notes on prompts that differ in their tokens only; samples that differ raise."""
    first, others = {}, set()
    for run in runs:
        wrong = []
        for cell, samples in run.cells.items():
            other = first.setdefault(cell, run)
            theirs = other.cells[cell]
            references = ({i: list(sample["references"]) for i, sample in s.items()} for s in (samples, theirs))
            if next(references) != next(references):
                wrong.append((cell, other, len(theirs), len(samples)))
            elif any(sample["num_tokens"] != theirs[i]["num_tokens"] for i, sample in samples.items()):
                others.add(f"`{run.name}` and `{other.name}`")
        if wrong:
            (task, length), other, their_count, our_count = wrong[0]
            settings = _differing_settings([other, run])
            why = "; ".join(f"`{key}` is {a} and {b}" for key, (a, b) in settings.items()) or "no setting says why"
            raise ValueError(
                f"{other.path} and {run.path} have different samples in {len(wrong)} of the cells that both have, "
                f"first in {task} at {length:,} tokens ({their_count} and {our_count} samples). Differences are taken "
                f"sample by sample. What differs: {why}. Evaluate both with the same."
            )
    if not others:
        return []
    return [
        f"The same samples have other numbers of tokens in {', '.join(sorted(others))}: another tokenizer, chat "
        "template or prompt. They are paired by id."
    ]


def _differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings, and the seed, that are not the same in all; those that name the model may differ."""
    found = [{"seed": run.results.get("seed"), **run.results.get("settings", {})} for run in runs]
    keys = sorted({key for settings in found for key in settings} - {"name", "output_dir"})
    values = {key: [json.dumps(settings.get(key)) for settings in found] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1 and not key.startswith("model")}


def _notes_on_settings(runs: Sequence[Run]) -> list[str]:
    differing = [
        f"`{key}` ({', '.join(dict.fromkeys(row))})"
        for key, row in _differing_settings(runs).items()
        if key not in ("tasks", "lengths")  # which cells are missing is told
    ]
    return [f"Settings that are not the same in all runs: {'; '.join(differing)}."] if differing else []


def _notes_on_cells(groups: Mapping, held: Mapping[str, list], cells: list) -> list[str]:
    notes = []
    for name in groups:
        missing = [f"{task} at {length:,}" for task, length in cells if (task, length) not in held[name]]
        if missing:
            some = ", ".join(missing[:6]) + (" and others" if len(missing) > 6 else "")
            notes.append(
                f"`{name}` lacks {len(missing)} of {len(cells)} cells ({some}). Its scores marked * are means over "
                "fewer cells than others have; differences are taken on the cells that both have."
            )
    return notes


def _notes_on_numbers(groups: Mapping[str, Sequence[Run]], num_samples: Mapping) -> list[str]:
    notes = []
    single = [f"`{name}`" for name, members in groups.items() if len(members) == 1]
    if single and len(groups) > 1:
        notes.append(
            f"One run each of {', '.join(single)}: what another seed would change is in no interval of theirs."
        )
    if num_samples and min(num_samples.values()) < 20:
        notes.append("Some cells have fewer than 20 samples: their intervals are too narrow.")
    return notes


def _description(run: Run) -> dict:
    keys = ("name", "model", "revision", "seed", "fingerprint", "settings", "versions")
    command = evaluation_command(run.results.get("settings", {}))
    return {"path": str(run.path), "command": command, **{key: run.results[key] for key in keys if key in run.results}}


def evaluation_command(settings: Mapping) -> str:
    """The command line of scripts/evaluate.py that gives these settings of a run, whichever way they were given."""
    words = ["python", "scripts/evaluate.py"]
    for key, value in settings.items():
        if value in (None, {}, [], False) or key.endswith("_sha256") or key == "model_commit":  # not set, or found out
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values)]
    return shlex.join(words)


def _harness(groups: Mapping[str, Sequence[Run]]) -> list[dict]:
    """Figures of lm-evaluation-harness that all runs of a group have, with a t interval over seeds.

    Of one run the interval is the normal one of the standard error, where there is one.
    """
    found = []
    for name, members in groups.items():
        shared = [run.results.get("harness") or {} for run in members]
        for task, metrics in shared[0].items():
            for metric in metrics if isinstance(metrics, dict) else ():
                values = [tasks.get(task, {}).get(metric) for tasks in shared]
                if "stderr" not in metric and all(isinstance(value, int | float) for value in values):
                    figures = _over_seeds([float(value) for value in values])
                    error = metrics.get(metric.replace(",", "_stderr,", 1))
                    if len(members) == 1 and isinstance(error, int | float):
                        ends = (figures["mean"] + sign * 1.959964 * error for sign in (-1, 1))
                        figures["interval"] = [_round(end) for end in ends]
                    found.append({"group": name, "task": task, "metric": metric, **figures})
    return found


def _selections(cells: list[tuple[str, int]], with_cells: bool) -> list[tuple[str | None, int | None, list]]:
    """`(task, length, cells)`: all, each length, each task, and each cell if wanted."""
    lengths, tasks = sorted({length for _, length in cells}), list(dict.fromkeys(task for task, _ in cells))
    selections = [(None, None, cells)] if cells else []
    selections += [(None, length, [cell for cell in cells if cell[1] == length]) for length in lengths]
    selections += [(task, None, [cell for cell in cells if cell[0] == task]) for task in tasks]
    return selections + ([(*cell, [cell]) for cell in cells] if with_cells else [])


def _cell_means(
    cell: tuple[str, int], runs: Sequence[Run], num_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean score of each run in a cell, `(runs,)`, and of resamples `(num_resamples, runs)`; NaN where it lacks it."""
    ids = sorted(next(run.cells[cell] for run in runs if cell in run.cells))
    missing = [float("nan")] * len(ids)
    rows = [[run.cells[cell][i]["score"] for i in ids] if cell in run.cells else missing for run in runs]
    scores = np.array(rows, dtype=np.float64)  # (runs, samples)
    generator = np.random.default_rng([seed, zlib.crc32(f"{cell[0]} {cell[1]}".encode())])
    resampled = []
    for first in range(0, num_resamples, 1000):  # (1000, samples) at a time
        shape = min(1000, num_resamples - first), len(ids)
        drawn = generator.integers(len(ids), size=shape) + len(ids) * np.arange(shape[0])[:, None]
        counts = np.bincount(drawn.ravel(), minlength=shape[0] * shape[1]).reshape(shape)  # how often each sample
        resampled.append(counts @ scores.T / len(ids))
    return scores.mean(axis=1), np.concatenate(resampled)


def _interval(estimate: float, resampled: np.ndarray, seeds: Sequence[np.ndarray]) -> tuple[float, float]:
    """95 % interval of a mean, or of a difference of means.

    Args:
        estimate (`float`):
            The figure.
        resampled (`np.ndarray`):
            The figure in each resample of the samples, seeds as they are: `(num_resamples,)`.
        seeds (`Sequence[np.ndarray]`):
            The mean of each seed, for each group in the figure.
    """
    seeds = [values for values in seeds if len(values) > 1]
    if not seeds:
        low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)
    between = [values.var(ddof=1) / len(values) for values in seeds]
    variance = resampled.var() + sum(between)
    uncertainty = sum(part**2 / (len(values) - 1) for part, values in zip(between, seeds, strict=True))
    freedom = variance**2 / uncertainty if uncertainty > 1e-24 else 1e9
    half_width = stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(variance)
    return float(estimate - half_width), float(estimate + half_width)


def _over_seeds(values: Sequence[float]) -> dict:
    """Mean of one value per seed, its t interval (`None` for one seed) and the values."""
    values = np.array(values, dtype=np.float64)
    interval = [_round(end) for end in _interval(values.mean(), np.zeros(1), [values])] if len(values) > 1 else None
    return {"mean": _round(values.mean()), "interval": interval, "per_run": [_round(value) for value in values]}


def _round(value: float) -> float:
    """Nine decimals: sums of the same scores in another order are the same figure; and no -0."""
    return round(float(value), 9) + 0.0


def read_training(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Curves of one training: `(step, value)` by metric, of [`TRAINING_METRICS`].

    Args:
        folder (`str` or `Path`):
            Output folder of a training: its `trainer_state.json` is read, or that of the newest `checkpoint-*` in it.
            `accuracy` is the mean score of the `results.json` in each `checkpoint-*`, or one folder below, over the
            cells that all of these have.

    Raises:
        FileNotFoundError: if none of this is there.
    """
    folder = Path(folder)
    checkpoints = sorted(
        (path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()),
        key=lambda path: int(path.name.removeprefix("checkpoint-")),
    )
    states = [path for path in (folder, *reversed(checkpoints)) if (path / "trainer_state.json").is_file()]
    log_history = read_log_history(states[0]) if states else []
    curves = {metric: metric_points(log_history, metric) for metric in TRAINING_METRICS if metric != "accuracy"}
    scored = {}
    for checkpoint in checkpoints:
        for file in sorted([*checkpoint.glob("results.json"), *checkpoint.glob("*/results.json")])[:1]:
            results = read_run(file).results
            scored[int(checkpoint.name.removeprefix("checkpoint-"))] = {
                (cell["task"], cell["length"]): cell["score"] for cell in results["cells"]
            }
    common = set.intersection(*(set(cells) for cells in scored.values())) if scored else ()
    if common:
        means = ((step, sum(cells[cell] for cell in common) / len(common)) for step, cells in scored.items())
        curves["accuracy"] = list(means)
    curves = {metric: list(dict(points).items()) for metric, points in curves.items() if points}  # a step's last value
    if not curves:
        raise FileNotFoundError(
            f"{folder} has no curve: no `trainer_state.json` that logs one of {', '.join(TRAINING_METRICS)}, there or "
            "in `checkpoint-*`, and no `results.json` of a checkpoint. Give the `output_dir` of a training."
        )
    return curves


def compare_training(logs: Mapping[str, Sequence[str | Path]], reach: Sequence[float] = ()) -> dict:
    """Curves of training of groups, steps to given values and areas.

    Logged values are means of the last tenth of the entries up to a step, as in the report; accuracies of checkpoints
    are as they are.

    Args:
        logs (`Mapping[str, Sequence[str or Path]]`):
            From the name of a group to the folders of its trainings, one a seed; see [`read_training`].
        reach (`Sequence[float]`, *optional*):
            Values for which the steps are counted, of each metric that should rise; by default the lowest of the
            groups' last values, which nearly all reach.

    Returns:
        `dict`: by metric, `curves` (by group, `[step, mean, lowest seed, highest seed]` at the steps that all its
        seeds have), `steps` (the range that all groups have), and for a metric that should rise `areas` (by group:
        mean height over that range, with a t interval over seeds) and `reached` (a list of `value`, `group`,
        `num_reached` and, where all seeds reach it, `steps`).
    """
    trainings = {name: [read_training(folder) for folder in folders] for name, folders in logs.items()}
    result = {}
    for metric, rises in TRAINING_METRICS.items():
        lines = {
            name: [_smooth(curves[metric], metric) for curves in members]
            for name, members in trainings.items()
            if all(metric in curves for curves in members)
        }
        if not lines:
            continue
        first = max(line[0][0] for members in lines.values() for line in members)
        last = min(line[-1][0] for members in lines.values() for line in members)
        curves = {name: _band(members) for name, members in lines.items()}
        result[metric] = {"steps": [first, last], "curves": curves}
        if not rises:
            continue
        if first < last:
            result[metric]["areas"] = {
                name: _over_seeds([area_under_curve([p for p in line if first <= p[0] <= last]) for line in members])
                for name, members in lines.items()
            }
        values = reach or [min(sum(line[-1][1] for line in members) / len(members) for members in lines.values())]
        result[metric]["reached"] = [
            _reached(name, members, value) for value in values for name, members in lines.items()
        ]
    return result


def _smooth(points: Sequence[tuple[int, float]], metric: str) -> list[tuple[int, float]]:
    window = 1 if metric == "accuracy" else max(1, len(points) // 10)
    return list(zip([step for step, _ in points], trailing_means([y for _, y in points], window), strict=True))


def _band(members: Sequence[Sequence[tuple[int, float]]]) -> list[list[float]]:
    by_step = [dict(line) for line in members]
    steps = sorted(set.intersection(*(set(line) for line in by_step)))
    rows = ((step, [line[step] for line in by_step]) for step in steps)
    return [[step, *(_round(f(values)) for f in (np.mean, np.min, np.max))] for step, values in rows]


def _reached(name: str, members: Sequence[Sequence[tuple[int, float]]], value: float) -> dict:
    steps = [steps_to_reach(line, value) for line in members]
    reached = [step for step in steps if step is not None]
    found = {"value": _round(value), "group": name, "num_reached": len(reached), "num_runs": len(members)}
    over_seeds = _over_seeds(reached) if len(reached) == len(members) else None
    if over_seeds and over_seeds["interval"]:
        over_seeds["interval"][0] = max(0.0, over_seeds["interval"][0])
    return {**found, "steps": over_seeds, "per_run": steps}
