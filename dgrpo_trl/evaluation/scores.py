"""Scores of one completion against its references, in [0, 1], and intervals of their means.

RULER's tasks are scored by [`string_match_all`], questions with one right answer by [`exact_match`], or by
[`mentioned`], which forgives the form.
"""

import math
import random
import re
from collections.abc import Callable, Sequence

from ..rewards import exact_match_reward, normalize_answer


def string_match_all(completion: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the completion, whatever their case: RULER's score (arXiv 2404.06654).

    Everything that is said around them is forgiven: a completion that repeats the whole prompt holds them all.

    Args:
        completion (`str`):
            Text of the completion.
        references (`Sequence[str]`):
            What a right completion holds.

    Raises:
        ValueError: if there is no reference.
    """
    found = _found(completion, references)
    return sum(found) / len(found)


def exact_match(completion: str, references: Sequence[str]) -> float:
    """1.0 if the completion answers with any of the references and nothing else, else 0.0.

    The [`~rewards.exact_match_reward`] of training: what it takes as the answer, and forms that it treats alike.

    Args:
        completion (`str`):
            Text of the completion.
        references (`Sequence[str]`):
            Answers of which any is right.

    Raises:
        ValueError: if no reference has a letter, digit or symbol to compare.
    """
    score = exact_match_reward([completion], [list(references)])[0]
    if score is None:
        raise ValueError(
            f"`references` are {list(references)!r}. None has a letter, digit or symbol to compare a completion with. "
            "Leave the sample out."
        )
    return score


def mentioned(completion: str, references: Sequence[str]) -> float:
    """1.0 if any of the references stands in the completion as a word, whatever else is said, else 0.0.

    Args:
        completion (`str`):
            Text of the completion.
        references (`Sequence[str]`):
            Answers of which any is right.
    """
    said = normalize_answer(completion)
    patterns = (rf"(?<!\w){re.escape(normalize_answer(reference))}(?!\w)" for reference in references)
    return float(any(re.search(pattern, said) for pattern in patterns))


def _found(completion: str, references: Sequence[str]) -> list[bool]:
    if isinstance(references, str) or not references:
        raise ValueError(
            f"`references` is {references!r}. The score is a share of the references. Pass a list of texts."
        )
    completion = completion.lower()
    return [reference.lower() in completion for reference in references]


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all,
    "exact_match": exact_match,
    "mentioned": mentioned,
}
QUESTION_METRICS = ("exact_match", "mentioned")


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


def score_interval(scores: Sequence[float], num_draws: int = 2000) -> tuple[float, float]:
    """95 % interval of a mean: Wilson's where all scores are 0 or 1, a percentile bootstrap (seed 0) else."""
    if all(score in (0, 1) for score in scores):
        return wilson_interval(sum(map(int, scores)), len(scores))
    draw = random.Random(0)
    means = sorted(math.fsum(draw.choices(scores, k=len(scores))) / len(scores) for _ in range(num_draws))
    return means[int(0.025 * num_draws)], means[int(0.975 * num_draws) - 1]
