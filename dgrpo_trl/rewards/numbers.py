"""Reward for answers that are one number."""

import itertools
import math
import re
import threading
from typing import Any

from ..text import UNSPACED
from .rules import References, score_rows
from .text import INTEGER, SIGN, TextOrMessages, plain_number, strip_latex_text, to_compatible


__all__ = ["numeric_reward"]

_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "万": 4, "萬": 4, "億": 8, "亿": 8}
# One number in running text. What may be read in two ways is no number: "1,5", "1.2.3", "1980s", "12/5/1987"
_LITERAL = re.compile(
    rf"(?:(?<=[{UNSPACED}])|(?<!\w))(?<![0-9][.,])({SIGN})?({INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:e([+-]?[0-9]{1,3}))?(\s*/\s*[0-9]+)?(?![0-9]|[.,][0-9]|s\b)\s*(%)?"
    rf"\s*((?:thousand|million|billion|trillion)\b|[{''.join(s for s in _SCALES if len(s) == 1)}])?"
)
_MATH_SEGMENT = re.compile(r"\$([^$]{1,200})\$|\\\((.{1,200}?)\\\)|\\\[(.{1,200}?)\\\]", re.DOTALL)
_EXPRESSION_COMMANDS = {"frac", "dfrac", "tfrac", "sqrt", "pi", "times", "cdot", "div", "left", "right"}
_MAX_EXPRESSION_CHARS = 200
_MAX_EXPRESSION_DEPTH = 8  # of brackets: at 90, `math_verify` takes 20 seconds
_MAX_EXPONENT = 1_000  # of the product of all exponents: `9^{9^{9}}` would never end, and fill the memory first


def numeric_reward(completions: list[TextOrMessages], answer: list[References], **kwargs: Any) -> list[float | None]:
    r"""Reward 1 when the extracted answer is one number, equal to the reference for `math_verify`.

    A number is a literal in any script ("1,000", "-3.5", "3e5", "1/4", "25%", "5 million"), alone or in a sentence
    without another one, or a LaTeX expression of numbers, `\frac`, `\sqrt`, `\pi` and small powers. Two different
    numbers are no answer. Equality is that of `math_verify`: exact between integers and fractions, to 6 digits as soon
    as a decimal is involved; "25%" equals "0.25" and "25". Units are not compared. Nothing is evaluated as Python.

    Arguments are as for [`exact_match_reward`], and the reward is 0.0 or 1.0; `None` too where the reference is not
    one number.
    """
    from math_verify import verify  # a second, for SymPy: other rewards do without

    # math_verify times out with SIGALRM, which Python only allows in the main thread. Elsewhere the bounds on
    # expressions above are what keeps it short.
    timeout_seconds = 5 if threading.current_thread() is threading.main_thread() else None

    def score(prediction: str, reference: str) -> float | None:
        gold = _parse_number(reference, timeout_seconds)
        if gold is None:
            return None
        value = _parse_number(prediction, timeout_seconds)
        if value is None:
            return 0.0
        return float(verify(gold, value, float_rounding=_num_decimals(gold), timeout_seconds=timeout_seconds))

    return score_rows(completions, answer, score)


def _num_decimals(gold: Any) -> int:
    """Decimals to compare: 6, and 6 significant digits below 1, or else 0.0000001 would equal 0.0000002."""
    try:
        magnitude = abs(float(gold))
        return max(6, 5 - math.floor(math.log10(magnitude)))
    except (ArithmeticError, TypeError, ValueError):  # zero, not real, or beyond the range of a float
        return 6


def _parse_number(text: str, timeout_seconds: int | None) -> Any | None:
    """The one number that `text` states, as a finite SymPy number, or `None`."""
    latex = _number_latex(to_compatible(text).strip())
    if latex is None:
        return None
    from math_verify import LatexExtractionConfig, parse

    parsed = parse(
        f"${latex}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=timeout_seconds,
    )
    number: Any = parsed[0] if len(parsed) == 1 else None
    if not getattr(number, "is_number", False) or number.is_finite is False:  # `parsed` may also hold str, sets, ...
        return None
    return number


def _number_latex(text: str) -> str | None:
    r"""LaTeX of the one number in `text`, which may stand in a sentence, plainly or in `$...$`."""
    segments = [match for match in _MATH_SEGMENT.finditer(text) if re.search(r"[0-9\\]", match[0])]
    if len(segments) == 1 and not re.search("[0-9]", text.replace(segments[0][0], "")):
        text = next(group for group in segments[0].groups() if group)
    text = strip_latex_text(text.replace("×", r"\times ").replace("·", r"\cdot ").replace("÷", r"\div "))
    if "\\" in text or "^" in text:
        return _expression_latex(text)
    literals = {_literal_latex(match) for match in _LITERAL.finditer(text.lower())}
    # A digit outside every literal is another number, or one that can be read in two ways
    has_more = re.search("[0-9]", _LITERAL.sub(" ", text.lower())) is not None
    return literals.pop() if len(literals) == 1 and not has_more else None


def _literal_latex(match: re.Match) -> str:
    sign, number, exponent, denominator, percent, scale = match.groups()
    latex = plain_number(number)
    if denominator:
        latex = rf"\frac{{{latex}}}{{{denominator.replace('/', '').strip()}}}"
    power = int(exponent or 0) + _SCALES.get(scale, 0)
    return ("-" if sign else "") + latex + (rf" \times 10^{{{power}}}" if power else "") + (r"\%" if percent else "")


def _expression_latex(text: str) -> str | None:
    """`text` if it is a LaTeX expression that `math_verify` surely ends with, else `None`."""
    text = re.sub(r"\^\s*(-?[0-9]+)", r"^{\1}", text.rpartition("=")[2].strip(" .$"))
    exponents = re.findall(r"\^\s*(\{\s*-?[0-9]{1,4}\s*\})?", text)
    rest = re.sub(r"\\[A-Za-z]+", "", text)
    if len(text) > _MAX_EXPRESSION_CHARS or not set(re.findall(r"\\([A-Za-z]+)", text)) <= _EXPRESSION_COMMANDS:
        return None
    depths = itertools.accumulate((char in "({[") - (char in ")}]") for char in text)
    if max(depths, default=0) > _MAX_EXPRESSION_DEPTH:
        return None
    if not re.fullmatch(r"[0-9\s.,+\-*/^(){}\[\]%]*", rest) or "" in exponents or "**" in text:
        return None
    if math.prod(max(1, abs(int(exponent.strip("{} ")))) for exponent in exponents) > _MAX_EXPONENT:
        return None
    return text.replace("%", r"\%")
