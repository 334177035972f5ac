"""Requests to an OpenAI-compatible server, such as vLLM: concurrent, retried, and each paid for once.

A reply is in the cache before anybody sees it, under a hash of the request. A run that is killed and started again
finds it there, and also how often a request has failed; only what was in flight when it died is paid for again. The
address of a server does not decide a reply and is not part of the hash. `outcomes.yaml` says what follows from what a
server does.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import openai

from .cache import RequestCache
from .config import ServerConfig
from .failures import (
    CONTENT_REASONS,
    OUTCOMES,
    UNAVAILABLE_STATUSES,
    Refusal,
    RequestFailed,
    Retryable,
    ServerRefused,
    ServerUnavailable,
    refusal_in_reply,
    refusal_of_status,
)
from .health import Streak, cut_prompt_error, tokens_at_least
from .replies import Completion, encodable, is_still_an_answer, parse_reply
from .slots import Pace, Slots
from .tokens import load_token_counter


logger = logging.getLogger(__name__)

Message = dict[str, str]

# A chat template adds fewer tokens than these
_TOKENS_PER_MESSAGE = 16
# A shorter outage is not worth a line in the log
_MIN_OUTAGE_SECONDS = 5
# Requests in flight until a reply could be used: what a wrong setting may cost
_FIRST_CONCURRENCY = 16
# A request that any server takes: where it is refused too, it is not a single request that is wrong
_PLAIN_MESSAGES = [{"role": "user", "content": "Reply with the word: yes"}]
# Failures that end with the process which saw them, if it saw the last
_TRANSIENT_REASONS = ("server_error", "timeout", "connection_closed")
# Fewer characters than these to a token are no sign of a prompt that was cut
_USUAL_CHARS_PER_TOKEN = 5


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
        self._slots = Slots(config.max_concurrency, _FIRST_CONCURRENCY)
        self._pace = Pace(60 / config.requests_per_minute if config.requests_per_minute else 0)
        self._counter = None if config.tokenizer is None else load_token_counter(config.tokenizer)
        self._in_flight: dict[str, asyncio.Task[Completion]] = {}
        self._structured = "json_schema" if config.structured_output == "auto" else config.structured_output
        self._streak = Streak(cache.failures_since_last_reply(CONTENT_REASONS))
        self._refusal: ServerRefused | None = None  # of all requests
        self._probe_lock = asyncio.Lock()
        self._probed_at = -math.inf  # when a plain request was sent that was not refused
        self._random = random.Random()
        self._num_answered = 0
        self._out_since = math.inf  # start of the time in which no request is answered
        self._is_waiting = False
        self._has_warned = False

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
        self,
        messages: list[Message],
        *,
        max_tokens: int,
        schema: dict[str, Any] | None = None,
        sample: int = 0,
        is_usable: Callable[[str], bool] | None = None,
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
            is_usable (`Callable[[str], bool]`, *optional*):
                Whether the caller can use a text. It is returned all the same; but a server none of whose replies can
                be used is noticed early.

        Raises:
            RequestFailed: If this request gave nothing, after retries.
            ServerRefused: If all requests would fail, or the server stays unavailable ([`ServerUnavailable`]).
        """
        structured = None if schema is None else self.config.structured_output
        identity = [self.config.generation, messages, max_tokens, schema, structured, sample]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        cached = self._cache.get(key)
        if cached is not None and is_still_an_answer(cached):
            self.stats.num_cached += 1
            completion = cached
        else:
            if key not in self._in_flight:
                messages = [{name: encodable(text) for name, text in message.items()} for message in messages]
                task = asyncio.ensure_future(self._fetch(_Request(key, messages, max_tokens, schema, sample)))
                task.add_done_callback(lambda task: self._forget(key, task))
                self._in_flight[key] = task
            # Shielded: others may wait for the same request when this call is cancelled
            completion = await asyncio.shield(self._in_flight[key])
        if is_usable is None or is_usable(completion.text):
            self._streak.good()
            self._slots.open()
        else:
            self._streak.bad(key, "unusable text", is_paid=True)
            self._raise_if_hopeless(completion.text[-200:], only_paid=True)
        return completion

    def _forget(self, key: str, task: asyncio.Task[Completion]) -> None:
        del self._in_flight[key]
        if not task.cancelled():
            task.exception()  # seen, so that asyncio does not complain where all that waited were cancelled

    # --- Attempts of one request

    async def _fetch(self, request: _Request) -> Completion:
        await self._check_length(request)
        attempts = _Attempts(self._num_answered)
        for reason, detail in self._cache.failures(request.key):  # of a run that was killed
            if OUTCOMES[reason].then == "skip":
                raise RequestFailed(reason, detail)
            self._raise_if_exhausted(Retryable(reason, detail), attempts)
        while True:
            async with self._slots:
                if self._refusal is not None:
                    raise self._refusal
                try:
                    return await self._attempt(request)
                except Retryable as failure:
                    if self._refusal is not None:
                        raise self._refusal from failure
                    self.stats.retries[failure.reason] += 1
                    await self._note(request.key, failure)
                    self._end_if_exhausted(request.key, failure, attempts)
                    wait_seconds = self._wait_seconds(failure, attempts)
                    if failure.reason == "rate_limited":  # the limit applies to all requests
                        self._slots.pause(wait_seconds)
                        wait_seconds = 0
                except ServerRefused as error:
                    if not isinstance(error, ServerUnavailable):
                        self._refusal = error
                    raise
            await asyncio.sleep(wait_seconds)  # one that waits to be sent again blocks no other

    async def _attempt(self, request: _Request) -> Completion:
        """One attempt. What it gives is in the cache when this returns."""
        reply = await self._send(request)
        try:
            completion, *usage = parse_reply(reply, self.config.model)
        except RequestFailed as failure:
            await self._note(request.key, failure)
            raise
        await self._check_prompt_was_read(request, usage[0])
        await self._cache.put(request.key, completion, *usage)
        self._slots.grow()
        return completion

    async def _note(self, key: str, failure: Retryable | RequestFailed) -> None:
        """Keeps a failure that may be the request's own."""
        is_waiting = isinstance(failure, Retryable) and failure.is_unavailable
        if is_waiting or failure.reason not in OUTCOMES:
            return
        await self._cache.put_failure(key, failure.reason, encodable(failure.detail))
        is_paid = failure.reason not in _TRANSIENT_REASONS
        self._streak.bad(key, failure.reason, is_paid)
        if failure.reason == "reasoning_only" and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"The server at {self.config.base_url} sent reasoning and no answer that can be told from it: "
                f"{failure.detail} If all replies are so, its reasoning parser is that of another model, or none."
            )
        if is_paid:
            self._raise_if_hopeless(str(failure), only_paid=True)

    def _end_if_exhausted(self, key: str, failure: Retryable, attempts: _Attempts) -> None:
        try:
            self._raise_if_exhausted(failure, attempts)
        except RequestFailed as error:
            self._raise_if_hopeless(str(error), only_paid=False)
            self._cache.forget_requests([key], _TRANSIENT_REASONS)  # whoever asks again begins anew
            raise

    def _raise_if_hopeless(self, detail: str, only_paid: bool) -> None:
        """Ends the run when no reply has been usable for long. What failed meanwhile is sent again by the next."""
        error = self._streak.error(self.config.base_url, detail, only_paid)
        if error is not None:
            self._cache.forget_requests(self._streak.keys, (*CONTENT_REASONS, *_TRANSIENT_REASONS, "refused_content"))
            self._cache.forget_replies(self._streak.keys)
            self._streak = Streak()
            if not isinstance(error, ServerUnavailable):
                self._refusal = error
            raise error

    async def _check_prompt_was_read(self, request: _Request, num_read: int) -> None:
        """Ends the run if a server has cut the prompt in silence."""
        text = "\n".join(message["content"] for message in request.messages)
        if num_read <= 0 or len(text) < num_read * _USUAL_CHARS_PER_TOKEN:
            return
        count = tokens_at_least if self._counter is None else self._counter.count
        num_sent = await asyncio.to_thread(count, text)
        error = cut_prompt_error(self.config.base_url, num_read, num_sent, self._counter is not None)
        if error is not None:
            raise error

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
        if failure.reason in OUTCOMES and isinstance(retries := OUTCOMES[failure.reason].retries, int):
            limit = min(limit, retries)
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
            if len(self._in_flight) == 1 and self._streak.has_good and failure.reason != "outage":
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
        sent_at = time.monotonic()
        self.stats.num_sent += 1
        self.stats.num_in_flight += 1
        try:
            reply = await self._post(self._body(request, structured))
        except Refusal as refusal:
            raise await self._meaning(refusal, request, structured, sent_at) from refusal
        finally:
            self.stats.num_in_flight -= 1
        self._answered()
        return reply

    async def _post(self, body: dict[str, Any]) -> Any:
        """The JSON of a reply. Raises [`Refusal`] for what the server says instead, and [`Retryable`]."""
        try:
            # Without the library's models of request and reply, which take a third of its time and check nothing
            with anyio.fail_after(self.config.timeout_seconds):  # the library's own restarts with every byte
                reply = await self._client.post("/chat/completions", cast_to=object, body=body)
        except (openai.APITimeoutError, TimeoutError) as error:
            raise Retryable("timeout", f"no reply in {self.config.timeout_seconds:g} s") from error
        except openai.APIConnectionError as error:
            raise self._connection_error(error) from error
        except openai.APIStatusError as error:
            raise self._without_key(refusal_of_status(error)) from error
        except (openai.OpenAIError, ValueError, RecursionError) as error:  # what is no JSON, or no text at all
            raise Retryable("malformed_reply", str(error)[:200]) from error
        refusal = refusal_in_reply(reply)
        if refusal is not None:
            raise self._without_key(refusal)
        return reply

    async def _is_refused_alike(self, request: _Request, structured: str) -> bool:
        """Whether a plain request with the same parameters is refused too. Those that ask together send one."""
        asked_at = time.monotonic()
        async with self._probe_lock:
            if self._probed_at > asked_at:
                return False
            if self._refusal is not None:
                return True
            sent_at = time.monotonic()
            plain = _Request("", _PLAIN_MESSAGES, request.max_tokens, request.schema, 0)
            self.stats.num_sent += 1
            try:
                await self._post(self._body(plain, structured))
            except Refusal as refusal:
                failure = refusal.as_failure()
                if isinstance(failure, Retryable):
                    raise failure from refusal
                return True
            self._probed_at = sent_at
            return False

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

    async def _meaning(self, refusal: Refusal, request: _Request, structured: str, sent_at: float) -> Exception:
        """What follows from a refusal."""
        if refusal.status in UNAVAILABLE_STATUSES:
            self._unanswered()
        else:
            self._answered()
        if refusal.is_unpaid or refusal.status == 401:
            return self._refused(refusal)
        failure = refusal.as_failure()
        if isinstance(failure, Retryable):
            if failure.reason == "rate_limited":
                self._slots.halve(sent_at)
            return failure
        if structured != "none" and self.config.structured_output == "auto" and refusal.is_about_schema:
            if self._structured != "none":
                logger.warning(
                    f"The server at {self.config.base_url} takes no JSON schema. The prompt alone asks for JSON."
                )
            self._structured = "none"
            return Retryable("no_structured_output", refusal.message)
        if failure is not None and self._streak.has_good:
            return failure
        try:
            is_refused_alike = await self._is_refused_alike(request, structured)
        except Retryable as unknown:
            return unknown
        if is_refused_alike:
            return self._refusal or self._refused(refusal)
        return failure or RequestFailed("bad_request", str(refusal))

    def _without_key(self, refusal: Refusal) -> Refusal:
        """What the server says, less the key, which some servers repeat."""
        key = os.environ.get(self.config.api_key_env)
        if key:
            refusal.message = refusal.message.replace(key, "<key>")
        return refusal

    def _refused(self, refusal: Refusal) -> ServerRefused:
        is_set = "is set" if os.environ.get(self.config.api_key_env) else "is not set"
        key = f"the key: the environment variable {self.config.api_key_env} {is_set}"
        what_to_do = (
            f"The money or the quota is used up. Add some, or look at {key}."
            if refusal.is_unpaid
            else "Check `base_url`, `model`, the parameters (`extra_body`, `temperature`, `max_tokens_key`, "
            f"`structured_output`, the longest reply), and {key}."
        )
        return ServerRefused(
            f"The server at {self.config.base_url} refuses the model {self.config.model!r} with status "
            f"{refusal.status}: {refusal.message} It would refuse all requests. {what_to_do} Then run again: finished "
            "requests are kept, and this one is sent again."
        )
