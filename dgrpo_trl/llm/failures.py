"""Why a request fails, and what follows: the table of `outcomes.yaml`, and how an answer of a server is read by it.

What a server says is recognized by its meaning, since each words it in its own way. Where the words leave open whether
one request is wrong or all are, the client sends a plain request and sees ([`ChatClient`]).
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import openai

from ..files import read_table


@dataclass(frozen=True)
class Outcome:
    """What a server did, and what follows; the words are explained in `outcomes.yaml`."""

    server_did: str
    then: Literal["retry", "skip", "stop"]
    retries: int | Literal["max_retries"]
    resume: Literal["next run", "--retry_failed", "never"]


OUTCOMES = {reason: Outcome(**line) for reason, line in read_table(__package__, "outcomes.yaml").items()}
# Failures of one request, and whether another run may get a reply
REQUEST_REASONS = {
    reason: outcome.resume == "--retry_failed" for reason, outcome in OUTCOMES.items() if outcome.then != "stop"
}
# Replies that are wrong in themselves, and were paid for: the next may be better, but the tenth is not
CONTENT_REASONS = tuple(
    reason for reason, outcome in OUTCOMES.items() if outcome.then == "retry" and outcome.retries != "max_retries"
)
# The answers of a server that is starting, overloaded, or unreachable behind its gateway
UNAVAILABLE_STATUSES = (429, 502, 503)

# A length, and that it is over a limit: vLLM, SGLang, TGI, llama.cpp, Ollama, TensorRT-LLM, OpenAI, Anthropic, Gemini,
# Mistral and Cohere all say both
_LENGTH = re.compile(
    r"context|tokens?\b|n_ctx|max_(model|seq|input|total|new)_?(len|tokens)|sequence|prompt|messages"
    r"|input.{0,20}\b(length|long|large|size)|(request|payload|entity|body).{0,20} too (large|long|big)",
    re.I,
)
_OVER_LIMIT = re.compile(
    r"exceed|too (long|large|many|big)|(long|larg|great|bigg)er than|more than|less than|at most|overflow"
    r"|must be (<|at least 1)|maximum (context|model|sequence|input|prompt|allowed)|reduce the (length|size)"
    r"|(beyond|over|outside).{0,20}\b(limit|window|context)|(does|do|will|can)(n.t| ?not) fit|out of context"
    r"|only .{0,20}tokens|(context|window|length).{0,20}limit|limit.{0,40}context",
    re.I,
)
_OVERFLOW_CODE = re.compile(r"context.?(length|size|window)|too_(long|large)|max_tokens_exceeded", re.I)
_CONTENT = re.compile(r"flagged|moderation|content.?(filter|policy|management)|safety (system|policy)", re.I)
_UNPAID = re.compile(
    r"insufficient[ _](quota|balance|credit|funds?)|credit (balance|limit)|(out of|no|not enough|more) credits?\b"
    r"|billing|payment required|exceeded your current quota|spending limit|arrear|overdue"
    r"|(quota|balance|budget)\b.{0,40}(used up|exhausted|exceeded|too low)",
    re.I,
)
_SOON = re.compile(r"per (minute|second|min)\b|retry.?(in|after|delay)|try again in|rate.?limit|\b[TR]PM\b", re.I)
_SCHEMA = re.compile(r"response_format|json_schema|structured|guided|grammar|schema", re.I)


class RequestFailed(Exception):
    """One request gave nothing; others may. The reason is one of the table, or the caller's own."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class ServerRefused(RuntimeError):
    """The server refuses all requests, or answers none of them usably. Finished ones are kept."""


class ServerUnavailable(ServerRefused):
    """The server was unavailable for `max_outage_seconds`. Finished requests are kept."""


class Retryable(Exception):
    """One attempt failed; the next may succeed."""

    def __init__(self, reason: str, detail: str, wait_seconds: float = 0.0, is_unavailable: bool = False):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.wait_seconds = reason, detail, wait_seconds
        self.is_unavailable = is_unavailable  # says nothing about the request: others would fail alike


class Refusal(Exception):
    """A server's own words about what it does not answer."""

    def __init__(self, status: int, message: str, code: str = "", wait_seconds: float = 0.0):
        super().__init__(f"status {status}: {message}")
        self.status, self.message, self.code, self.wait_seconds = status, message, code, wait_seconds

    @property
    def is_unpaid(self) -> bool:
        """Whether the money or the quota is used up, and not a rate that is free again soon."""
        if self.status == 402 or self.code in ("insufficient_quota", "billing_not_active"):
            return True
        is_soon = self.wait_seconds > 0 or _SOON.search(self.message)
        return 400 <= self.status < 500 and bool(_UNPAID.search(self.message)) and not is_soon

    @property
    def is_overflow(self) -> bool:
        """Whether the request is longer than the server can take."""
        if self.status == 429:  # else a rate of tokens, which is free again soon
            return re.search(r"too (large|long)", self.message, re.I) is not None
        if self.status == 413 or _OVERFLOW_CODE.search(self.code):
            return True
        if self.status in (401, 403, 404, *UNAVAILABLE_STATUSES, 504):
            return False
        sentences = re.split(r"(?<=[.!?])\s+", self.message)
        pairs = (f"{a} {b}" for a, b in zip(sentences, [*sentences[1:], ""], strict=True))
        return any(_LENGTH.search(p) and _OVER_LIMIT.search(p) for p in pairs)

    @property
    def is_about_schema(self) -> bool:
        """Whether the server complains about the JSON schema of the request."""
        return _SCHEMA.search(self.message) is not None

    def as_failure(self) -> RequestFailed | Retryable | None:
        """What it means for one request; `None` where all others might be refused alike."""
        if self.is_overflow:
            return RequestFailed("context_overflow", self.message)
        if _CONTENT.search(f"{self.code} {self.message}") and self.status in (400, 403, 422):
            return RequestFailed("refused_content", self.message)
        if self.status == 429:
            return Retryable("rate_limited", self.message, self.wait_seconds, is_unavailable=True)
        if self.status in (408, 409) or self.status >= 500:
            is_unavailable = self.status in UNAVAILABLE_STATUSES
            return Retryable("server_error", str(self), self.wait_seconds, is_unavailable)
        return None


def refusal_of_status(error: openai.APIStatusError) -> Refusal:
    """A refusal by its status."""
    return Refusal(error.status_code, error.message[:500], str(error.code or ""), _retry_after(error))


def refusal_in_reply(reply: Any) -> Refusal | None:
    """An error in a reply of status 200, or in its choice, as gateways send it; `None` if there is none."""
    if not isinstance(reply, Mapping):
        return None
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    error = reply.get("error") or (choice.get("error") if isinstance(choice, Mapping) else None)
    if not error and reply.get("object") == "error":  # older vLLM
        error = reply
    if not error:
        return None
    fields = error if isinstance(error, Mapping) else {"message": error}
    message, code = str(fields.get("message") or error)[:500], str(fields.get("code") or fields.get("type") or "")
    statuses = [str(fields.get(name)) for name in ("status", "code", "status_code")]
    status = next((int(status) for status in statuses if re.fullmatch(r"[45]\d\d", status)), None)
    return Refusal(_status_of_words(f"{code} {message}") if status is None else status, message, code)


def _status_of_words(words: str) -> int:
    """The status that belongs to an error without one; a server's fault where the words do not tell."""
    if _UNPAID.search(words):
        return 402
    table = {
        r"rate.?limit|too many requests|overloaded": 429,
        r"api.?key|unauthori[sz]ed|authenticat": 401,
        r"invalid.?request|bad.?request|unknown (parameter|model)|unsupported|not.?found": 400,
    }
    known = next((status for pattern, status in table.items() if re.search(pattern, words, re.I)), None)
    if known is None and Refusal(400, words).is_overflow:
        return 400
    return 500 if known is None else known


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds that the server asks to wait: a number, or a date; 0 if it asks for none."""
    header = error.response.headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", header):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
