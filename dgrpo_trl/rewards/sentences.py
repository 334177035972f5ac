"""The one number that a text states: in a sentence, in LaTeX or alone, with what changes its value."""

import math
import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from ..files import read_table
from ..text import HANGUL, UNSPACED
from .expressions import TOKEN, Value, evaluate, is_same, multiply
from .text import INTEGER, plain_number, strip_latex_text, strip_math_delimiters, to_compatible


_TABLE: dict[str, Any] = read_table(__package__, "numbers.yaml")
_UNITS: dict[str, tuple[str, Fraction]] = {
    spelling: (dimension, Fraction(str(factor)))
    for dimension, units in read_table(__package__, "units.yaml").items()
    for factor, spellings in units.items()
    for spelling in spellings
}
_MAX_CHARS = 2_000  # a longer text is no statement of one number


@dataclass(frozen=True)
class Number:
    """A number as a text states it."""

    value: Value
    has_point: bool = False  # written with a decimal point: perhaps rounded
    is_percent: bool = False
    unit: tuple[str, Fraction] | None = None  # dimension, and its factor to the unit of that dimension

    def scaled(self, factor: Fraction) -> Value:
        if isinstance(self.value, Fraction):
            return self.value * factor
        return self.value if factor == 1 else multiply(self.value, factor)

    def unit_factor(self, other: "Number") -> Fraction | None:
        """What turns this number into the unit of another; `None` if they measure different things."""
        if self.unit is None or other.unit is None:
            return Fraction(1)
        return self.unit[1] / other.unit[1] if self.unit[0] == other.unit[0] else None


def read_number(text: str) -> Number | None:
    """The one number that a text states, or `None`."""
    if len(text) > _MAX_CHARS:
        return None
    is_math = re.fullmatch(r"\s*(?:\$.*\$|\\[(\[].*\\[)\]])\s*\.?\s*", text, re.DOTALL) is not None
    text = _as_plain_math(text)
    stated = None if _REFUSED_SYMBOLS.search(text) else _after_equals(text)
    return None if stated is None else _read(stated, is_math)


def _read(text: str, is_math: bool) -> Number | None:
    if _AMBIGUOUS.search(text):
        return None
    statements = _split(text)
    if statements is None:
        return None
    runs, words = statements
    if (is_math or not words) and re.search(r"[0-9)]\s*!", text):
        return None  # a factorial, and not an exclamation
    numbers = [_number_of(run) for run in runs]
    first = numbers[0] if numbers else None
    if first is None or any(first.value != value for value in _rivals(" ".join(words))):
        return None
    if not all(number is not None and _agrees(number, first) for number in numbers):
        return None
    return first


def _rivals(words: str) -> list[int]:
    """Values of the number words in a text."""
    return [value for pattern, value in _RIVALS if pattern.search(words)]


def _agrees(number: Number, first: Number) -> bool:
    if number.unit is not None and first.unit is not None and number.unit != first.unit:
        return False
    percent = {number.is_percent, first.is_percent}
    if len(percent) == 2:
        whole, part = (number, first) if number.is_percent else (first, number)
        return is_same(whole.scaled(Fraction(1, 100)), part.value, True)
    return is_same(number.value, first.value, number.has_point or first.has_point)


# --- The text with one writing for each sign


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPT = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_QUOTED = re.compile(r"(?<!\w)([\"'])([-+0-9.,/%]+)\1(?!\w)")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_POWER_OF_UNIT = re.compile(r"(?<=[^\W\d_])\s*\^\s*(?:\{\s*(-?\s*[0-9])\s*\}|(-?[0-9]))(?![0-9])")
_COMMANDS = {
    r"\times": "*", r"\cdot": "*", r"\ast": "*", r"\div": "/", r"\dfrac": r"\frac ", r"\tfrac": r"\frac ",
    r"\cfrac": r"\frac ", r"\degree": "°", r"\circ": "°", r"\percent": "%", r"\approx": "=", r"\simeq": "=",
    r"\pounds": "£", r"\euro": "€", r"\yen": "¥", r"\le": "≤", r"\leq": "≤", r"\ge": "≥", r"\geq": "≥", r"\lt": "<",
    r"\gt": ">", r"\neq": "≠", r"\ne": "≠", r"\pm": "±", r"\mp": "±", r"\sim": "~", r"\ldots": "…", r"\dots": "…",
    r"\cdots": "…",
}  # fmt: skip
_COMMAND = re.compile(r"\\[A-Za-z]+")
_SIGNS = {
    "×": "*",
    "✕": "*",
    "✖": "*",
    "·": "*",
    "⋅": "*",
    "∙": "*",
    "÷": "/",
    "−": "-",
    "\u2012": "-",
    "\u2013": "-",
    "π": r"\pi ",
    "√": r"\sqrt ",
    "≈": "=",
    "≃": "=",
    "≅": "=",
    "˚": "°",
    "º": "°",
    "∶": ":",
    "％": "%",
    "﹪": "%",
    "٪": "%",
}
_LETTER_X = re.compile(r"(?<=[0-9)}])\s*[xX]\s*(?=10\s*\^|10\s*\*\*)")
_EMPHASIS = re.compile(r"(?<![0-9)}])(?:\*{1,3}|_{1,3}|`)(?=\S)|(?<=[^\s*])(?:\*{1,3}|_{1,3}|`)(?![0-9(\\*])")
_SPACED_GROUPS = re.compile(r"(?<![0-9.,])(?<![0-9] )[0-9]{1,3}(?: [0-9]{3}){1,8}(?! ?[0-9])")
_DOTTED_GROUPS = re.compile(
    r"(?<![0-9.,])[0-9]{1,3}(?:\.[0-9]{3}){2,8}(?![0-9]|\.[0-9])|(?<![0-9.,])[0-9]{1,3}(?:\.[0-9]{3}){1,8}(?=,[0-9]{1,2}(?![0-9,.]))"
)
_GROUPED = re.compile(rf"(?<![0-9.,]){INTEGER}(?![0-9]|,[0-9])")
# A comma can only be decimal after a 0 or after groups of another sign, and before a percent, money or a scale
_DECIMAL_COMMA = re.compile(r"(?<![0-9.,])([0-9]+),([0-9]{1,2})(?![0-9]|[,.][0-9])")


def _as_plain_math(text: str) -> str:
    r"""`text` in ASCII as far as numbers go: `3 × 10⁵` and `3 \times 10^5` -> `3 * 10^{5}`, `12{,}345` -> `12345`."""
    text = re.sub(r"(?<=[^\W\d_])[²³]", lambda match: "^2" if match[0] == "²" else "^3", text)
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = to_compatible(_QUOTED.sub(r"\2", _VULGAR.sub(_vulgar_fraction, text)))
    text = _COMMAND.sub(lambda match: _COMMANDS.get(match[0], match[0]), text)
    text = _SUMMED.sub(_sum_of_scales, strip_math_delimiters(strip_latex_text(text)))
    text = re.sub(r"\^\s*\{?\s*°\s*\}?", "°", text)
    text = text.translate({ord(sign): plain for sign, plain in _SIGNS.items()})
    text = _EMPHASIS.sub("", _LETTER_X.sub("*", text))
    text = re.sub(r"(?<=10)\*\*(?=[-{]?[0-9])", "^", text)
    text = _POWER_OF_UNIT.sub(lambda match: _unit_power(match[1] or match[2]), text)
    text = re.sub(r"\^\s*([-+]?[0-9]+)", r"^{\1}", text)
    return _without_groups(text)


def _vulgar_fraction(match: re.Match[str]) -> str:
    numerator, _, denominator = to_compatible(match[0]).strip().partition("/")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _unit_power(exponent: str) -> str:
    """Letters that belong to the unit's word: its square is another unit."""
    return {"2": "sq", "3": "cu"}.get(exponent.replace(" ", ""), "power")


def _sum_of_scales(match: re.Match[str]) -> str:
    """`1\u51042000\u4e07` -> `120000000`: a sum, as long as the scales fall."""
    total, last = Fraction(0), math.inf
    for number, scales in re.findall(rf"([0-9]+(?:\.[0-9]+)?)((?:{_JOINED})*)", match[0]):
        power, _ = _scale(scales)
        if power >= last:
            return match[0]
        total, last = total + Fraction(number) * 10**power, power
    return str(total) if total.denominator == 1 else match[0]


def _without_groups(text: str) -> str:
    text = _DOTTED_GROUPS.sub(lambda match: match[0].replace(".", ""), text)
    text = _SPACED_GROUPS.sub(lambda match: match[0].replace(" ", ""), text)
    return _DECIMAL_COMMA.sub(_decimal_point, _GROUPED.sub(lambda match: plain_number(match[0]), text))


def _decimal_point(match: re.Match[str]) -> str:
    is_certain = match[1] == "0" or len(match[1]) > 3 or _IS_SCALED.match(match.string, match.end())
    return f"{match[1]}.{match[2]}" if is_certain else match[0]


# --- What changes a number


# With the vowel signs of Arabic and Devanagari, which are no letters for `re`: a word does not end before one
_LETTER = r"(?:[^\W\d_]|[\u0300-\u036f\u064b-\u065f\u0900-\u0903\u093a-\u094f\u0951-\u0957\u0962\u0963])"


def _pattern(words: list[str]) -> str:
    """Words, the longest first; `*` is any ending."""
    return "|".join(
        re.escape(word).replace(r"\*", f"{_LETTER}*").replace(r"\ ", r"\s+")
        for word in sorted({unicodedata.normalize("NFKC", word).casefold() for word in words}, key=len, reverse=True)
    )


_IN_WORD = f"(?<!{_LETTER})"


def _is_joined(word: str) -> bool:
    return re.search(f"[{UNSPACED}{HANGUL}]", word) is not None


_JOINED_SCALES = {word: power for power, words in _TABLE["scales"].items() for word in words if _is_joined(word)}
_SPACED_SCALES = {power: [w for w in words if not _is_joined(w)] for power, words in _TABLE["scales"].items()}
_WORD_SCALES = [
    (re.compile(rf"(?:{_pattern(words)})(?!{_LETTER})", re.I), power)
    for power, words in _SPACED_SCALES.items()
    if words
]
_LETTER_SCALES = {"k": 3, "K": 3, "M": 6, "B": 9, "bn": 9, "Bn": 9, "BN": 9, "mn": 6, "T": 12, "tn": 12, "MM": 6}
_JOINED = "|".join(sorted(_JOINED_SCALES, key=len, reverse=True))
_JOINED_SCALE = re.compile(_JOINED)
_SUMMED = re.compile(rf"[0-9]+(?:\.[0-9]+)?(?:{_JOINED})+(?:\s?[0-9]+(?:{_JOINED})*)+")
_MINUS = re.compile(rf"{_IN_WORD}(?:{_pattern(_TABLE['minus'])})[\s:]*\Z", re.I)
_PERCENT = re.compile(rf"\s*(?:%|(?:{_pattern(_TABLE['percent'])})(?!{_LETTER}))", re.I)
_REFUSED = _pattern([word for words in _TABLE["refused"].values() for word in words])
_REFUSED_WORDS = re.compile(rf"{_IN_WORD}(?:{_REFUSED})(?!{_LETTER})|n['’]t\b", re.I)
_HARMLESS = re.compile(rf"{_IN_WORD}(?:{_pattern(_TABLE['harmless'])})(?!{_LETTER})", re.I)
_RIVALS = [
    (re.compile(rf"{_IN_WORD}(?:{_pattern(words)})(?!{_LETTER})", re.I), value)
    for value, words in _TABLE["rivals"].items()
]
_FOLLOWING = re.compile(rf"\s+(?:{_pattern(_TABLE['following'])})(?!{_LETTER})", re.I)
_INSIDE = re.compile(_pattern(_TABLE["inside"]))
_AFTER = re.compile(rf"\s*(?:{_pattern(_TABLE['after'])})")
_CURRENCY = r"[$€£¥₹₩₽₺₫฿₴₪]"
_SCALES = _pattern([word for words in _TABLE["scales"].values() for word in words])
_IS_SCALED = re.compile(rf"\s*(?:%|{_CURRENCY}|euro|(?:{_SCALES})(?!{_LETTER}))", re.I)

# "1,5", "1.2.3", "1980s", "12:30", "B12", "covid-19", "12/5/1987": no number, or read in two ways
_AMBIGUOUS = re.compile(
    r"[0-9][.,][0-9]+[.,][0-9]|[0-9],[0-9]|[0-9]:[0-9]|[0-9]s(?![^\W\d_])|[0-9]\s*/\s*[0-9]+\s*/\s*[0-9]"
    rf"|(?<![0-9])(?![{UNSPACED}{HANGUL}]){_LETTER}-[0-9]|[0-9]\s*-\s*[0-9]+\s*-\s*[0-9]|[0-9](?:[\"″]|['′](?!{_LETTER}))|[0-9]\s*\.\.+|[0-9]…|…\s*[0-9]"
)
_REFUSED_SYMBOLS = re.compile(
    r"[0-9]\s*[?？؟]|[0-9)]\s*[-+*/(^]\s*[A-Za-z](?![A-Za-z])|(?<![A-Za-z])[A-Za-z]\s*[+*/^]\s*[0-9]|!=|[<>≤≥≠±∓∞‰⩽⩾≦≧→↔]|[0-9)]\s*\+(?!\s*[0-9\\(])|[0-9)]\s*[~〜～]\s*[0-9]|\bnan\b|\binf\b",
    re.I,
)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_LEAD = re.compile(
    rf"(?:(?i:\bno\.|\bnr\.|№|#)\s*|{_CURRENCY}|\b(?:US|AU|CA|NZ|HK|R|S)\$|\b(?:USD|EUR|GBP|JPY|CNY|INR|CHF|Rs\.?|RMB)\s?)\s*\Z"
)


@dataclass(frozen=True)
class _Run:
    """An expression in a text, with what stands directly before and after it."""

    expression: str
    before: str
    after: str

    @property
    def is_money(self) -> bool:
        return re.search(rf"{_CURRENCY}\s*\Z", self.before) is not None


def _after_equals(text: str) -> str | None:
    """What follows the last "=", where an expression or a name stands before it."""
    before, sign, after = text.rpartition("=")
    if not sign or not re.search(r"[0-9]", after):
        return text
    names = [word for word in _WORD.findall(_COMMAND.sub("", before)) if len(word) > 1]
    return after if not re.search("[0-9]", before) or not names else None


def _split(text: str) -> tuple[list[_Run], list[str]] | None:
    """The expressions of a text and the words around them; `None` if one of the words changes a number."""
    spans = _runs(text)
    starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
    pieces = [text[stop:start] for stop, start in zip([0, *stops], [*starts, len(text)], strict=True)]
    runs = [_Run(text[start:stop], *pieces[i : i + 2]) for i, (start, stop) in enumerate(spans)]
    for i, run in enumerate(runs):
        before, end = _LEAD.sub(" ", _MINUS.sub(" ", pieces[i])), _end(run)
        if end is None or re.search(rf"(?![{UNSPACED}{HANGUL}]){_LETTER}\Z", before):
            return None  # "B12", "12th3"
        pieces[i : i + 2] = [before, run.after[end:]]
        if _FOLLOWING.match(pieces[i + 1]) or _AFTER.match(pieces[i + 1]):
            return None
    if any(_changes(piece) for piece in pieces):
        return None
    return runs, [word for piece in pieces for word in _WORD.findall(piece)]


def _changes(text: str) -> bool:
    text = _HARMLESS.sub(" ", text.casefold())
    if "\\" in text or "^" in text or re.search("[0-9]", text) or _INSIDE.search(text) or _REFUSED_WORDS.search(text):
        return True
    return any(re.search(rf"{_IN_WORD}(?:{pattern.pattern})", text) for pattern, _ in _WORD_SCALES)


def _runs(text: str) -> list[tuple[int, int]]:
    """Spans of the expressions in a text: their outer operators and brackets belong to the sentence."""
    spans: list[list[int]] = []
    for match in TOKEN.finditer(text):
        if spans and not text[spans[-1][1] : match.start()].strip():
            spans[-1][1] = match.end()
        else:
            spans.append([match.start(), match.end()])
    trimmed = (_trimmed(text, start, stop) for start, stop in spans)
    return [span for span in trimmed if re.search(r"[0-9]|\\pi", text[slice(*span)])]


def _trimmed(text: str, start: int, stop: int) -> tuple[int, int]:
    while True:
        piece = text[start:stop]
        size = len(piece)
        piece = re.sub(r"\A[\s*/^)\]}]+|[\s*/^(\[{-]+\Z", "", piece)
        lead = text[start:stop].find(piece)
        start, stop = start + lead, start + lead + len(piece)
        for opening, closing in ("()", "[]", "{}"):
            if piece.startswith(opening) and closing not in piece:
                start += 1
            elif piece.endswith(closing) and opening not in piece:
                stop -= 1
        if stop - start == size or start >= stop:
            return start, stop


def _scale(text: str, is_money: bool = False) -> tuple[int, int]:
    """Power of ten of the scales that a text begins with, and the number of their characters."""
    if is_money and (million := re.match(r"\s?[mM](?![^\W\d_])", text)):
        return 6, million.end()
    power = end = 0
    while True:
        rest = text[end:]
        if _unit_after(rest):  # \u5343\u514b is a kilogram
            return power, end
        gap = len(rest) - len(rest.lstrip(" \u00a0-"))
        joined = _JOINED_SCALE.match(rest, gap)
        letters = re.match(r"[A-Za-z]+", rest)
        if joined:
            power, end = power + _JOINED_SCALES[joined[0]], end + joined.end()
        elif not gap and not end and letters and letters[0] in _LETTER_SCALES:
            power, end = power + _LETTER_SCALES[letters[0]], end + letters.end()
        else:
            found = [(match.end(), value) for pattern, value in _WORD_SCALES if (match := pattern.match(rest, gap))]
            if not found or (gap == 0 and end == 0 and max(found)[0] < 2):
                return power, end
            length, value = max(found)
            power, end = power + value, end + length
            if rest[length : length + 1] == "." and length < 5:  # "5 Mio. Euro"
                end += 1


def _end(run: _Run) -> int | None:
    """End of what belongs to the expression before: scale, percent and unit. `None` if that is no number, as "5x"."""
    after = run.after
    _, end = _scale(after, run.is_money)
    if end == 0 and re.match(r"\s+[A-Za-z](?![\w.'])", after) and not _unit_after(after):
        return None
    if percent := _PERCENT.match(after, end):
        return percent.end()
    ordinal = re.match(r"(?:st|nd|rd|th|krát|mal)(?![^\W\d_])", after)
    if ordinal:
        return ordinal.end()
    unit = _unit_after(after[end:])
    if unit is not None:
        return end + unit[1]
    is_attached = end == 0 and re.match(rf"(?![{UNSPACED}{HANGUL}]){_LETTER}", after)
    return None if is_attached else end


def _unit_after(text: str) -> tuple[tuple[str, Fraction], int] | None:
    match = re.match(rf"\s?-?((?:°\s?)?{_LETTER}+(?:/{_LETTER}+)?|°|{_CURRENCY})", text)
    if match is None:
        return None
    word = match[1].replace("° ", "°")
    for spelling in (word, word.lower() if len(word) > 1 else word):  # 5 M is not 5 m
        if spelling in _UNITS:
            return _UNITS[spelling], match.end()
    for ending, exponent in (("sq", 2), ("cu", 3)):
        base = _UNITS.get(word.removesuffix(ending)) if word.endswith(ending) else None
        if base is not None:
            return (f"{base[0]}^{exponent}", base[1] ** exponent), match.end()
    return None


def _number_of(run: _Run) -> Number | None:
    expression = run.expression.strip()
    is_negative = _MINUS.search(run.before) is not None
    if expression.startswith("+"):
        expression = expression[1:]
    if expression.startswith("-"):
        if is_negative or re.match(r"-\s", expression) and (run.before + run.after).strip(" .\n"):
            return None  # two signs; or a dash, which may be none
        if (
            run.before
            and re.search(r"[\w)\]%.]\Z", run.before)
            and not re.search(f"[{UNSPACED}{HANGUL}]\\Z", run.before)
        ):
            return None
    if _is_sum_of_literals(expression):
        return None
    value = evaluate(expression)
    if value is None:
        return None
    power, end = _scale(run.after, run.is_money)
    number = Number(value, has_point="." in expression, is_percent=bool(_PERCENT.match(run.after, end)))
    unit = _unit_after(run.after[end:])
    money = re.search(rf"{_CURRENCY}\s*\Z", run.before)
    number = replace(number, unit=_UNITS.get(money[0].strip()) if money else unit[0] if unit else None)
    factor = Fraction(10) ** power * (-1 if is_negative else 1)
    return number if factor == 1 else replace(number, value=number.scaled(factor))


def _is_sum_of_literals(expression: str) -> bool:
    """`3 + 4` is a question, and `1990-3` two numbers; `2 + \\sqrt{3}` is a number."""
    if re.search(r"[\\^]", expression):
        return False
    return re.search(r"[0-9)]\s*[-+*]", expression) is not None or expression.count("/") > 1
