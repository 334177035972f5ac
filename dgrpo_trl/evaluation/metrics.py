"""Scores of one completion against its references, in [0, 1].

RULER's tasks are scored by [`string_match_all`], questions with one right answer by [`exact_match`], or by
[`mentioned`], which forgives the form.
"""

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


def string_match_part(completion: str, references: Sequence[str]) -> float:
    """1.0 if any reference stands in the completion, whatever its case, else 0.0: RULER's score of its questions.

    As NVIDIA's code has it; lm-evaluation-harness 0.4.13 takes the share of the references under this name.

    Args:
        completion (`str`):
            Text of the completion.
        references (`Sequence[str]`):
            Forms of the answer, of which any is right.

    Raises:
        ValueError: if there is no reference.
    """
    return float(any(_found(completion, references)))


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
    "string_match_part": string_match_part,
    "exact_match": exact_match,
    "mentioned": mentioned,
}
QUESTION_METRICS = ("exact_match", "mentioned")
