"""Replies of models as data, and foreign text as part of a prompt."""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from ..extras import import_extra
from .endings import is_normal_end, is_refusal, split_reasoning
from .failures import RequestFailed, Retryable


_VERDICT = re.compile(r"\W*verdict\b.*", re.I)
_TOOL_ENDS = ("tool_calls", "tool_call", "tool_use", "function_call")


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
            raise Retryable("empty_reply", f"no choice: {reply!r}"[:200])
        message, finish_reason = choice["message"], str(choice.get("finish_reason"))
        text, refusal, calls = message.get("content"), message.get("refusal"), message.get("tool_calls")
        thinking = message.get("reasoning") or message.get("reasoning_content") or message.get("thinking")
        usage = reply.get("usage") or {}
        prompt_tokens = sum(
            usage.get(name) or 0
            for name in ("prompt_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        )
        completion_tokens = usage.get("completion_tokens") or 0
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise Retryable("malformed_reply", f"{reply!r:.200} is no chat completion") from error
    if is_refusal(finish_reason) or refusal:
        raise RequestFailed("refused_content", str(refusal or finish_reason)[:200])
    if isinstance(text, list):
        text, thinking = _join_parts(text, thinking)
    if not isinstance(text, str | None) or not isinstance(thinking, str | None):
        raise Retryable("malformed_reply", f"content is {type(text).__name__}")
    if finish_reason in _TOOL_ENDS or (text is None and calls):
        raise Retryable("malformed_reply", "a tool was called")
    if not is_normal_end(finish_reason):
        raise Retryable("truncated", f"finish_reason {finish_reason!r}: {str(text)[-200:]}")
    try:
        answer, shown = split_reasoning(encodable(text or ""), encodable(thinking or ""))
    except Retryable as cut:
        raise Retryable(cut.reason, f"finish_reason {finish_reason!r}: {cut.detail}") from cut
    if not answer:
        if shown:
            detail = f"finish_reason {finish_reason!r}, no `content`, but reasoning that ends with {shown[-200:]!r}"
            raise Retryable("reasoning_only", detail)
        raise Retryable("empty_reply", "no text")
    completion = Completion(answer, shown, encodable(finish_reason), encodable(str(reply.get("model") or model)))
    return completion, prompt_tokens, completion_tokens


def _join_parts(parts: list[Any], thinking: Any) -> tuple[str, Any]:
    """Text and reasoning of `content` that is a list of parts."""
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            raise RequestFailed("refused_content", str(part.get("refusal"))[:200])
        if kind in ("text", "output_text") and isinstance(part.get("text"), str):
            texts["text"].append(part["text"])
        elif kind in ("thinking", "reasoning"):
            inner = part.get("thinking") or part.get("reasoning") or part.get("text") or ""
            texts["thinking"].append(inner if isinstance(inner, str) else _join_parts(inner, None)[0])
        elif kind != "redacted_thinking":
            raise Retryable("malformed_reply", f"content has the part {part!r:.200}")
    return "".join(texts["text"]), thinking or "".join(texts["thinking"]) or None


def is_still_an_answer(completion: Completion) -> bool:
    """Whether a reply that was kept, perhaps by an earlier version, passes for an answer today."""
    if not is_normal_end(completion.finish_reason):
        return False
    try:
        return split_reasoning(completion.text, completion.thinking or "")[0] == completion.text
    except Retryable:
        return False


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
