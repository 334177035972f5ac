"""Scores of one completion against its references, in [0, 1], and intervals of their means.

RULER's tasks are scored by [`string_match_all`], questions with one correct answer by [`exact_match`] or, whatever the
form of the answer, by [`mentioned`].
"""

import math
import random
import re
from collections.abc import Callable, Sequence

from ..rewards import exact_match_reward, normalize_answer


def string_match_all(completion: str, references: Sequence[str]) -> float:
    """Share of the references that the completion contains, ignoring case: RULER's score (arXiv 2404.06654).

    Other text does not count: a completion that repeats the whole prompt contains them all.
    """
    if isinstance(references, str) or not references:
        raise ValueError(
            f"`references` is {references!r}. The score is a share of the references. Pass a list of texts."
        )
    completion = completion.lower()
    return sum(reference.lower() in completion for reference in references) / len(references)


def exact_match(completion: str, references: Sequence[str]) -> float:
    """1.0 if the completion answers with any of the references and nothing else, else 0.0.

    It is the [`~rewards.exact_match_reward`] of training, with what that takes as the answer and as the same answer.
    Raises a `ValueError` if no reference has a letter, digit or symbol to compare.
    """
    score = exact_match_reward([completion], [list(references)])[0]
    if score is None:
        raise ValueError(
            f"`references` are {list(references)!r}. None has a letter, digit or symbol to compare a completion with. "
            "Leave the sample out."
        )
    return score


def mentioned(completion: str, references: Sequence[str]) -> float:
    """1.0 if the completion contains any of the references as a word, else 0.0."""
    text = normalize_answer(completion)
    patterns = (rf"(?<!\w){re.escape(normalize_answer(reference))}(?!\w)" for reference in references)
    return float(any(re.search(pattern, text) for pattern in patterns))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all,
    "exact_match": exact_match,
    "mentioned": mentioned,
}
QUESTION_METRICS = ("exact_match", "mentioned")
Z95 = 1.959964  # standard normal quantile of 97.5 %


def wilson_interval(num_correct: int, num_rows: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. Unlike the normal one, it stays in [0, 1] and has a width at 0 and 1."""
    if not 0 <= num_correct <= num_rows or num_rows == 0:
        raise ValueError(f"Needs 0 <= num_correct <= num_rows and num_rows > 0, got {num_correct} and {num_rows}.")
    share = num_correct / num_rows
    z2 = Z95**2 / num_rows
    center = (share + z2 / 2) / (1 + z2)
    half_width = Z95 / (1 + z2) * math.sqrt(share * (1 - share) / num_rows + z2 / (4 * num_rows))
    # At 0 and 1 the share itself is an end, which rounding may miss
    return max(0.0, min(share, center - half_width)), min(1.0, max(share, center + half_width))


def score_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean: Wilson's if all scores are 0 or 1, else a percentile bootstrap (seed 0)."""
    if all(score in (0, 1) for score in scores):
        return wilson_interval(sum(map(int, scores)), len(scores))
    draw = random.Random(0)
    means = sorted(math.fsum(draw.choices(scores, k=len(scores))) / len(scores) for _ in range(2000))
    return means[50], means[1949]
