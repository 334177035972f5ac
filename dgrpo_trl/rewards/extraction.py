"""The final answer, cut out of a completion."""

import re
from typing import Any

from .announcements import announced_answer
from .text import answer_tokens, normalize_answer, strip_latex_text


# A message of TRL's conversational format: its `content` is a text, `None` or a list of parts
Message = dict[str, Any]
# A prompt or a completion, in TRL's standard or conversational format
TextOrMessages = str | list[Message]

_THINKING = re.compile(r"<(/?)(?:think|thinking)>")
_BOX = r"\\(?:boxed|fbox|framebox)"
_BOX_OR_BRACE = re.compile(rf"{_BOX}\s*\{{|{_BOX}(?![A-Za-z])|\\.|[{{}}]", re.DOTALL)
# TeX boxes the next token of `\boxed 5`; models mean the whole number or word
_UNBRACED = re.compile(r"\s{0,4}(-?[0-9][0-9.,/]*(?<![.,])|\w{1,40})")
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_HASHES = re.compile(r"^[ \t]*####[ \t]*([^#\n].*)$", re.MULTILINE)


def extract_answer(text: str) -> str:
    r"""Cut the final answer out of the text of a completion, stripped.

    In this order, each in what the one before left: what follows the last `</think>`; the content of
    `<answer>...</answer>`; that of `\boxed{...}` or `\fbox{...}` (the innermost one when boxes are nested), or else
    what a last line after `####` says, or else the paragraph after the last "answer:", or after a sentence's "The
    answer is", in the languages of the builder; else all of it.

    It is empty, which every reward scores 0, when the completion commits to no single answer: `<think>`, `<answer>` or
    `\boxed{` is never closed, or several tags or boxes hold different answers.
    """
    tags = list(_THINKING.finditer(text))
    if tags and not tags[-1][1]:
        return ""
    text = text[tags[-1].end() :] if tags else text
    tagged = _tagged(text)
    if tagged is None:
        return ""
    text = tagged
    boxes = _boxes(text)
    if boxes is None:
        return ""
    if boxes:
        return boxes[-1] if len({normalize_answer(box) or box for box in boxes}) == 1 else ""
    hashes = _HASHES.findall(text)
    if hashes and text.rstrip().endswith(hashes[-1].rstrip()) and not hashes[-1].rstrip().endswith(":"):
        return hashes[-1].strip()
    announced = announced_answer(text)
    return text.strip() if announced is None else announced


def _tagged(text: str) -> str | None:
    """Content of the answer tags; all of the text if there are none, `None` if they hold no single answer."""
    contents: list[str] = []
    start: int | None = None
    for match in _ANSWER_TAG.finditer(text):
        if not match[1]:
            start = match.end()
        elif start is not None:
            contents.append(text[start : match.start()])
            start = None
    if start is not None:
        return None
    if not contents:
        return text
    return contents[-1] if len({normalize_answer(content) or content for content in contents}) == 1 else None


def _boxes(text: str) -> list[str] | None:
    r"""Contents of the `\boxed{}` that hold no other box, or `None` when one is never closed. One linear pass."""
    contents: list[str] = []
    stack: list[list[int]] = []  # per open brace: [start of its content, or -1 if it opens no box; boxes inside it]
    for match in _BOX_OR_BRACE.finditer(text):
        if match[0].endswith("{") and len(match[0]) > 2:
            stack.append([match.end(), 0])
        elif len(match[0]) > 2:
            if unbraced := _UNBRACED.match(text, match.end()):
                contents.append(unbraced[1])
                if stack:
                    stack[-1][1] += 1
        elif match[0] == "{":
            stack.append([-1, 0])
        elif match[0] == "}" and stack:
            start, num_inner = stack.pop()
            if start >= 0 and num_inner == 0:
                contents.append(strip_latex_text(text[start : match.start()]))
            if stack:
                stack[-1][1] += num_inner + (start >= 0)
    return None if any(start >= 0 for start, _ in stack) else contents


# --- Completions and prompts


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


def ends_in_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thinking block, as those of R1 do: the completion then begins in it."""
    tags = list(_THINKING.finditer(prompt))
    return bool(tags) and not tags[-1][1] and not prompt[tags[-1].end() :].strip()


def open_thinking(completion: TextOrMessages) -> TextOrMessages:
    """A completion with the `<think>` that its prompt ended with, so that one that is cut off in it has no answer."""
    if isinstance(completion, str):
        return f"<think>\n{completion}"
    if not isinstance(completion, list) or not completion or not isinstance(completion[0], dict):
        return completion
    first = completion[0]
    is_parsed = "reasoning_content" in first or "thinking" in first or "reasoning" in first
    if is_parsed or not isinstance(first.get("content"), str):
        return completion
    return [{**first, "content": f"<think>\n{first['content']}"}, *completion[1:]]


# --- Options of multiple choice

_OPTION = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(([A-Ja-j])\)|\[([A-Ja-j])\]|([A-Ja-j])[)）:：]|((?-i:[A-J]))(?:\.(?=\s)|\s[-–—](?=\s)))\s*(\S.*?)",
    re.DOTALL | re.IGNORECASE,
)
_OTHER_OPTION = re.compile(r"(?:^|[\s(,;/|])(?:[A-J](?![\w'’])|[a-j]\))|\n\s*\S")
_MAX_OPTION_CHARS = 300


def option_parts(text: str) -> tuple[str, str] | None:
    """Letter and text of an answer such as "(B) Paris"; `None` if it is none, or names another option too."""
    if len(text) > _MAX_OPTION_CHARS:
        return None
    match = _OPTION.fullmatch(re.sub(r"\*\*|__|`", "", text).strip(" *_.\n"))
    if match is None or _OTHER_OPTION.search(match[5]) or not answer_tokens(match[5]):
        return None
    return next(letter for letter in match.groups() if letter), match[5]
