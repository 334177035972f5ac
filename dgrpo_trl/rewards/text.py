"""Answers brought to the form in which they are compared, in any script."""

import re
import unicodedata
from collections.abc import Callable

from ..text import UNSPACED


# --- LaTeX

_LATEX_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textup|textnormal|emph|underline|mathrm|mathbf|mathit|mathsf|mathtt"
    r"|operatorname|mbox|hbox|fbox|bm|boldsymbol|displaystyle)\s*\{([^{}]*)\}"
)
_MAX_NESTED = 6
_MAX_LATEX_CHARS = 10_000  # a longer text is no answer
_GROUP_OF_DIGITS = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!;:]|,\\!|\{\\,\}|\\thinspace\s?)(?=[0-9]{3}(?![0-9]))")
_MATH_SPACE = re.compile(r"\\(?:[ ,;:]|quad(?![A-Za-z])|qquad(?![A-Za-z])|thinspace(?![A-Za-z]))|(?<!\\)~")
_SIZE = re.compile(r"\\(?:left|right|displaystyle|textstyle|large|Large|bf|rm|it)(?![A-Za-z])|\\!")
_DOLLARS = re.compile(r"(?<![\\$\w])\$\$?(?![\s$])([^$\n]{1,200}?)(?<![\s\\])\$\$?(?![\w$])")
_DELIMITERS = re.compile(r"\\[()\[\]]")


def strip_latex_text(latex: str) -> str:
    r"""`\textbf{\text{Paris}}` -> `Paris`, `50\%` -> `50%`, `12{,}345` -> `12,345`, `New\ York` -> `New York`."""
    if len(latex) > _MAX_LATEX_CHARS or ("\\" not in latex and "{" not in latex):
        return latex.strip()
    latex = _GROUP_OF_DIGITS.sub(",", latex)
    for _ in range(_MAX_NESTED):
        latex, num_found = _LATEX_TEXT.subn(r"\1", latex)
        if not num_found:
            break
    latex = _SIZE.sub("", _MATH_SPACE.sub(" ", latex))
    latex = re.sub(r"(?<=[0-9])\{,\}(?=[0-9])", ",", latex)
    return re.sub(r"\\([%$&#_])", r"\1", latex).strip()


def strip_math_delimiters(text: str) -> str:
    r"""`$5$` and `\(5\)` -> `5`; a dollar of money stays."""
    return _DELIMITERS.sub(" ", _DOLLARS.sub(r"\1", text)) if "$" in text or "\\" in text else text


# The marks of scripts without spaces, in which a base character with its marks is one token
_MARKS = "".join(
    chr(code)
    for start, end in ((0x0300, 0x036F), (0x0E00, 0x1BFF), (0x302A, 0x30FF), (0xA980, 0xAADF), (0x11700, 0x1174F))
    for code in range(start, end + 1)
    if unicodedata.category(chr(code)).startswith("M")
)
_TOKEN = re.compile(f"[{UNSPACED}][{_MARKS}]*|[^\\s{UNSPACED}]+")

# A minus sign is a dash in front of a digit, and not one between two words or numbers ("covid-19", "1987-1990")
SIGN = f"(?:(?<=[{UNSPACED}])|(?<![\\w)\\]%.-]))[-\u2212\u2012\u2013]"
# At most 12 groups of digits: without a bound, "1,000,000,000,..." of a degenerate completion takes quadratic time
INTEGER = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,12}(?![0-9]|,[0-9])|[0-9]{1,2}(?:,[0-9]{2}){1,12},[0-9]{3}(?![0-9]|,[0-9])|[0-9]+)"
)
_NUMBER = re.compile(rf"({SIGN})?({INTEGER}(?:\.[0-9]+)*|(?<![\w.])\.[0-9]+)")
_INITIALS = re.compile(r"(?<![\w.])(?:[^\W\d_]\.)+[^\W\d_](?!\w)|(?<![\w.])[^\W\d_]\.(?:\s?[^\W\d_]\.(?!\w))+")
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")


class _CharTable(dict[int, str]):
    """A table for `str.translate` that computes the replacement of a character when it first meets it."""

    def __init__(self, replacement: Callable[[str], str]):
        super().__init__()
        self.replacement = replacement

    def __missing__(self, code: int) -> str:
        self[code] = self.replacement(chr(code))
        return self[code]


def _before_nfkc(char: str) -> str:
    """Drop what is invisible, and keep NFKC from gluing digits together: "10²" is not "102", nor is "1½" "11/2"."""
    if unicodedata.category(char) == "Cf" or "\ufe00" <= char <= "\ufe0f" or "\U000e0100" <= char <= "\U000e01ef":
        return ""
    return f" {char}" if unicodedata.decomposition(char).startswith(("<super>", "<sub>", "<fraction>")) else char


def _after_nfkc(char: str) -> str:
    """Letters, digits and marks stay; symbols are tokens ("$5" is not "€5"); punctuation is a space in any script."""
    category = unicodedata.category(char)
    if category[0] in "LNM":
        return char
    return f" {char} " if category in ("Sm", "Sc", "So") or char in "%‰" else " "


_BEFORE_NFKC = _CharTable(_before_nfkc)
_AFTER_NFKC = _CharTable(_after_nfkc)


# Thin, no-break and figure spaces and apostrophes between groups of three digits
_TYPOGRAPHIC_GROUPS = re.compile(
    r"(?<![\d.,])\d{1,3}(?:([\u00a0\u2002-\u200a\u202f'\u2019\u02bc])\d{3}(?:\1\d{3}){0,11})(?!\d)"
)


def _with_commas(match: re.Match[str]) -> str:
    return match[0].replace(match[1], ",")


def to_compatible(text: str) -> str:
    """NFKC, with digits of every script, their separators and those of groups as ASCII."""
    text = _TYPOGRAPHIC_GROUPS.sub(_with_commas, text)
    text = unicodedata.normalize("NFKC", text.translate(_BEFORE_NFKC))
    text = _FOREIGN_DIGIT.sub(lambda match: str(unicodedata.decimal(match[0])), text)
    return text.replace("\u2044", "/").replace("\u066b", ".").replace("\u066c", ",")


def plain_number(digits: str) -> str:
    """`1,000` -> `1000`, `.5` -> `0.5`."""
    digits = digits.replace(",", "")
    return f"0{digits}" if digits.startswith(".") else digits


# --- One letter in several writings: a table of them is in `docs/rewards.md`

_ARABIC_MARKS, _HEBREW_POINTS = (
    "\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0640",
    "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7",
)
_UNWRITTEN = re.compile(f"[{_ARABIC_MARKS}{_HEBREW_POINTS}]")
# alef with wasla, alef maksura, Farsi yeh and keheh; dotless i; cedillas of Romanian
_SAME_LETTERS = str.maketrans("\u0671\u0649\u06cc\u06a9\u0131\u015f\u0163", "\u0627\u064a\u064a\u0643i\u0219\u021b")
_ARTICLE = re.compile(r"(?<![^\W\d_])(?:\u0627\u0644)+(?=[\u0621-\u064a]{3})")


def _bare_letter(char: str) -> str:
    """Greek and Arabic letters without accents and hamza, and the Russian yo as ye: capitals and haste lose them."""
    base = unicodedata.normalize("NFD", char)[0]
    is_bare = "\u0370" <= base <= "\u03ff" or "\u0621" <= base <= "\u064a" or char == "\u0451"
    return base if is_bare else char


_BARE_LETTERS = _CharTable(_bare_letter)


def _same_letters(text: str) -> str:
    """`text`, after case folding, with one writing for each letter."""
    if text.isascii():
        return text
    text = re.sub("(?<=i)\u0307", "", text)  # of the Turkish capital
    text = _UNWRITTEN.sub("", text).translate(_BARE_LETTERS).translate(_SAME_LETTERS)
    return _ARTICLE.sub("", unicodedata.normalize("NFC", text))


def answer_tokens(text: str) -> list[str]:
    """Tokens of the normalized text. Empty when it holds no letter, digit or symbol."""
    if len(text) <= _MAX_LATEX_CHARS:
        text = strip_math_delimiters(strip_latex_text(text))
    text = unicodedata.normalize("NFKC", to_compatible(text).casefold())
    text = _same_letters(text)
    text = re.sub(r"(?<=[a-z])#", "♯", text)  # a symbol, so that it survives: "C#" is not "C"
    text = _INITIALS.sub(lambda match: re.sub(r"[.\s]", "", match[0]) + " ", text)
    pieces, end = [], 0
    for match in _NUMBER.finditer(text):  # decimal points and signs must survive the removal of punctuation
        pieces += [text[end : match.start()].translate(_AFTER_NFKC), " -" if match[1] else "", plain_number(match[2])]
        end = match.end()
    pieces.append(text[end:].translate(_AFTER_NFKC))
    return _without_articles(_TOKEN.findall("".join(pieces)))


def _without_articles(tokens: list[str]) -> list[str]:
    """Drop "the", and a leading "a" or "an" before a word, but never the last token. "Vitamin A" and "A 1" stay."""
    kept = [token for token in tokens if token != "the"]
    while len(kept) > 1 and kept[0] in ("a", "an") and len(kept[1]) > 1 and kept[1][0].isalpha():
        kept = kept[1:]
    return kept or tokens


def normalize_answer(text: str) -> str:
    """Bring an extracted answer to the form in which answers are compared, in any language: tokens, joined by spaces.

    Unicode NFKC and case folding; punctuation of every script becomes a space, except where it carries a value:
    decimal points, minus signs, "%". Thousands separators go ("1,000" is "1000"), initials are joined ("U.S." is
    "us"), digits of every script become ASCII, currency and mathematical symbols stay as tokens. In scripts without
    spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese, ...) every character with its combining marks is a token. The
    English "the", and a leading "a" or "an", are dropped unless nothing would be left. LaTeX of texts and of groups of
    digits is read. Arabic and Hebrew marks, the Arabic article and hamza, Greek accents, and the dots of the Turkish i
    make no difference. It is empty if the text has no letter, digit or symbol.
    """
    return " ".join(answer_tokens(text))
