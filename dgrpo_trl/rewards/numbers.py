"""Reward for answers that are one number."""

from fractions import Fraction
from typing import Any

from .expressions import is_same
from .extraction import TextOrMessages
from .rules import References, score_rows
from .sentences import Number, read_number


__all__ = ["numeric_reward"]


def numeric_reward(completions: list[TextOrMessages], answer: list[References], **kwargs: Any) -> list[float | None]:
    r"""Reward 1 when the extracted answer is one number, equal to the reference.

    A number is a literal in any script ("1,000", "12 345", "-3.5", "3 x 10⁵", "1 1/2", "25%", "5 million", "5k"),
    alone or in a sentence without another one, or a LaTeX expression of numbers, `\frac`, `\sqrt`, `\pi` and powers.
    What changes a number is read (signs, scales, percent) or refused (denials, bounds, ranges, alternatives), in the
    languages of the builder; two different numbers are no answer. Rational numbers are compared exactly; one that is
    written with a decimal point, to 6 digits. "25%" equals "0.25" and "25". Units are compared where both sides have
    one that is known: "5 km" is "5000 m", and not "5 m". The time is bounded, on any thread, and nothing is evaluated
    as Python.

    Arguments are as for [`exact_match_reward`], and the reward is 0.0 or 1.0; `None` too where the reference is not
    one number.
    """

    def score(prediction: str, reference: str) -> float | None:
        gold = read_number(reference)
        if gold is None:
            return None
        number = read_number(prediction)
        return float(number is not None and is_equal(number, gold))

    return score_rows(completions, answer, score, kwargs.get("prompts"))


def _can_score(reference: str) -> bool:
    return read_number(reference) is not None


numeric_reward.can_score = _can_score  # type: ignore[attr-defined]


def is_equal(number: Number, gold: Number) -> bool:
    """Whether two numbers are equal, with their percent signs and units."""
    has_point = number.has_point or gold.has_point
    factor = number.unit_factor(gold)
    if factor is None:
        return False
    value = number.scaled(factor)
    if number.is_percent == gold.is_percent:
        return is_same(value, gold.value, has_point)
    percent, plain = (number, gold) if number.is_percent else (gold, number)
    if is_same(percent.scaled(Fraction(1, 100)), plain.value, has_point):
        return True
    # "25" for "25%" leaves the sign out; 0.25 for 0.25% is another number
    return (percent.value > 1 or percent.value < -1) and is_same(percent.value, plain.value, has_point)
