"""Accuracy of the answers to questions, in all, by length and by task, with intervals."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from .metrics import mentioned


def wilson_interval(num_correct: int, num_rows: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share; unlike the normal one it stays in [0, 1] and is not empty at 0 and 1.

    Args:
        num_correct (`int`):
            Number of successes.
        num_rows (`int`):
            Number of trials.
        z (`float`, *optional*, defaults to `1.959964`):
            Standard normal quantile; the default gives 95 %.

    Returns:
        `tuple[float, float]`: the lower and the upper end.

    Raises:
        ValueError: unless `0 <= num_correct <= num_rows` and `num_rows > 0`.
    """
    if not 0 <= num_correct <= num_rows or num_rows == 0:
        raise ValueError(f"Needs 0 <= num_correct <= num_rows and num_rows > 0, got {num_correct} and {num_rows}.")
    share = num_correct / num_rows
    z2 = z * z / num_rows
    center = (share + z2 / 2) / (1 + z2)
    half_width = z / (1 + z2) * math.sqrt(share * (1 - share) / num_rows + z2 / (4 * num_rows))
    # At 0 and 1 the share itself is an end, which rounding may miss
    return max(0.0, min(share, center - half_width)), min(1.0, max(share, center + half_width))


def summarize_accuracy(results: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of the answers to questions, in all, by length and by task.

    Args:
        results (`dict[str, Any]`):
            A run's `results.json`. Its cells with the metric `exact_match` count.

    Returns:
        `dict`: `overall`, `by_length` and `by_task` (both from group to the same), each with `num_rows`, and for
        `exact` and `mentioned` the `accuracy` and the 95 % Wilson `interval`.

    Raises:
        ValueError: if there are no questions.
    """
    cells = [cell for cell in results["cells"] if cell["metric"] == "exact_match"]
    if not cells:
        raise ValueError(f"The run {results['name']!r} has no questions. Accuracy is of them. Set `questions`.")

    def grouped(column: str) -> dict[str, dict]:
        groups: dict = {}
        for cell in cells:
            groups.setdefault(cell[column], []).extend(cell["samples"])
        return {str(group): _summarize(groups[group]) for group in sorted(groups)}

    overall = _summarize([sample for cell in cells for sample in cell["samples"]])
    return {"overall": overall, "by_length": grouped("length"), "by_task": grouped("task")}


def _summarize(samples: Sequence[dict]) -> dict:
    def share(is_correct: Callable[[dict], bool]) -> dict:
        num_correct = sum(map(is_correct, samples))
        return {"accuracy": num_correct / len(samples), "interval": wilson_interval(num_correct, len(samples))}

    def mentions(sample: dict) -> bool:
        return mentioned(sample["completion"], sample["references"]) == 1

    exact = share(lambda sample: sample["score"] == 1)
    return {"num_rows": len(samples), "exact": exact, "mentioned": share(mentions)}
