"""Curves of training: what `trainer_state.json` logged and what evaluated checkpoints scored, by optimiser step."""

import json
from collections.abc import Sequence
from pathlib import Path


def read_log_history(run_dir: str | Path) -> list[dict]:
    """The `log_history` of the `trainer_state.json` in a folder, or an empty list if there is none."""
    path = Path(run_dir) / "trainer_state.json"
    return json.loads(path.read_text(encoding="utf-8"))["log_history"] if path.exists() else []


def metric_points(log_history: Sequence[dict], metric: str) -> list[tuple[int, float]]:
    """`(step, value)` of the entries that hold the metric."""
    return [(entry["step"], float(entry[metric])) for entry in log_history if metric in entry]


def trailing_means(values: Sequence[float], window: int) -> list[float]:
    """At each place the mean of the last `window` values, or of as many as there are."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def steps_to_reach(points: Sequence[tuple[float, float]], value: float) -> float | None:
    """First step at which a curve is at `value` or above, on straight lines between its points.

    Args:
        points (`Sequence[tuple[float, float]]`):
            `(step, value)`, by step.
        value (`float`):
            What must be reached.

    Returns:
        `float` or `None`: the step, that of the first point if it is high enough; `None` if the curve never is.
    """
    previous = None
    for step, height in points:
        if height >= value:
            if previous is None:
                return float(step)
            last_step, last_height = previous
            return last_step + (step - last_step) * (value - last_height) / (height - last_height)
        previous = step, height
    return None


def area_under_curve(points: Sequence[tuple[float, float]]) -> float:
    """Area under a curve by the trapezoid rule, divided by its steps: the mean height, in the unit of the values.

    Args:
        points (`Sequence[tuple[float, float]]`):
            `(step, value)`, by step; one point gives its value.

    Raises:
        ValueError: if there are no points.
    """
    if not points:
        raise ValueError("A curve without points has no area. Leave it out.")
    if len(points) == 1:
        return float(points[0][1])
    pairs = list(zip(points, points[1:], strict=False))
    area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairs)
    return area / (points[-1][0] - points[0][0])
