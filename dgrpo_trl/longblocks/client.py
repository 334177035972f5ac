"""Requests to an OpenAI-compatible server, such as vLLM: concurrent, retried, and each paid for once.

A reply is in an SQLite file before anybody sees it, under a hash of what was asked. A build that is killed and started
again finds it there. Where a server was reached at decides nothing about a reply and is no part of the hash.

| reason of a failure | what happened | tried again |
| --- | --- | --- |
| `rate_limited` | status 429 | after the time that the server names; with fewer requests in flight |
| `server_error` | status 408, 409 or 5xx | with exponential back-off |
| `timeout` | no whole reply in `timeout_seconds` | with exponential back-off |
| `connection_closed` | the connection broke | with exponential back-off |
| `malformed_reply` | not a chat completion, or a call of a tool | at most twice |
| `empty_reply` | no choice, or no text | at most twice |
| `truncated` | cut off at `max_tokens`, or within its reasoning | at most twice |
| `refused_content` | refused by the model or a content filter | no |
| `context_overflow` | longer than the server's context | no; not sent where it can be known |
| `bad_request` | any other status of 4xx | no |

A server that cannot be reached at all is waited for; one that refuses everybody ends the run.
"""

import asyncio
import hashlib
import json
import logging
import os
import random
import re
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import anyio
import openai
from aiolimiter import AsyncLimiter
from pydantic import Field

from .records import StrictModel
from .tokens import load_token_counter


logger = logging.getLogger(__name__)

Message = dict[str, str]

# A chat template adds fewer tokens than these
_TOKENS_PER_MESSAGE = 16
# Replies that are wrong in themselves: the next may be better, but the tenth is not
_MAX_CONTENT_RETRIES = 2
_CONTENT_REASONS = ("malformed_reply", "empty_reply", "truncated")
# With so many requests refused, and none accepted, it is not a request that is wrong
_MAX_REFUSED_AT_FIRST = 8
_CONTEXT_ERROR = re.compile(r"context length|context window|max_model_len|maximum context|too many tokens", re.I)
_SCHEMA_ERROR = re.compile(r"response_format|json_schema|structured|guided|grammar|schema", re.I)


class ServerConfig(StrictModel):
    """A model behind an OpenAI-compatible server. The key is read from the environment and kept nowhere."""

    base_url: str = Field(description="Address of the API, with its version: `http://localhost:8000/v1`.")
    model: str = Field(description="Name of the model at the server.")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key, if there is one.")
    max_concurrency: int = Field(64, ge=1, description="Requests in flight at most; fewer while the server is busy.")
    requests_per_minute: float | None = Field(None, gt=0, description="Requests a minute at most. Default: no limit.")
    timeout_seconds: float = Field(600, gt=0, description="Longest time for one reply, all of it.")
    max_retries: int = Field(6, ge=0, description="Times that a request is tried again.")
    backoff_seconds: float = Field(1, gt=0, description="Wait before the first retry; doubled with each.")
    max_backoff_seconds: float = Field(60, gt=0, description="Longest wait before a retry.")
    max_outage_seconds: float = Field(600, ge=0, description="How long to wait for a server that cannot be reached.")
    max_model_tokens: int | None = Field(
        None,
        ge=1,
        description="Context of the model, prompt and reply, in tokens. Default: the server says when it is full.",
    )
    tokenizer: str | None = Field(
        None, description="Tokenizer that counts prompts: path or Hub id. Default: a byte counts as a token."
    )
    structured_output: Literal["auto", "json_schema", "vllm", "none"] = Field(
        "none",
        description="How replies are held to a JSON schema: OpenAI's `response_format`; vLLM's `structured_outputs`; "
        "`auto` tries the first and remembers a refusal. On vLLM a schema switches thinking off, unless the server "
        "runs with a reasoning parser; `none` leaves the form to the prompt.",
    )
    temperature: float | None = Field(None, ge=0, description="Sampling temperature. Default: the server's.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus of sampling. Default: the server's.")
    seed: int | None = Field(None, description="Seed of sampling; repeated draws add to it. Default: not sent.")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="More keys of the request: `top_k`, ...")

    @property
    def generation(self) -> dict[str, Any]:
        """What decides a reply, beside the messages."""
        names = ("model", "temperature", "top_p", "seed", "extra_body")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Completion:
    """A reply.

    Args:
        text (`str`):
            The answer, without the reasoning.
        thinking (`str`, *optional*):
            The reasoning, where the model showed it.
        finish_reason (`str`):
            Why it ends, in the server's words.
        model (`str`):
            Who answered, in the server's words.
    """

    text: str
    thinking: str | None
    finish_reason: str
    model: str


class RequestFailed(Exception):
    """One request gave nothing; others may.

    Args:
        reason (`str`):
            Out of the table above.
        detail (`str`, *optional*):
            More for a person.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class ServerRefused(RuntimeError):
    """The server refuses every request, or cannot be reached. What was finished is kept."""


class _Retryable(Exception):
    def __init__(self, reason: str, detail: str, wait_seconds: float = 0.0):
        self.reason, self.detail, self.wait_seconds = reason, detail, wait_seconds


@dataclass
class ClientStats:
    """What a client has done so far."""

    num_sent: int = 0
    num_cached: int = 0
    num_in_flight: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        retries = f", {self.retries.total()} retries" if self.retries else ""
        return f"[{self.num_in_flight} in flight, {self.num_sent} sent, {self.num_cached} from cache{retries}]"


class RequestCache:
    """Replies by a hash of the request, in an SQLite file that several processes may share.

    Args:
        path (`Path`):
            File to read and write; made if it is not there.
        read_only (`Sequence[Path]`, *optional*):
            Files of other processes, in which replies are looked for too.

    Raises:
        ValueError: If a file is no cache.
    """

    def __init__(self, path: Path, read_only: Sequence[Path] = ()):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")  # survives the death of the process at any moment
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL, seconds REAL)"
            )
            self._others = [sqlite3.connect(f"file:{other}?mode=ro", uri=True, timeout=60) for other in read_only]
            for other in self._others:
                other.execute("SELECT 1 FROM replies LIMIT 1")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"The cache of requests {str(path)!r}, or one beside it, cannot be opened: {error}. It holds what "
                "was paid for. Restore it, or move it away to ask again."
            ) from error

    def get(self, key: str) -> Completion | None:
        for database in (self._database, *self._others):
            row = database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            if row is not None:
                return Completion(**json.loads(row[0]))
        return None

    def put(self, key: str, completion: Completion) -> None:
        """Keeps a reply: on disk when this returns."""
        reply = json.dumps(vars(completion))
        self._database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, reply, time.time()))

    def close(self) -> None:
        for database in (self._database, *self._others):
            database.close()


class _Slots:
    """A semaphore whose size follows the server: halved when it is busy, and slowly raised again."""

    def __init__(self, size: int):
        self.max_size, self.size, self.num_taken = size, float(size), 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._halved_at = 0.0

    async def __aenter__(self) -> None:
        if self.num_taken >= int(self.size) or self._waiting:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():
                    self._release()
                raise
        else:
            self.num_taken += 1

    async def __aexit__(self, *error: object) -> None:
        self._release()

    def _release(self) -> None:
        self.num_taken -= 1
        while self._waiting and self.num_taken < int(self.size):
            future = self._waiting.popleft()
            if not future.done():
                self.num_taken += 1
                future.set_result(None)

    def halve(self) -> None:
        if time.monotonic() - self._halved_at > 1:  # those in flight were all sent before the first refusal
            self._halved_at = time.monotonic()
            self.size = max(1.0, self.size / 2)

    def grow(self) -> None:
        self.size = min(self.max_size, self.size + 1 / self.size)


class ChatClient:
    """Asks one model. An asynchronous context manager.

    Args:
        config ([`ServerConfig`]):
            The server.
        cache ([`RequestCache`]):
            Where replies are kept.
    """

    def __init__(self, config: ServerConfig, cache: RequestCache):
        self.config = config
        self.stats = ClientStats()
        self._cache = cache
        self._slots = _Slots(config.max_concurrency)
        self._limiter = None
        if config.requests_per_minute is not None:
            self._limiter = AsyncLimiter(1, 60 / config.requests_per_minute)
        self._counter = None if config.tokenizer is None else load_token_counter(config.tokenizer)
        self._in_flight: dict[str, asyncio.Task[Completion]] = {}
        self._structured = "json_schema" if config.structured_output == "auto" else config.structured_output
        self._num_refused = 0
        self._has_replied = False
        self._reached_at = time.monotonic()
        self._is_out = False

    async def __aenter__(self) -> "ChatClient":
        self._reached_at = time.monotonic()
        self._client = openai.AsyncOpenAI(
            api_key=os.environ.get(self.config.api_key_env) or "EMPTY",
            base_url=self.config.base_url,
            timeout=self.config.timeout_seconds,
            max_retries=0,  # retried here, where replies in a wrong form are too
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        tasks = list(self._in_flight.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()
        self._cache.close()

    def count_tokens(self, messages: list[Message]) -> int:
        """Tokens of a prompt, or a number that is not smaller."""
        count = (lambda text: len(text.encode())) if self._counter is None else self._counter.count
        return sum(count(message["content"]) + _TOKENS_PER_MESSAGE for message in messages) + _TOKENS_PER_MESSAGE

    async def complete(
        self, messages: list[Message], *, max_tokens: int, schema: dict[str, Any] | None = None, sample: int = 0
    ) -> Completion:
        """The reply to some messages; from the cache if it was given before.

        Args:
            messages (`list[dict]`):
                With `role` and `content`.
            max_tokens (`int`):
                Longest reply, its reasoning included.
            schema (`dict`, *optional*):
                JSON schema that the reply should follow. It does where the server can be held to it; parse with care.
            sample (`int`, *optional*, defaults to `0`):
                Number of the draw, for several replies to the same messages.

        Raises:
            RequestFailed: If this request gave nothing, after retries.
            ServerRefused: If every request would fail.
        """
        content = json.dumps([self.config.generation, messages, max_tokens, schema, sample], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()
        cached = self._cache.get(key)
        if cached is not None:
            self.stats.num_cached += 1
            return cached
        if key not in self._in_flight:
            task = asyncio.ensure_future(self._fetch(key, messages, max_tokens, schema, sample))
            task.add_done_callback(lambda _: self._in_flight.pop(key, None))
            self._in_flight[key] = task
        # Shielded: the request may have others waiting for it when this one is cancelled
        return await asyncio.shield(self._in_flight[key])

    async def _fetch(
        self, key: str, messages: list[Message], max_tokens: int, schema: dict[str, Any] | None, sample: int
    ) -> Completion:
        await self._check_length(messages, max_tokens)
        retries = Counter()
        while True:
            try:
                completion = await self._send(messages, max_tokens, schema, sample)
            except _Retryable as error:
                self.stats.retries[error.reason] += 1
                wait_seconds = self._wait(error, retries)
            else:
                self._cache.put(key, completion)
                return completion
            await asyncio.sleep(wait_seconds)

    def _wait(self, error: _Retryable, retries: Counter[str]) -> float:
        """Seconds before the next try. Raises where there is none."""
        if error.reason == "outage":
            out_seconds = time.monotonic() - self._reached_at
            if out_seconds > self.config.max_outage_seconds:
                raise ServerRefused(
                    f"The server at {self.config.base_url} cannot be reached since {out_seconds:.0f} s: "
                    f"{error.detail}. No request can be made. Start it, check `base_url`, and run again: what was "
                    "finished is kept."
                )
            if not self._is_out:
                logger.warning(f"The server at {self.config.base_url} cannot be reached. Waiting for it.")
            self._is_out = True
        else:
            retries[error.reason] += 1
            limit = self.config.max_retries
            if error.reason in _CONTENT_REASONS:
                limit = min(limit, _MAX_CONTENT_RETRIES)
            if retries[error.reason] > limit or retries.total() > self.config.max_retries:
                raise RequestFailed(error.reason, error.detail)
        doubled = self.config.backoff_seconds * 2 ** min(retries.total(), 16) / 2
        backoff = min(doubled, self.config.max_backoff_seconds) * random.uniform(0.5, 1.5)  # not all at once
        return max(backoff, min(error.wait_seconds, 10 * self.config.max_backoff_seconds))

    async def _check_length(self, messages: list[Message], max_tokens: int) -> None:
        limit = self.config.max_model_tokens
        if limit is None:
            return
        num_bytes = sum(len(message["content"].encode()) + _TOKENS_PER_MESSAGE for message in messages)
        if num_bytes + _TOKENS_PER_MESSAGE + max_tokens <= limit:
            return  # a token is at least a byte
        num_tokens = await asyncio.to_thread(self.count_tokens, messages)
        if num_tokens + max_tokens > limit:
            raise RequestFailed("context_overflow", f"{num_tokens} + {max_tokens} tokens, of {limit}")

    async def _send(
        self, messages: list[Message], max_tokens: int, schema: dict[str, Any] | None, sample: int
    ) -> Completion:
        """One request. A slot is held for the request only, so that one that waits to be retried blocks nobody."""
        async with self._slots:
            if self._limiter is not None:
                await self._limiter.acquire()
            structured = self._structured if schema is not None else "none"
            self.stats.num_sent += 1
            self.stats.num_in_flight += 1
            try:
                with anyio.fail_after(self.config.timeout_seconds):  # the client's own restarts with every byte
                    reply = await self._client.chat.completions.create(
                        messages=messages, max_tokens=max_tokens, **self._options(structured, schema, sample)
                    )
            except (openai.APITimeoutError, TimeoutError) as error:
                raise _Retryable("timeout", f"no reply in {self.config.timeout_seconds:g} s") from error
            except openai.APIConnectionError as error:
                raise self._connection_error(error) from error
            except openai.APIStatusError as error:
                self._reached()
                raise self._status_error(error, structured) from error
            except (openai.OpenAIError, ValueError) as error:  # what is no JSON, or no text at all
                raise _Retryable("malformed_reply", str(error)[:200]) from error
            finally:
                self.stats.num_in_flight -= 1
        self._reached()
        completion = self._parse(reply)
        self._has_replied = True
        self._slots.grow()
        return completion

    def _options(self, structured: str, schema: dict[str, Any] | None, sample: int) -> dict[str, Any]:
        options = {name: value for name, value in self.config.generation.items() if value not in (None, {})}
        if self.config.seed is not None:
            options["seed"] = self.config.seed + sample
        if structured == "json_schema":
            json_schema = {"name": "reply", "schema": schema, "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        elif structured == "vllm":
            options["extra_body"] = {**self.config.extra_body, "structured_outputs": {"json": schema}}
        return options

    def _reached(self) -> None:
        if self._is_out:
            logger.warning(f"The server at {self.config.base_url} is back.")
        self._is_out = False
        self._reached_at = time.monotonic()

    def _connection_error(self, error: openai.APIConnectionError) -> _Retryable:
        cause = error.__cause__
        is_outage = type(cause).__name__ in ("ConnectError", "ConnectTimeout")
        return _Retryable("outage" if is_outage else "connection_closed", f"{type(cause).__name__}: {cause}"[:200])

    def _status_error(self, error: openai.APIStatusError, structured: str) -> Exception:
        status, message = error.status_code, error.message[:500]
        if status == 429:
            self._slots.halve()
            return _Retryable("rate_limited", message, _retry_after(error))
        if status in (408, 409) or status >= 500:
            return _Retryable("server_error", f"status {status}: {message}", _retry_after(error))
        if status in (401, 403, 404):
            return ServerRefused(
                f"The server at {self.config.base_url} refuses the model {self.config.model!r} with status {status}: "
                f"{message} Every request would meet the same. Check `base_url`, `model`, and the key in the "
                f"environment variable {self.config.api_key_env}."
            )
        if structured != "none" and self.config.structured_output == "auto" and _SCHEMA_ERROR.search(message):
            if self._structured != "none":
                logger.warning(f"The server at {self.config.base_url} takes no JSON schema; the prompt has to do.")
            self._structured = "none"
            return _Retryable("no_structured_output", message)
        if _CONTEXT_ERROR.search(message):
            return RequestFailed("context_overflow", message)
        self._num_refused += 1
        if not self._has_replied and self._num_refused >= _MAX_REFUSED_AT_FIRST:
            return ServerRefused(
                f"The server at {self.config.base_url} refused the first {self._num_refused} requests, the last with "
                f"status {status}: {message} It is not one request that is wrong. Check the options of the server in "
                "the configuration."
            )
        return RequestFailed("bad_request", f"status {status}: {message}")

    def _parse(self, reply: Any) -> Completion:
        """A reply as text and reasoning. The client does not validate what a server sends: anything may be missing."""
        try:
            choices = reply.choices
            if not choices:
                raise _Retryable("empty_reply", "no choice")
            choice = choices[0]
            message, finish_reason = choice.message, str(choice.finish_reason)
            text = message.content
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise _Retryable("malformed_reply", f"{type(reply).__name__} is no chat completion") from error
        if finish_reason == "content_filter" or getattr(message, "refusal", None):
            raise RequestFailed("refused_content", str(getattr(message, "refusal", None) or finish_reason)[:200])
        usage = getattr(reply, "usage", None)
        self.stats.prompt_tokens += getattr(usage, "prompt_tokens", None) or 0
        self.stats.completion_tokens += getattr(usage, "completion_tokens", None) or 0
        if finish_reason == "length":
            raise _Retryable("truncated", str(text)[-200:])
        if text is None and getattr(message, "tool_calls", None):
            raise _Retryable("malformed_reply", "a tool was called")
        if text is not None and not isinstance(text, str):
            raise _Retryable("malformed_reply", f"content is {type(text).__name__}")
        text, thinking = _split_thinking(text or "")
        thinking = thinking or getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
        if not text:
            raise _Retryable("empty_reply", "no text")
        return Completion(text, thinking, finish_reason, str(getattr(reply, "model", self.config.model)))


def _split_thinking(text: str) -> tuple[str, str | None]:
    """The answer, and the reasoning before it; the tag that opens it may stand in the template instead."""
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate could not be written to disk
    thinking, closing, answer = text.rpartition("</think>")
    if "<think>" in answer:
        raise _Retryable("truncated", "ends within its reasoning")
    if not closing:
        return text.strip(), None
    return answer.strip(), thinking.replace("<think>", "", 1).strip()


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds that the server asks to wait: a number, or a date; 0 if it asks for none."""
    header = error.response.headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", header):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
