"""Replies of models as data, and foreign text as part of a prompt."""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from ..extras import import_extra
from .failures import RequestFailed, Retryable


_VERDICT = re.compile(r"\W*verdict\b.*", re.I)


@dataclass(frozen=True)
class Completion:
    """A reply."""

    text: str  # the answer, without the reasoning
    thinking: str | None  # the reasoning, where the model showed it
    finish_reason: str  # in the server's words
    model: str  # which one answered, in the server's words


def parse_reply(reply: Any, model: str) -> tuple[Completion, int, int]:
    """A reply, and the tokens of its prompt and of itself. The server sent it unchecked: any part may be missing."""
    try:
        choice = (reply.get("choices") or [None])[0]
        if choice is None:
            raise Retryable("empty_reply", f"no choice: {reply.get('error')}"[:200])
        message, finish_reason = choice["message"], str(choice.get("finish_reason"))
        text, refusal = message.get("content"), message.get("refusal")
        thinking = message.get("reasoning") or message.get("reasoning_content")
        usage = reply.get("usage") or {}
        prompt_tokens, completion_tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise Retryable("malformed_reply", f"{reply!r:.200} is no chat completion") from error
    if finish_reason == "content_filter" or refusal:
        raise RequestFailed("refused_content", str(refusal or finish_reason)[:200])
    if finish_reason == "length":
        raise Retryable("truncated", str(text)[-200:])
    if text is None and message.get("tool_calls"):
        raise Retryable("malformed_reply", "a tool was called")
    if not isinstance(text, str | None) or not isinstance(thinking, str | None):
        raise Retryable("malformed_reply", f"content is {type(text).__name__}")
    text, thinking = _split_thinking(encodable(text or ""), encodable(thinking or ""))
    if not text:
        raise Retryable("empty_reply", "no text")
    completion = Completion(text, thinking, encodable(finish_reason), encodable(str(reply.get("model") or model)))
    return completion, prompt_tokens, completion_tokens


def _split_thinking(text: str, thinking: str) -> tuple[str, str | None]:
    """The answer, and the reasoning before it; the tag that opens it may stand in the template instead."""
    if thinking:  # the server has split it: a tag in the answer is the answer's
        return text.strip(), thinking.strip()
    thinking, closing, answer = text.rpartition("</think>")
    if "<think>" in answer:
        raise Retryable("truncated", "ends within its reasoning")
    if not closing:
        return text.strip(), None
    return answer.strip(), thinking.replace("<think>", "", 1).strip()


def encodable(text: str) -> str:
    """The text without lone surrogates, which can neither be sent nor written."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in a reply; text around it, a fence, and the usual mistakes of models do no harm.

    Raises:
        ValueError: If there is none.
    """
    repair_json = import_extra("json_repair", "Reading replies").repair_json
    start, end = text.find("{"), text.rfind("}")
    if start < 0:
        raise ValueError("there is no JSON object")
    value = repair_json(text[start : end + 1] if end > start else text[start:], return_objects=True)
    if isinstance(value, list):  # of several objects the first is taken
        value = next((item for item in value if isinstance(item, dict)), None)
    if not isinstance(value, dict) or not value:
        raise ValueError("there is no JSON object")
    return value


def parse_verdict(text: str, accept: str, reject: str) -> bool:
    """Whether a reply, its reasoning removed, accepts, by one of two words.

    Raises:
        ValueError: Unless the last line is exactly `VERDICT: <word>`, with one of the words, and no other line is a
            verdict.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    verdicts = {f"VERDICT: {accept}": True, f"VERDICT: {reject}": False}
    num_verdicts = sum(_VERDICT.fullmatch(line) is not None for line in lines)
    if num_verdicts != 1 or lines[-1] not in verdicts:
        raise ValueError(f"{num_verdicts} verdicts, and it ends with {''.join(lines[-1:])!r:.80}")
    return verdicts[lines[-1]]


def quote(text: str, name: str) -> str:
    """Foreign text between marks that it cannot hold, because they depend on it: what it says is no instruction."""
    boundary = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
    return f"<{name}-{boundary}>\n{text}\n</{name}-{boundary}>"
