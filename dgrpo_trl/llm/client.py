"""Requests to an OpenAI-compatible server, such as vLLM: concurrent, retried, and each paid for once.

A reply is in the cache before anybody sees it, under a hash of the request. A run that is killed and started again
finds it there, and also how many replies to a request could not be used: those were paid for too. The address of a
server does not decide a reply and is not part of the hash. [`failures`] says what is retried.
"""

import asyncio
import hashlib
import json
import logging
import math
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import anyio
import openai

from .cache import RequestCache
from .config import ServerConfig
from .failures import (
    CONTENT_REASONS,
    MAX_CONTENT_RETRIES,
    UNAVAILABLE_STATUSES,
    RequestFailed,
    Retryable,
    ServerRefused,
    ServerUnavailable,
    classify_status,
    is_schema_error,
)
from .replies import Completion, encodable, parse_reply
from .slots import Pace, Slots
from .tokens import load_token_counter


logger = logging.getLogger(__name__)

Message = dict[str, str]

# A chat template adds fewer tokens than these
_TOKENS_PER_MESSAGE = 16
# A shorter outage is not worth a line in the log
_MIN_OUTAGE_SECONDS = 5
# With this many requests refused, and none accepted, it is not a single request that is wrong
_MAX_REFUSED_AT_FIRST = 8


@dataclass
class ClientStats:
    """What a client has done so far."""

    num_sent: int = 0
    num_cached: int = 0
    num_in_flight: int = 0
    retries: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        retries = f", {self.retries.total()} retries" if self.retries else ""
        return f"[{self.num_in_flight} in flight, {self.num_sent} sent, {self.num_cached} from cache{retries}]"


@dataclass
class _Request:
    """What is asked, and under which key its reply is kept."""

    key: str
    messages: list[Message]
    max_tokens: int
    schema: dict[str, Any] | None
    sample: int


@dataclass
class _Attempts:
    """The failures of one request."""

    num_answered: int  # of all requests, by the server, when this one was last sent
    num_failed: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # of the failures that may be the request's own


class ChatClient:
    """Asks one model. An asynchronous context manager, of one event loop, which closes the cache too."""

    def __init__(self, config: ServerConfig, cache: RequestCache):
        self.config = config
        self.stats = ClientStats()
        self._cache = cache
        self._client = openai.AsyncOpenAI(
            api_key=os.environ.get(config.api_key_env) or "EMPTY",
            base_url=config.base_url,
            timeout=config.timeout_seconds,
            max_retries=0,  # retried here, where replies in a wrong form are too
        )
        self._slots = Slots(config.max_concurrency)
        self._pace = Pace(60 / config.requests_per_minute if config.requests_per_minute else 0)
        self._counter = None if config.tokenizer is None else load_token_counter(config.tokenizer)
        self._in_flight: dict[str, asyncio.Task[Completion]] = {}
        self._structured = "json_schema" if config.structured_output == "auto" else config.structured_output
        self._num_refused = 0
        self._has_replied = False
        self._random = random.Random()
        self._num_answered = 0
        self._out_since = math.inf  # start of the time in which no request is answered
        self._is_waiting = False

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancels what is in flight, and closes the connections and the cache."""
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
            ServerRefused: If all requests would fail, or the server stays unavailable ([`ServerUnavailable`]).
        """
        structured = None if schema is None else self.config.structured_output
        identity = [self.config.generation, messages, max_tokens, schema, structured, sample]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        cached = self._cache.get(key)
        if cached is not None:
            self.stats.num_cached += 1
            return cached
        if key not in self._in_flight:
            messages = [{name: encodable(text) for name, text in message.items()} for message in messages]
            task = asyncio.ensure_future(self._fetch(_Request(key, messages, max_tokens, schema, sample)))
            task.add_done_callback(lambda task: self._forget(key, task))
            self._in_flight[key] = task
        # Shielded: others may wait for the same request when this call is cancelled
        return await asyncio.shield(self._in_flight[key])

    def _forget(self, key: str, task: asyncio.Task[Completion]) -> None:
        del self._in_flight[key]
        if not task.cancelled():
            task.exception()  # seen, so that asyncio does not complain where all that waited were cancelled

    # --- Attempts of one request

    async def _fetch(self, request: _Request) -> Completion:
        await self._check_length(request)
        attempts = _Attempts(self._num_answered)
        for reason, detail in self._cache.failures(request.key):  # of a run that was killed
            if reason not in CONTENT_REASONS:
                raise RequestFailed(reason, detail)
            self._raise_if_exhausted(Retryable(reason, detail), attempts)
        while True:
            async with self._slots:
                try:
                    reply = await self._send(request)
                    completion, *usage = await self._read(request.key, reply)
                    await self._cache.put(request.key, completion, *usage)
                    return completion
                except Retryable as failure:
                    self.stats.retries[failure.reason] += 1
                    self._raise_if_exhausted(failure, attempts)
                    wait_seconds = self._wait_seconds(failure, attempts)
                    if failure.reason == "rate_limited":  # the limit applies to all requests
                        self._slots.pause(wait_seconds)
                        wait_seconds = 0
            await asyncio.sleep(wait_seconds)  # one that waits to be sent again blocks no other

    def _raise_if_exhausted(self, failure: Retryable, attempts: _Attempts) -> None:
        """Ends a request that has failed too often, unless it is the server that fails, and not the request."""
        attempts.num_failed += 1
        if failure.is_unavailable:
            is_out = attempts.num_answered == self._num_answered  # no request was answered since this one's last try
            attempts.num_answered = self._num_answered
            if is_out or failure.reason == "outage":
                self._wait_for_server(failure)
                return
        attempts.counts[failure.reason] += 1
        limit = self.config.max_retries
        if failure.reason in CONTENT_REASONS:
            limit = min(limit, MAX_CONTENT_RETRIES)
        if failure.reason == "truncated" and self.config.temperature == 0:
            limit = 0  # the next would be the same
        if failure.reason == "rate_limited":
            limit += self.config.max_concurrency.bit_length()  # the halvings until it is alone
        if attempts.counts[failure.reason] > limit:
            raise RequestFailed(failure.reason, failure.detail)

    def _wait_for_server(self, failure: Retryable) -> None:
        """Logs that the client waits for the server. Raises when that has been long enough."""
        out_seconds = time.monotonic() - self._out_since
        if out_seconds > self.config.max_outage_seconds:
            if len(self._in_flight) == 1 and self._has_replied and failure.reason != "outage":
                raise RequestFailed(failure.reason, failure.detail)  # the last one, after all others were answered
            raise ServerUnavailable(
                f"The server at {self.config.base_url} has answered no request for {out_seconds:.0f} s: "
                f"{failure.detail}. Start it, check `base_url`, and run again: finished requests are kept."
            )
        if out_seconds > _MIN_OUTAGE_SECONDS and not self._is_waiting:
            logger.warning(f"The server at {self.config.base_url} is unavailable ({failure.detail}). Waiting for it.")
            self._is_waiting = True

    def _wait_seconds(self, failure: Retryable, attempts: _Attempts) -> float:
        if failure.wait_seconds:  # the server knows best; a little more, so that not all come at once
            return min(failure.wait_seconds, self.config.max_backoff_seconds) * self._random.uniform(1, 1.1)
        if failure.reason == "no_structured_output":
            return 0
        doubled = self.config.backoff_seconds * 2 ** min(attempts.num_failed, 16) / 2
        return min(doubled, self.config.max_backoff_seconds) * self._random.uniform(0.5, 1)

    async def _check_length(self, request: _Request) -> None:
        limit, max_tokens = self.config.max_model_tokens, request.max_tokens
        if limit is None:
            return
        num_bytes = sum(len(message["content"].encode()) + _TOKENS_PER_MESSAGE for message in request.messages)
        if num_bytes + _TOKENS_PER_MESSAGE + max_tokens <= limit:
            return  # a token is at least a byte
        num_tokens = await asyncio.to_thread(self.count_tokens, request.messages)
        if num_tokens + max_tokens > limit:
            unit = "bytes (no `tokenizer` is set)" if self._counter is None else "tokens"
            raise RequestFailed("context_overflow", f"{num_tokens} {unit} + {max_tokens} tokens, of {limit}")

    # --- One attempt

    async def _send(self, request: _Request) -> Any:
        """One attempt: the JSON of its reply."""
        await self._pace.wait()
        structured = self._structured if request.schema is not None else "none"
        body = self._body(request, structured)
        sent_at = time.monotonic()
        self.stats.num_sent += 1
        self.stats.num_in_flight += 1
        try:
            # Without the library's models of request and reply, which take a third of its time and check nothing
            with anyio.fail_after(self.config.timeout_seconds):  # the library's own restarts with every byte
                reply = await self._client.post("/chat/completions", cast_to=object, body=body)
        except (openai.APITimeoutError, TimeoutError) as error:
            raise Retryable("timeout", f"no reply in {self.config.timeout_seconds:g} s") from error
        except openai.APIConnectionError as error:
            raise self._connection_error(error) from error
        except openai.APIStatusError as error:
            raise self._status_error(error, structured, sent_at) from error
        except (openai.OpenAIError, ValueError, RecursionError) as error:  # what is no JSON, or no text at all
            raise Retryable("malformed_reply", str(error)[:200]) from error
        finally:
            self.stats.num_in_flight -= 1
        self._answered()
        return reply

    async def _read(self, key: str, reply: Any) -> tuple[Completion, int, int]:
        """The reply, and the tokens of prompt and reply. A reply that cannot be used is kept as a failure."""
        try:
            parsed = parse_reply(reply, self.config.model)
        except (Retryable, RequestFailed) as failure:
            await self._cache.put_failure(key, failure.reason, encodable(failure.detail))
            raise
        self._has_replied = True
        self._slots.grow()
        return parsed

    def _body(self, request: _Request, structured: str) -> dict[str, Any]:
        body = {"messages": request.messages, self.config.max_tokens_key: request.max_tokens}
        for name in ("model", "temperature", "top_p", "seed"):
            value = getattr(self.config, name)
            if value is not None:
                body[name] = value + request.sample if name == "seed" else value
        body.update(self.config.extra_body)
        if structured == "json_schema":
            json_schema = {"name": "reply", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        elif structured == "vllm":
            body["structured_outputs"] = {"json": request.schema}
        return body

    # --- What an attempt says about the server

    def _answered(self) -> None:
        if self._is_waiting:
            logger.warning(f"The server at {self.config.base_url} is back.")
        self._is_waiting = False
        self._out_since = math.inf
        self._num_answered += 1

    def _unanswered(self) -> None:
        self._out_since = min(self._out_since, time.monotonic())

    def _connection_error(self, error: openai.APIConnectionError) -> Retryable:
        cause = error.__cause__
        detail = f"{type(cause).__name__}: {cause}"[:200]
        if type(cause).__name__ not in ("ConnectError", "ConnectTimeout"):
            return Retryable("connection_closed", detail)
        self._unanswered()
        return Retryable("outage", detail, is_unavailable=True)

    def _status_error(self, error: openai.APIStatusError, structured: str, sent_at: float) -> Exception:
        status, message = error.status_code, self._message(error)
        if status in UNAVAILABLE_STATUSES:
            self._unanswered()
        else:
            self._answered()
        if status == 401 or error.code == "insufficient_quota":
            return self._refused(status, message)
        failure = classify_status(error, message)
        if failure is not None:
            if failure.reason == "rate_limited":
                self._slots.halve(sent_at)
            return failure
        if status in (403, 404):
            return self._refused(status, message)
        if structured != "none" and self.config.structured_output == "auto" and is_schema_error(message):
            if self._structured != "none":
                logger.warning(
                    f"The server at {self.config.base_url} takes no JSON schema. The prompt alone asks for JSON."
                )
            self._structured = "none"
            return Retryable("no_structured_output", message)
        return self._bad_request(status, message)

    def _message(self, error: openai.APIStatusError) -> str:
        """What the server says, less the key, which some servers repeat."""
        key = os.environ.get(self.config.api_key_env)
        return (error.message.replace(key, "<key>") if key else error.message)[:500]

    def _refused(self, status: int, message: str) -> ServerRefused:
        is_set = "is set" if os.environ.get(self.config.api_key_env) else "is not set"
        return ServerRefused(
            f"The server at {self.config.base_url} refuses the model {self.config.model!r} with status {status}: "
            f"{message} It would refuse all requests. Check `base_url`, `model`, and the key: the environment "
            f"variable {self.config.api_key_env} {is_set}. Finished requests are kept."
        )

    def _bad_request(self, status: int, message: str) -> Exception:
        self._num_refused += 1
        if not self._has_replied and self._num_refused >= _MAX_REFUSED_AT_FIRST:
            return ServerRefused(
                f"The server at {self.config.base_url} refused the first {self._num_refused} requests, the last with "
                f"status {status}: {message} It is not a single request that is wrong. Check the options of the "
                "server in the configuration."
            )
        return RequestFailed("bad_request", f"status {status}: {message}")
