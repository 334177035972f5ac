"""The LLM judge: a reward for open answers, on which rules fail."""

import asyncio
import logging
import os
import re
import unicodedata
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import read_table
from ..llm import (
    ChatClient,
    RequestFailed,
    ServerConfig,
    ServerUnavailable,
    load_token_counter,
    parse_verdict,
    quote,
)
from ..text import WELL_KNOWN_SPECIAL_TOKENS, break_special_tokens
from .extraction import TextOrMessages, last_message_text
from .rules import References, accepted_references, check_lengths, extracted_answers
from .text import answer_tokens
from .verdict_cache import open_cache


# The standard library's logger, not accelerate's: rewards also run where no accelerate state exists
logger = logging.getLogger(__name__)

_PROMPT: str = read_table(__package__, "judge.yaml")["prompt"]
# Where this differs from `ServerConfig`: a training step should not wait as long as a build
_SERVER_DEFAULTS: dict[str, Any] = {
    "temperature": 0.0,
    "max_concurrency": 32,
    "max_retries": 4,
    "timeout_seconds": 60.0,
    "max_backoff_seconds": 30.0,
    "max_outage_seconds": 60.0,
}
# Draws until a reply ends with a verdict; one at temperature 0, where the next would be the same
_MAX_DRAWS = 3

# A verdict as models write it: bold, quoted, with a full stop, in small letters
_MARKS = r"[\s*_`\"'“”„«».!。()\[\]>#~-]*"
_VERDICT = re.compile(rf"{_MARKS}verdict{_MARKS}:{_MARKS}(correct|incorrect){_MARKS}", re.I)
_FENCE = re.compile(r"\s*(?:```|~~~)\s*\w*\s*")
_MAX_VERDICT_CHARS = 100
_CUT_REASONS = {"truncated", "reasoning_only"}
# The form of most control tokens, for a judge whose tokenizer is not known
_CONTROL_TOKEN = re.compile(r"<(?=[|\uff5c][^<>|\uff5c\n]{1,60}[|\uff5c]>)|\[(?=/?[A-Z][A-Z_]{2,30}\])|<(?=</?SYS>>)")


class LLMJudgeReward:
    r"""Reward 1 when a model at an OpenAI-compatible server finds the extracted answer equivalent to the reference.

    An instance is an asynchronous reward function: TRL awaits it beside other asynchronous ones. The judge sees the
    question, the references and the extracted answer, not the reasoning, and none of these can spell a control token
    of its chat template. Its reply counts only if its last line is `VERDICT: CORRECT` or `VERDICT: INCORRECT`, also
    in bold, in a fence or with a full stop, and no other line is a verdict. [`~llm.ChatClient`] sends the requests: it
    retries what may succeed, sends equal rows once, and keeps all replies.

    A model other than the trained one and its teacher should judge, and it should be checked against people first.

    The longest that one row can take is `(max_retries + 1) * timeout_seconds` plus the waits, and rows go through
    `max_concurrency` at a time. A server that is unavailable is waited for during `max_outage_seconds`; after that,
    rows fail at once until it answers again. Keep both under the timeout of the process group.

    Args:
        model (`str`), base_url (`str`, *optional*):
            Name of the judge at the server, and root of its API, e.g. `http://localhost:8000/v1`. Defaults to the
            environment variable `OPENAI_BASE_URL`, then to OpenAI's.
        max_tokens (`int`, *optional*, defaults to `1024`):
            Longest reply of the judge, its reasoning included.
        max_answer_chars (`int`, *optional*, defaults to `4000`):
            Longer answers score 0 without a request, since copying the document is not answering.
        max_question_chars (`int`, *optional*, defaults to `8000`):
            Of a longer question, the judge sees the end, where the question stands when it comes after a document.
        cache_path (`str`, *optional*):
            SQLite file of the judge's replies, which the ranks of one host may share; give each host its own. By
            default replies are kept in memory. A damaged file is renamed, with a warning, and made anew.
        **server (`Any`):
            More fields of [`~llm.ServerConfig`]: `tokenizer`, the judge's, whose control tokens are broken up beside
            those that are well known; `api_key_env`, the name of the variable that holds the key (the key
            itself is not kept in the instance), `max_retries`, `temperature`, ... The defaults here are temperature 0,
            32 requests in flight per process (each rank judges its own rows), 4 retries, 60 seconds for a reply, 30
            for a wait, and 60 for an outage.

    Raises:
        ValueError: if an argument is out of range or unknown, if there is neither a `base_url` nor a key, or if the
            file at `cache_path` is no cache.

    Example:
    ```python
    >>> judge = LLMJudgeReward("Qwen/Qwen3-32B", base_url="http://localhost:8000/v1", cache_path="verdicts.sqlite")
    ```
    """

    __name__ = "llm_judge_reward"  # the name of its metrics in TRL, which otherwise takes the class name

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        max_tokens: int = 1024,
        max_answer_chars: int = 4_000,
        max_question_chars: int = 8_000,
        cache_path: str | os.PathLike[str] | None = None,
        **server: Any,
    ):
        self.max_tokens = max_tokens
        self.max_answer_chars = max_answer_chars
        self.max_question_chars = max_question_chars
        for name in ("max_tokens", "max_answer_chars", "max_question_chars"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}. Nothing could be judged. Raise it.")
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        url = base_url or "https://api.openai.com/v1"
        self.server = ServerConfig(model=model, base_url=url, **_SERVER_DEFAULTS | server)
        if base_url is None and not os.environ.get(self.server.api_key_env):
            raise ValueError(
                f"The environment variable `{self.server.api_key_env}` is not set and `base_url` is None. OpenAI's "
                "server needs a key. Export the variable, or set `base_url` to your own server."
            )
        self.cache_path = None if cache_path is None else Path(cache_path)
        open_cache(self.cache_path).close()  # now, and not in the first step
        own = None if self.server.tokenizer is None else load_token_counter(self.server.tokenizer).special_tokens
        self.special_tokens = frozenset({*WELL_KNOWN_SPECIAL_TOKENS, *(own or ())})
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ChatClient] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # TRL pickles rewards for its asynchronous trainer; clients belong to this process
        return {name: value for name, value in self.__dict__.items() if name != "_clients"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _clients=weakref.WeakKeyDictionary())

    async def __call__(
        self,
        prompts: list[TextOrMessages],
        completions: list[TextOrMessages],
        answer: list[References],
        question: list[str] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """Judge one batch.

        Args:
            prompts (`list[str]` or `list[list[dict]]`):
                Prompts. Their last user message is the question where the column `question` is missing.
            completions, answer, **kwargs:
                As for [`exact_match_reward`].
            question (`list[str]`, *optional*):
                Question of each completion. Give it when prompts hold a long document.
            log_metric (`Callable`, *optional*):
                The trainer's. Receives `judge/failed`: share of the rows that got no verdict, in [0, 1].

        Returns:
            `list[float | None]`: 0.0 or 1.0; `None` where the reference is missing, or there was no verdict after all
            retries.

        Raises:
            RuntimeError: if the server refuses the key, the model or the form of the requests, or if the cache cannot
                be written.
        """
        check_lengths(completions, answer)
        candidates = extracted_answers(completions, prompts)
        references = [accepted_references(entry) for entry in answer]
        rows = zip(_questions(prompts, question), candidates, references, strict=True)
        client = self._client()
        outcomes = await asyncio.gather(*(self._judge(client, *row) for row in rows), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, RequestFailed | ServerUnavailable)]
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and outcome not in failures:
                raise outcome  # all rows would fail
        if failures:
            self._warn(failures, len(outcomes))
        if log_metric is not None:
            log_metric("judge/failed", len(failures) / max(1, len(outcomes)))
        return [None if isinstance(outcome, BaseException) else outcome for outcome in outcomes]

    async def aclose(self) -> None:
        """Close the connections of the running loop. Not needed in a trainer, whose loop ends with the process."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def _client(self) -> ChatClient:
        """The client of the running loop: the trainer's runs in another thread than the one that builds the reward."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = ChatClient(self.server, open_cache(self.cache_path))
        return self._clients[loop]

    async def _judge(self, client: ChatClient, question: str, candidate: str, references: list[str]) -> float | None:
        """Reward of one row. Raises the failure when the judge gave no verdict."""
        if not references:
            return None
        if not answer_tokens(candidate) or len(candidate) > self.max_answer_chars:
            return 0.0
        prompt = _PROMPT.format(
            question=self._quote(question[-self.max_question_chars :], "question"),
            references="\n".join(self._quote(reference, "reference") for reference in references),
            candidate=self._quote(candidate, "candidate"),
        )
        messages = [{"role": "user", "content": prompt}]
        for sample in range(1 if self.server.temperature == 0 else _MAX_DRAWS):
            reply = await client.complete(messages, max_tokens=self.max_tokens, sample=sample)
            with suppress(ValueError):
                return float(parse_verdict(_plain_verdicts(reply.text), "CORRECT", "INCORRECT"))
        raise RequestFailed(
            "no_verdict", f"the last reply (finish_reason {reply.finish_reason!r}) ends with {reply.text[-80:]!r}"
        )

    def _quote(self, text: str, name: str) -> str:
        """Text of others as part of the prompt: it can spell neither its end nor a control token of the judge."""
        text = _CONTROL_TOKEN.sub(lambda match: f"{match[0]}\u200b", break_special_tokens(text, self.special_tokens))
        return quote(text, name)

    def _warn(self, failures: list[RequestFailed | ServerUnavailable], num_rows: int) -> None:
        counts = Counter(getattr(failure, "reason", "unavailable") for failure in failures)
        reasons = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())
        logger.warning(
            f"{len(failures)} of {num_rows} answers got no verdict from the judge {self.server.model!r} at "
            f"{self.server.base_url} ({reasons}). Their reward is None. The last failure: {failures[-1]}"
            f"{self._advice(counts)}"
        )

    def _advice(self, counts: Counter[str]) -> str:
        """What to set when replies were cut off."""
        if not counts.keys() & _CUT_REASONS:
            return ""
        return (
            f". Replies were cut off, or ended within their reasoning: raise `max_tokens` (now {self.max_tokens}), "
            "raise the context of the server, or switch the judge's thinking off with "
            '`extra_body={"chat_template_kwargs": {"enable_thinking": False}}`.'
        )


def _plain_verdicts(text: str) -> str:
    """A reply without fences, and with its verdicts in the form that was asked for."""
    lines = []
    for line in text.splitlines():
        if _FENCE.fullmatch(line):
            continue
        match = _VERDICT.fullmatch(unicodedata.normalize("NFKC", line)) if len(line) <= _MAX_VERDICT_CHARS else None
        lines.append(f"VERDICT: {match[1].upper()}" if match else line)
    return "\n".join(lines)


def _questions(prompts: list[TextOrMessages], question: list[str] | None) -> list[str]:
    """The question of each row: of its column, or else the last user message of its prompt."""
    if question is not None and len(question) != len(prompts):
        raise ValueError(
            f"`question` has {len(question)} entries but `prompts` has {len(prompts)}. Each row has one question. "
            "Pass the dataset column `question`, or leave it out."
        )
    texts = [prompt if isinstance(prompt, str) else last_message_text(prompt, role="user") for prompt in prompts]
    return texts if question is None else [own or text for own, text in zip(question, texts, strict=True)]
