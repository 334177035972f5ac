"""Requests to an OpenAI-compatible server, such as vLLM: concurrent, retried, and each paid for once.

A reply is in an SQLite file before anybody sees it, under a hash of what was asked. A build that is killed and started
again finds it there, and how often a reply came that could not be used: that was paid for too. Where a server was
reached at decides nothing about a reply and is no part of the hash.

| reason of a failure | what happened | tried again |
| --- | --- | --- |
| `rate_limited` | status 429 | after the time that the server names; with fewer requests in flight |
| `server_error` | status 408, 409 or 5xx | with exponential back-off |
| `timeout` | no whole reply in `timeout_seconds` | with exponential back-off |
| `connection_closed` | the connection broke | with exponential back-off |
| `malformed_reply` | not a chat completion, or a call of a tool | at most twice |
| `empty_reply` | no choice, or no text | at most twice |
| `truncated` | cut off at `max_tokens`, or within its reasoning | at most twice; not at temperature 0 |
| `refused_content` | refused by the model or a content filter | no |
| `context_overflow` | longer than the server's context | no; not sent where it can be known |
| `bad_request` | any other status of 4xx | no |

No request is given up for a server that is gone (no connection), or that puts everybody off (429, 502, 503): it is
waited for. One that stays away for `max_outage_seconds`, or refuses everybody, ends the run.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import anyio
import openai
from aiolimiter import AsyncLimiter
from pydantic import Field

from ..strict_model import StrictModel
from .tokens import load_token_counter


logger = logging.getLogger(__name__)

Message = dict[str, str]

# A chat template adds fewer tokens than these
_TOKENS_PER_MESSAGE = 16
# Replies that are wrong in themselves: the next may be better, but the tenth is not
_MAX_CONTENT_RETRIES = 2
_CONTENT_REASONS = ("malformed_reply", "empty_reply", "truncated")
# The answers of a server that is starting, overloaded, or gone from behind its gateway
_UNAVAILABLE_STATUSES = (429, 502, 503)
# A shorter outage is not worth a line in the log
_MIN_OUTAGE_SECONDS = 5
# How long another process may hold the file of replies
_MAX_LOCKED_SECONDS = 60
_CREATE_TABLES = """\
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, thinking TEXT, finish_reason TEXT NOT NULL, model TEXT NOT NULL,
    prompt_tokens INTEGER, completion_tokens INTEGER, unix_seconds REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS failures (
    key TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL, unix_seconds REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS failures_by_key ON failures (key);
COMMIT;
"""
_SELECT_REPLY = "SELECT text, thinking, finish_reason, model FROM replies WHERE key = ?"
_SELECT_FAILURES = "SELECT reason, detail FROM failures WHERE key = ? ORDER BY rowid"
# With so many requests refused, and none accepted, it is not a request that is wrong
_MAX_REFUSED_AT_FIRST = 8
# How vLLM, SGLang, TGI, llama.cpp, OpenAI and gateways word it
_CONTEXT_ERROR = re.compile(
    r"context.?(length|window|size)|max_model_len|maximum (context|model length)|too many tokens|prompt is too long"
    r"|request too large|max_new_tokens. must be|must be at least 1, got -",
    re.I,
)
_CONTENT_ERROR = re.compile(r"flagged|moderation|content.?(filter|policy|management)", re.I)
_SCHEMA_ERROR = re.compile(r"response_format|json_schema|structured|guided|grammar|schema", re.I)


class ServerConfig(StrictModel):
    """A model behind an OpenAI-compatible server. The key is read from the environment and kept nowhere."""

    base_url: str = Field(
        pattern="^https?://", description="Address of the API, with its version: `http://localhost:8000/v1`."
    )
    model: str = Field(description="Name of the model at the server.")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key, if there is one.")
    max_concurrency: int = Field(  # 1,000: the connections of the HTTP client
        64, ge=1, le=1000, description="Requests in flight at most; fewer while the server is busy."
    )
    requests_per_minute: float | None = Field(None, gt=0, description="Requests a minute at most. Default: no limit.")
    timeout_seconds: float = Field(600, gt=0, description="Longest time for one reply, all of it.")
    max_retries: int = Field(6, ge=0, description="Times that a request is tried again.")
    backoff_seconds: float = Field(1, gt=0, description="Wait before the first retry; doubled with each.")
    max_backoff_seconds: float = Field(60, gt=0, description="Longest wait before a retry.")
    max_outage_seconds: float = Field(600, ge=0, description="How long to wait for a server that answers nobody.")
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="What the server calls the longest reply; newer models of OpenAI take the second."
    )
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
    """The server refuses every request. What was finished is kept."""


class ServerUnavailable(ServerRefused):
    """The server has answered nobody for `max_outage_seconds`. What was finished is kept."""


class _Retryable(Exception):
    def __init__(self, reason: str, detail: str, wait_seconds: float = 0.0, is_unavailable: bool = False):
        self.reason, self.detail, self.wait_seconds = reason, detail, wait_seconds
        self.is_unavailable = is_unavailable  # says nothing about the request: others would meet the same


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
    """Replies by a hash of the request, usable or not, in an SQLite file that several processes of one host may share.

    Args:
        path (`Path`):
            File to read and write; made if it is not there.
        read_only (`Sequence[Path]`, *optional*):
            Files of other processes, in which replies are looked for too. One that cannot be read is left out, with a
            warning.

    Raises:
        ValueError: If the file is no cache.
    """

    def __init__(self, path: Path, read_only: Sequence[Path] = ()):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        try:
            self._database = _open_cache(path)
        except sqlite3.Error as error:
            raise ValueError(
                f"The cache of requests {str(path)!r} cannot be opened: {error}. It holds what was paid for. Restore "
                "it, or move it away to ask again."
            ) from error
        self._others: dict[Path, sqlite3.Connection] = {}
        for other in read_only:
            try:
                self._others[other] = sqlite3.connect(f"{other.absolute().as_uri()}?mode=ro", uri=True, timeout=60)
                _probe(self._others[other])
            except sqlite3.Error as error:
                self._leave_out(other, error)

    def get(self, key: str) -> Completion | None:
        """The reply to a request, if it was kept."""
        return next((Completion(*row) for row in self._select(_SELECT_REPLY, key)), None)

    def failures(self, key: str) -> list[tuple[str, str]]:
        """Reason and detail of the replies to a request that could not be used, in their order."""
        return list(self._select(_SELECT_FAILURES, key))

    def _select(self, query: str, key: str) -> Iterator[tuple[Any, ...]]:
        """Rows of this file, then those of the others."""
        try:
            rows = self._database.execute(query, (key,)).fetchall()
        except sqlite3.Error as error:
            raise self._error("read", error) from error
        yield from rows
        for path, other in list(self._others.items()):
            try:
                rows = other.execute(query, (key,)).fetchall()
            except sqlite3.Error as error:
                self._leave_out(path, error)
                continue
            yield from rows

    async def put(self, key: str, completion: Completion, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Keeps a reply: it is in the file when this returns."""
        content = (completion.text, completion.thinking, completion.finish_reason, completion.model)
        row = (key, *content, prompt_tokens, completion_tokens, time.time())
        await self._insert("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    async def put_failure(self, key: str, reason: str, detail: str) -> None:
        """Keeps that a reply came which could not be used, and why."""
        await self._insert("INSERT INTO failures VALUES (?, ?, ?, ?)", (key, reason, detail, time.time()))

    async def _insert(self, statement: str, row: tuple[Any, ...]) -> None:
        give_up_at = time.monotonic() + _MAX_LOCKED_SECONDS
        while True:
            try:
                # Not on a thread: that takes longer than the 40 microseconds of a commit
                self._database.execute(statement, row)
                return
            except sqlite3.Error as error:
                if "locked" not in str(error) or time.monotonic() > give_up_at:
                    raise self._error("written", error) from error
            await asyncio.sleep(0.02)

    def forget_failures(self, reasons: Sequence[str]) -> None:
        """Lets what failed for one of these reasons be asked again; in this file alone."""
        marks = ", ".join("?" * len(reasons))
        try:
            self._database.execute(f"PRAGMA busy_timeout = {1000 * _MAX_LOCKED_SECONDS}")
            self._database.execute(f"DELETE FROM failures WHERE reason IN ({marks})", tuple(reasons))
        except sqlite3.Error as error:
            raise self._error("written", error) from error

    def close(self) -> None:
        for database in (self._database, *self._others.values()):
            database.close()

    def _leave_out(self, path: Path, error: sqlite3.Error) -> None:
        logger.warning(f"The cache of requests {str(path)!r} cannot be read and is left out: {error}.")
        self._others.pop(path, None)

    def _error(self, verb: str, error: sqlite3.Error) -> RuntimeError:
        return RuntimeError(
            f"The cache of requests {str(self._path)!r} cannot be {verb}: {error}. Replies would be paid for and "
            "lost. Look for a full disk, or a process that holds the file, and run again: what was finished is kept."
        )


def _open_cache(path: Path) -> sqlite3.Connection:
    # A short wait: a lock must not hold up the event loop
    database = sqlite3.connect(path, timeout=0.01, isolation_level=None)
    give_up_at = time.monotonic() + _MAX_LOCKED_SECONDS
    while True:
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")  # survives the death of the process at any moment
            database.executescript(_CREATE_TABLES)
            _probe(database)
            return database
        except sqlite3.OperationalError as error:  # another process may be making the file at this moment
            if "locked" not in str(error) or time.monotonic() > give_up_at:
                raise
        time.sleep(0.02)


def _probe(database: sqlite3.Connection) -> None:
    """Raises an error of SQLite where the file is none of a cache."""
    for query in (_SELECT_REPLY, _SELECT_FAILURES):
        database.execute(query, ("",))


class _Slots:
    """A semaphore whose size follows the server: halved when it is busy, and slowly raised again."""

    def __init__(self, size: int):
        self.max_size, self.size, self.num_taken = size, float(size), 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._halved_at = 0.0
        self._pause: asyncio.TimerHandle | None = None

    async def acquire(self) -> None:
        """Waits for a slot, in the order of arrival."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._grant()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release()
            raise

    def release(self) -> None:
        self.num_taken -= 1
        self._grant()

    def pause(self, seconds: float) -> None:
        """Grants no slot for so long."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        if self._pause is None or self._pause.when() < end:
            if self._pause is not None:
                self._pause.cancel()
            self._pause = loop.call_at(end, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self.num_taken < int(self.size) and self._pause is None:
            future = self._waiting.popleft()
            if not future.done():
                self.num_taken += 1
                future.set_result(None)

    def halve(self, sent_at: float) -> None:
        """Lowers the size, once for all the requests that were under way together."""
        if sent_at > self._halved_at:
            self._halved_at = time.monotonic()
            self.size = max(1.0, self.size / 2)

    def grow(self) -> None:
        self.size = min(self.max_size, self.size + 1 / self.size)


@dataclass
class _Tries:
    """The failures of one request."""

    num_answered: int  # by the server, to anybody, when this one was last tried
    num_failed: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # of the failures that may be the request's own


class ChatClient:
    """Asks one model. An asynchronous context manager.

    Args:
        config ([`ServerConfig`]):
            The server.
        cache ([`RequestCache`]):
            Where replies are kept. The client closes it.
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
        self._random = random.Random()
        self._num_answered = 0
        self._out_since: float | None = None  # start of the time in which nobody is answered
        self._is_waiting = False

    async def __aenter__(self) -> "ChatClient":
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
            ServerRefused: If every request would fail, or the server stays away ([`ServerUnavailable`]).
        """
        structured = None if schema is None else self.config.structured_output
        identity = [self.config.generation, messages, max_tokens, schema, structured, sample]
        content = json.dumps(identity, sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()
        cached = self._cache.get(key)
        if cached is not None:
            self.stats.num_cached += 1
            return cached
        if key not in self._in_flight:
            task = asyncio.ensure_future(self._fetch(key, messages, max_tokens, schema, sample))
            task.add_done_callback(lambda task: self._forget(key, task))
            self._in_flight[key] = task
        # Shielded: the request may have others waiting for it when this one is cancelled
        return await asyncio.shield(self._in_flight[key])

    def _forget(self, key: str, task: asyncio.Task[Completion]) -> None:
        del self._in_flight[key]
        if not task.cancelled():
            task.exception()  # seen, so that asyncio does not complain where everybody who waited was cancelled

    async def _fetch(
        self, key: str, messages: list[Message], max_tokens: int, schema: dict[str, Any] | None, sample: int
    ) -> Completion:
        await self._check_length(messages, max_tokens)
        messages = [{name: _encodable(text) for name, text in message.items()} for message in messages]
        tries = _Tries(self._num_answered)
        for reason, detail in self._cache.failures(key):  # of a run that was killed
            if reason not in _CONTENT_REASONS:
                raise RequestFailed(reason, detail)
            self._raise_if_hopeless(_Retryable(reason, detail), tries)
        while True:
            await self._slots.acquire()
            try:
                reply = await self._send(messages, max_tokens, schema, sample)
                completion, *usage = await self._read(key, reply)
                await self._cache.put(key, completion, *usage)
                return completion
            except _Retryable as failure:
                self.stats.retries[failure.reason] += 1
                self._raise_if_hopeless(failure, tries)
                wait_seconds = self._wait_seconds(failure, tries)
                if failure.reason == "rate_limited":  # the limit is everybody's
                    self._slots.pause(wait_seconds)
                    wait_seconds = 0
            finally:  # one that waits to be tried again blocks nobody
                self._slots.release()
            await asyncio.sleep(wait_seconds)

    def _raise_if_hopeless(self, failure: _Retryable, tries: _Tries) -> None:
        """Ends a request that has failed too often, unless it is the server that fails, and not the request."""
        tries.num_failed += 1
        if failure.is_unavailable:
            is_out = tries.num_answered == self._num_answered  # nobody was answered since this one's last try
            tries.num_answered = self._num_answered
            if is_out or failure.reason == "outage":
                self._wait_for_server(failure)
                return
        tries.counts[failure.reason] += 1
        limit = self.config.max_retries
        if failure.reason in _CONTENT_REASONS:
            limit = min(limit, _MAX_CONTENT_RETRIES)
        if failure.reason == "truncated" and self.config.temperature == 0:
            limit = 0  # the next would be the same
        if failure.reason == "rate_limited":
            limit += self.config.max_concurrency.bit_length()  # it takes so many halvings to be alone
        if tries.counts[failure.reason] > limit:
            raise RequestFailed(failure.reason, failure.detail)

    def _wait_for_server(self, failure: _Retryable) -> None:
        """Says that the server is waited for. Raises when that has been long enough."""
        out_seconds = time.monotonic() - self._out_since
        if out_seconds > self.config.max_outage_seconds:
            if len(self._in_flight) == 1 and self._has_replied and failure.reason != "outage":
                raise RequestFailed(failure.reason, failure.detail)  # the last one, after all others were answered
            raise ServerUnavailable(
                f"The server at {self.config.base_url} has answered nobody for {out_seconds:.0f} s: {failure.detail}. "
                "No request can be made. Start it, check `base_url`, and run again: what was finished is kept."
            )
        if out_seconds > _MIN_OUTAGE_SECONDS and not self._is_waiting:
            logger.warning(f"The server at {self.config.base_url} answers nobody ({failure.detail}). Waiting for it.")
            self._is_waiting = True

    def _wait_seconds(self, failure: _Retryable, tries: _Tries) -> float:
        if failure.wait_seconds:  # the server knows best; a little more, so that not all come at once
            return min(failure.wait_seconds, self.config.max_backoff_seconds) * self._random.uniform(1, 1.1)
        if failure.reason == "no_structured_output":
            return 0
        doubled = self.config.backoff_seconds * 2 ** min(tries.num_failed, 16) / 2
        return min(doubled, self.config.max_backoff_seconds) * self._random.uniform(0.5, 1)

    async def _check_length(self, messages: list[Message], max_tokens: int) -> None:
        limit = self.config.max_model_tokens
        if limit is None:
            return
        num_bytes = sum(len(message["content"].encode()) + _TOKENS_PER_MESSAGE for message in messages)
        if num_bytes + _TOKENS_PER_MESSAGE + max_tokens <= limit:
            return  # a token is at least a byte
        num_tokens = await asyncio.to_thread(self.count_tokens, messages)
        if num_tokens + max_tokens > limit:
            unit = "bytes, for want of a `tokenizer`," if self._counter is None else "tokens"
            raise RequestFailed("context_overflow", f"{num_tokens} {unit} + {max_tokens} tokens, of {limit}")

    async def _send(self, messages: list[Message], max_tokens: int, schema: dict[str, Any] | None, sample: int) -> Any:
        """One request: the JSON of its reply."""
        if self._limiter is not None:
            await self._limiter.acquire()
        structured = self._structured if schema is not None else "none"
        body = self._body(messages, max_tokens, structured, schema, sample)
        sent_at = time.monotonic()
        self.stats.num_sent += 1
        self.stats.num_in_flight += 1
        try:
            # Without the client's models of request and reply, which take a third of its time and check nothing
            with anyio.fail_after(self.config.timeout_seconds):  # the client's own restarts with every byte
                reply = await self._client.post("/chat/completions", cast_to=object, body=body)
        except (openai.APITimeoutError, TimeoutError) as error:
            raise _Retryable("timeout", f"no reply in {self.config.timeout_seconds:g} s") from error
        except openai.APIConnectionError as error:
            raise self._connection_error(error) from error
        except openai.APIStatusError as error:
            raise self._status_error(error, structured, sent_at) from error
        except (openai.OpenAIError, ValueError, RecursionError) as error:  # what is no JSON, or no text at all
            raise _Retryable("malformed_reply", str(error)[:200]) from error
        finally:
            self.stats.num_in_flight -= 1
        self._answered()
        return reply

    async def _read(self, key: str, reply: Any) -> tuple[Completion, int, int]:
        """The reply, and the tokens of prompt and reply. What came and cannot be used is kept in mind."""
        try:
            parsed = self._parse(reply)
        except (_Retryable, RequestFailed) as failure:
            await self._cache.put_failure(key, failure.reason, _encodable(failure.detail))
            raise
        self._has_replied = True
        self._slots.grow()
        return parsed

    def _body(
        self, messages: list[Message], max_tokens: int, structured: str, schema: dict[str, Any] | None, sample: int
    ) -> dict[str, Any]:
        body = {"messages": messages, self.config.max_tokens_key: max_tokens}
        for name in ("model", "temperature", "top_p", "seed"):
            value = getattr(self.config, name)
            if value is not None:
                body[name] = value + sample if name == "seed" else value
        body.update(self.config.extra_body)
        if structured == "json_schema":
            json_schema = {"name": "reply", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        elif structured == "vllm":
            body["structured_outputs"] = {"json": schema}
        return body

    def _answered(self) -> None:
        if self._is_waiting:
            logger.warning(f"The server at {self.config.base_url} is back.")
        self._is_waiting = False
        self._out_since = None
        self._num_answered += 1

    def _unanswered(self) -> None:
        if self._out_since is None:
            self._out_since = time.monotonic()

    def _connection_error(self, error: openai.APIConnectionError) -> _Retryable:
        cause = error.__cause__
        detail = f"{type(cause).__name__}: {cause}"[:200]
        if type(cause).__name__ not in ("ConnectError", "ConnectTimeout"):
            return _Retryable("connection_closed", detail)
        self._unanswered()
        return _Retryable("outage", detail, is_unavailable=True)

    def _status_error(self, error: openai.APIStatusError, structured: str, sent_at: float) -> Exception:
        status, message = error.status_code, self._message(error)
        if status in _UNAVAILABLE_STATUSES:
            self._unanswered()
        else:
            self._answered()
        if status == 401 or error.code == "insufficient_quota":
            return self._refused(status, message)
        is_limited = status == 429 and "too large" not in message.lower()  # or it is one request that never fits
        if _CONTEXT_ERROR.search(message) and status < 500 and not is_limited:
            return RequestFailed("context_overflow", message)
        if _CONTENT_ERROR.search(message) and status in (400, 403, 422):
            return RequestFailed("refused_content", message)
        if status == 429:
            self._slots.halve(sent_at)
            return _Retryable("rate_limited", message, _retry_after(error), is_unavailable=True)
        if status in (408, 409) or status >= 500:
            is_unavailable = status in _UNAVAILABLE_STATUSES
            return _Retryable("server_error", f"status {status}: {message}", _retry_after(error), is_unavailable)
        if status in (403, 404):
            return self._refused(status, message)
        if structured != "none" and self.config.structured_output == "auto" and _SCHEMA_ERROR.search(message):
            if self._structured != "none":
                logger.warning(f"The server at {self.config.base_url} takes no JSON schema; the prompt has to do.")
            self._structured = "none"
            return _Retryable("no_structured_output", message)
        return self._bad_request(status, message)

    def _message(self, error: openai.APIStatusError) -> str:
        """What the server says, less the key, which some servers repeat."""
        key = os.environ.get(self.config.api_key_env)
        return (error.message.replace(key, "<key>") if key else error.message)[:500]

    def _refused(self, status: int, message: str) -> ServerRefused:
        is_set = "is set" if os.environ.get(self.config.api_key_env) else "is not set"
        return ServerRefused(
            f"The server at {self.config.base_url} refuses the model {self.config.model!r} with status {status}: "
            f"{message} Every request would meet the same. Check `base_url`, `model`, and the key: the environment "
            f"variable {self.config.api_key_env} {is_set}. What was finished is kept."
        )

    def _bad_request(self, status: int, message: str) -> Exception:
        self._num_refused += 1
        if not self._has_replied and self._num_refused >= _MAX_REFUSED_AT_FIRST:
            return ServerRefused(
                f"The server at {self.config.base_url} refused the first {self._num_refused} requests, the last with "
                f"status {status}: {message} It is not one request that is wrong. Check the options of the server in "
                "the configuration."
            )
        return RequestFailed("bad_request", f"status {status}: {message}")

    def _parse(self, reply: Any) -> tuple[Completion, int, int]:
        """A reply as text and reasoning, with its usage. Nobody checked what the server sent: all may be missing."""
        try:
            choice = (reply.get("choices") or [None])[0]
            if choice is None:
                raise _Retryable("empty_reply", f"no choice: {reply.get('error')}"[:200])
            message, finish_reason = choice["message"], str(choice.get("finish_reason"))
            text, refusal = message.get("content"), message.get("refusal")
            thinking = message.get("reasoning") or message.get("reasoning_content")
            usage = [(reply.get("usage") or {}).get(f"{name}_tokens") or 0 for name in ("prompt", "completion")]
            self.stats.prompt_tokens += usage[0]
            self.stats.completion_tokens += usage[1]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise _Retryable("malformed_reply", f"{reply!r:.200} is no chat completion") from error
        if finish_reason == "content_filter" or refusal:
            raise RequestFailed("refused_content", str(refusal or finish_reason)[:200])
        if finish_reason == "length":
            raise _Retryable("truncated", str(text)[-200:])
        if text is None and message.get("tool_calls"):
            raise _Retryable("malformed_reply", "a tool was called")
        if not isinstance(text, str | None) or not isinstance(thinking, str | None):
            raise _Retryable("malformed_reply", f"content is {type(text).__name__}")
        text, thinking = _split_thinking(_encodable(text or ""), _encodable(thinking or ""))
        if not text:
            raise _Retryable("empty_reply", "no text")
        model = _encodable(str(reply.get("model") or self.config.model))
        return Completion(text, thinking, _encodable(finish_reason), model), *usage


def _split_thinking(text: str, thinking: str) -> tuple[str, str | None]:
    """The answer, and the reasoning before it; the tag that opens it may stand in the template instead."""
    if thinking:  # the server has split it: a tag in the answer is the answer's
        return text.strip(), thinking.strip()
    thinking, closing, answer = text.rpartition("</think>")
    if "<think>" in answer:
        raise _Retryable("truncated", "ends within its reasoning")
    if not closing:
        return text.strip(), None
    return answer.strip(), thinking.replace("<think>", "", 1).strip()


def _encodable(text: str) -> str:
    """The text without lone surrogates, which can neither be sent nor written."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds that the server asks to wait: a number, or a date; 0 if it asks for none."""
    header = error.response.headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", header):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
