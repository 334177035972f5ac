"""Answers as text: cut out of a completion, and brought to the form in which they are compared."""

import re
import unicodedata
from collections.abc import Callable
from typing import Any

from ..text import UNSPACED


# A message of TRL's conversational format: its `content` is a text, `None` or a list of parts
Message = dict[str, Any]
# A prompt or a completion, in TRL's standard or conversational format
TextOrMessages = str | list[Message]

_ANSWER_MARKER = re.compile(
    r"(?:(?<!\w)(?:answer(?:\s+is)?|réponse|respuesta|antwort|risposta|resposta|antwoord|svar|odpowiedź|cevap|jawaban"
    r"|đáp án|trả lời|ответ|відповідь|απάντηση|الإجابة|उत्तर)|答案|答え|答|답|คำตอบ)[\s*_]*[:：]\**",
    re.IGNORECASE,
)
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


def extract_answer(text: str) -> str:
    r"""Cut the final answer out of the text of a completion, stripped.

    In this order: what follows the last `</think>`; in it, the content of `\boxed{...}` (the innermost one when boxes
    are nested); else what follows the last "answer:" (also "Antwort:", "答案：", ... in about twenty languages); else
    all of it.

    It is empty, which every reward scores 0, when the completion commits to no single answer: `<think>` or `\boxed{`
    is never closed, or several boxes hold different answers.
    """
    if text.rfind("<think>") > text.rfind("</think>"):
        return ""
    text = text.rpartition("</think>")[2]
    boxes = _boxes(text)
    if boxes is None:
        return ""
    if boxes:
        return boxes[-1] if len({normalize_answer(box) or box for box in boxes}) == 1 else ""
    markers = list(_ANSWER_MARKER.finditer(text))
    return text[markers[-1].end() :].strip() if markers else text.strip()


def _boxes(text: str) -> list[str] | None:
    r"""Contents of the `\boxed{}` that hold no other box, or `None` when one is never closed. One linear pass."""
    contents: list[str] = []
    stack: list[list[int]] = []  # per open brace: [start of its content, or -1 if it opens no box; boxes inside it]
    for match in _BOX_OR_BRACE.finditer(text):
        if match[0].startswith("\\boxed"):
            stack.append([match.end(), 0])
        elif match[0] == "{":
            stack.append([-1, 0])
        elif match[0] == "}" and stack:
            start, num_inner = stack.pop()
            if start >= 0 and num_inner == 0:
                contents.append(strip_latex_text(text[start : match.start()]))
            if stack:
                stack[-1][1] += num_inner + (start >= 0)
    return None if any(start >= 0 for start, _ in stack) else contents


def strip_latex_text(latex: str) -> str:
    r"""`\text{Paris}` -> `Paris`, `50\%` -> `50%`, `New\ York` -> `New York`."""
    latex = _LATEX_TEXT.sub(r"\1", latex)
    return re.sub(r"\\([%$&#_])", r"\1", re.sub(r"\\[ ,;:!]", " ", latex)).strip()


def _message_text(message: Message) -> str:
    """Text of one message; `content` may be `None` (a bare tool call) or a list of parts (multimodal)."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text") or "" for part in content if part.get("type") == "text")


def last_message_text(messages: list[Message], role: str) -> str:
    return next((_message_text(message) for message in reversed(messages) if message.get("role") == role), "")


def completion_text(completion: TextOrMessages) -> str:
    """Text of a completion: itself, or its last assistant message (the empty string if there is none)."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list) and all(isinstance(message, dict) for message in completion):
        return last_message_text(completion, role="assistant")
    raise TypeError(
        f"A completion is a {type(completion).__name__}: {completion!r:.80}. The rewards read text. Pass each "
        "completion as a string, or as a list of messages with `role` and `content`."
    )


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


def to_compatible(text: str) -> str:
    """NFKC, with digits of every script and their separators as ASCII."""
    text = unicodedata.normalize("NFKC", text.translate(_BEFORE_NFKC))
    text = _FOREIGN_DIGIT.sub(lambda match: str(unicodedata.decimal(match[0])), text)
    return text.replace("\u2044", "/").replace("\u066b", ".").replace("\u066c", ",")


def plain_number(digits: str) -> str:
    """`1,000` -> `1000`, `.5` -> `0.5`."""
    digits = digits.replace(",", "")
    return f"0{digits}" if digits.startswith(".") else digits


def answer_tokens(text: str) -> list[str]:
    """Tokens of the normalized text. Empty when it holds no letter, digit or symbol."""
    text = unicodedata.normalize("NFKC", to_compatible(text).casefold())
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
    English "the", and a leading "a" or "an", are dropped unless nothing would be left. It is empty if the text has no
    letter, digit or symbol.
    """
    return " ".join(answer_tokens(text))
