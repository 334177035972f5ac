"""Why a request fails, and whether it is sent again.

| reason | what happened | retried |
| --- | --- | --- |
| `rate_limited` | status 429 | after the time that the server names; with fewer requests in flight |
| `server_error` | status 408, 409 or 5xx | with exponential back-off |
| `timeout` | no complete reply in `timeout_seconds` | with exponential back-off |
| `connection_closed` | the connection broke | with exponential back-off |
| `malformed_reply` | not a chat completion, or a tool call | at most twice |
| `empty_reply` | no choice, or no text | at most twice |
| `truncated` | cut off at `max_tokens`, or within its reasoning | at most twice; not at temperature 0 |
| `refused_content` | refused by the model or a content filter | no |
| `context_overflow` | longer than the server's context | no; not sent where that is known beforehand |
| `bad_request` | any other status of 4xx | no |

No request fails because the server is unreachable (no connection) or rejects all requests (429, 502, 503): the client
waits for the server. A server that stays unavailable for `max_outage_seconds`, or refuses all requests, ends the run.
"""

import re
import time
from email.utils import parsedate_to_datetime

import openai


# Replies that are wrong in themselves: the next may be better, but the tenth is not
CONTENT_REASONS = ("malformed_reply", "empty_reply", "truncated")
MAX_CONTENT_RETRIES = 2
# The answers of a server that is starting, overloaded, or unreachable behind its gateway
UNAVAILABLE_STATUSES = (429, 502, 503)

# How vLLM, SGLang, TGI, llama.cpp, OpenAI and gateways word it
_CONTEXT_ERROR = re.compile(
    r"context.?(length|window|size)|max_model_len|maximum (context|model length)|too many tokens|prompt is too long"
    r"|request too large|max_new_tokens. must be|must be at least 1, got -",
    re.I,
)
_CONTENT_ERROR = re.compile(r"flagged|moderation|content.?(filter|policy|management)", re.I)
_SCHEMA_ERROR = re.compile(r"response_format|json_schema|structured|guided|grammar|schema", re.I)


class RequestFailed(Exception):
    """One request gave nothing; others may. The reason is one of the table above, or the caller's own."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class ServerRefused(RuntimeError):
    """The server refuses all requests. Finished ones are kept."""


class ServerUnavailable(ServerRefused):
    """The server was unavailable for `max_outage_seconds`. Finished requests are kept."""


class Retryable(Exception):
    """One attempt failed; the next may succeed."""

    def __init__(self, reason: str, detail: str, wait_seconds: float = 0.0, is_unavailable: bool = False):
        self.reason, self.detail, self.wait_seconds = reason, detail, wait_seconds
        self.is_unavailable = is_unavailable  # says nothing about the request: others would fail alike


def classify_status(error: openai.APIStatusError, message: str) -> RequestFailed | Retryable | None:
    """What a status, with what the server says, means for one request; `None` if others would get the same."""
    status = error.status_code
    is_limited = status == 429 and "too large" not in message.lower()  # or it is one request that never fits
    if _CONTEXT_ERROR.search(message) and status < 500 and not is_limited:
        return RequestFailed("context_overflow", message)
    if _CONTENT_ERROR.search(message) and status in (400, 403, 422):
        return RequestFailed("refused_content", message)
    if status == 429:
        return Retryable("rate_limited", message, _retry_after(error), is_unavailable=True)
    if status in (408, 409) or status >= 500:
        is_unavailable = status in UNAVAILABLE_STATUSES
        return Retryable("server_error", f"status {status}: {message}", _retry_after(error), is_unavailable)
    return None


def is_schema_error(message: str) -> bool:
    """Whether a server complains about the JSON schema of a request."""
    return _SCHEMA_ERROR.search(message) is not None


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds that the server asks to wait: a number, or a date; 0 if it asks for none."""
    header = error.response.headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", header):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
