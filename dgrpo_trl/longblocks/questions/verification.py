"""What is checked about a row before it stays. Each check leaves its score and its reason in the column `checks`.

| check | asks | score | reason of a drop |
| --- | --- | --- | --- |
| `evidence_span` | do the offsets select the blocks? | 1 or 0 | `bad_evidence` |
| `answer_not_in_question` | is the answer more than a copy? | 1 or 0 | `answer_in_question` |
| `language` | is the question in the language of the row? | confidence | `wrong_language` |
| `grounded` | does the answer follow from the evidence alone? | share of samples that agree | `not_grounded` |
| `not_closed_book` | does the model fail without any text? | share that does not agree | `closed_book` |
| `needs_hops` | does it fail with one block removed? | share of removals that break it | `hop_not_needed` |
| `not_answerable` | does the document really not say it? | share of samples that say so | `answerable` |
| `judge` | does another model accept the row? | 1 or 0 | `judge_rejected`, `no_verdict` |

The first three need no model. `not_answerable` takes the place of `grounded`, `not_closed_book` and `needs_hops` for
questions that the document does not answer. A request that fails makes its check fail, and the row leaves as
`verification_<reason>`, with the reasons of [`llm.failures`]: a text that does not fit as
`verification_context_overflow`. So it does as `verification_no_verdict` where a judge compares answers and never says
whether they are the same.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from ...llm import ChatClient, RequestFailed, parse_verdict, quote
from ...strict_model import StrictModel
from ..identification import Identify, other_language
from ..records import UNANSWERABLE, Check, Drop, Row
from .agreement import answers_agree, gives_away, words_of
from .languages import PROMPTS


STAGE = "verification"


class VerificationConfig(StrictModel):
    """Section `verification`: which checks are made, and how strictly."""

    answerer: str | None = Field(None, description="Name of the model among `servers` that answers in the checks.")
    judge: str | None = Field(None, description="Name of the model among `servers` that judges; of another family.")
    answer_not_in_question: bool = Field(True, description="Whether to make this check.")
    language: bool = Field(True, description="Whether to make this check, and to ask writers again for it.")
    grounded: bool = Field(False, description="Whether to make this check; needs `answerer`.")
    not_closed_book: bool = Field(False, description="Whether to make this check; needs `answerer`.")
    needs_hops: bool = Field(False, description="Whether to make this check; needs `answerer`.")
    not_answerable: bool = Field(False, description="Whether to make this check; needs `answerer`.")
    judged: bool = Field(False, description="Whether to let the `judge` decide.")
    num_samples: int = Field(1, ge=1, description="Answers drawn in a check.")
    min_agreement: float = Field(0.5, gt=0, le=1, description="Share of answers that have to agree with the evidence.")
    max_closed_book: float = Field(0.0, ge=0, lt=1, description="Share of answers that may be right without any text.")
    min_broken_hops: float = Field(1.0, ge=0, le=1, description="Share of removals that have to break the answer.")
    max_removals: int = Field(4, ge=1, description="Blocks removed, one at a time; the first ones of the evidence.")
    hop_tasks: tuple[str, ...] = Field(
        ("multi_hop", "aggregation", "comparison"), description="Tasks whose evidence blocks are all needed."
    )
    agreement: Literal["rule", "judge"] = Field("rule", description="Who compares answers: a rule, or the `judge`.")
    min_f1: float = Field(0.5, gt=0, le=1, description="Shared words from which long answers agree, by the rule.")
    num_verdicts: int = Field(3, ge=1, description="Times that a judge is asked until it gives a verdict in its form.")
    stop_at_first_failure: bool = Field(True, description="Whether checks end at the first that fails.")
    max_tokens: int = Field(4096, ge=1, description="Longest reply, in tokens, reasoning included.")

    @model_validator(mode="after")
    def _check_servers(self) -> "VerificationConfig":
        asked = [
            name for name in ("grounded", "not_closed_book", "needs_hops", "not_answerable") if getattr(self, name)
        ]
        if asked and self.answerer is None:
            raise ValueError(f"{asked} ask a model, and `answerer` is not given. Name one of `servers`.")
        if (self.judged or (asked and self.agreement == "judge")) and self.judge is None:
            raise ValueError("A judge is to decide, and `judge` is not given. Name one of `servers`.")
        return self


class Verifier:
    """Checks rows, one at a time."""

    def __init__(
        self,
        config: VerificationConfig,
        answerer: ChatClient | None,
        judge: ChatClient | None,
        identify: Identify,
    ):
        self.config = config
        self.answerer, self.judge, self.identify = answerer, judge, identify

    async def check(self, row: Row, document_text: str) -> tuple[Row, Drop | None]:
        """The row with its checks; and, if it must leave, why. Its offsets count in `document_text`."""
        evidence = [document_text[e.start : e.end] for e in row.evidence]
        first_reason: str | None = None
        for name, make in self._checks(row).items():
            try:
                check, reason = await make(row, document_text, evidence)
            except RequestFailed as error:
                check, reason = Check(name, False, 0.0, str(error)), f"verification_{error.reason}"
            row = replace(row, checks=(*row.checks, check))
            if not check.passed:
                first_reason = first_reason or reason
                # Without its evidence, nothing else can be said about a row
                if self.config.stop_at_first_failure or name == "evidence_span":
                    break
        return row, None if first_reason is None else self._drop(row, first_reason)

    def _checks(self, row: Row) -> dict[str, Callable[..., Awaitable[tuple[Check, str]]]]:
        """The checks of a row by name, those that cost nothing first."""
        config, is_unanswerable = self.config, row.task == UNANSWERABLE
        has_hops = row.task in config.hop_tasks and len(row.evidence) > 1
        checks = {
            "evidence_span": (True, self._evidence_span),
            "answer_not_in_question": (
                config.answer_not_in_question and not is_unanswerable,
                self._answer_not_in_question,
            ),
            "language": (config.language, self._language),
            "not_answerable": (config.not_answerable and is_unanswerable, self._not_answerable),
            "grounded": (config.grounded and not is_unanswerable, self._grounded),
            "not_closed_book": (config.not_closed_book and not is_unanswerable, self._not_closed_book),
            "needs_hops": (config.needs_hops and not is_unanswerable and has_hops, self._needs_hops),
            "judge": (config.judged, self._judged),
        }
        return {name: make for name, (is_made, make) in checks.items() if is_made}

    def _drop(self, row: Row, reason: str) -> Drop:
        content = {"question": row.question, "answer": row.answer, "checks": [vars(check) for check in row.checks]}
        return Drop(STAGE, row.source, row.id, reason, json.dumps(content, ensure_ascii=False))

    # --- Checks without a model

    async def _evidence_span(self, row: Row, text: str, evidence: list[str]) -> tuple[Check, str]:
        spans = zip(row.evidence, evidence, strict=True)
        bad = [e.block for e, quoted in spans if not (0 <= e.start < e.end <= len(text) and quoted.strip())]
        reason = f"block {bad[0]} selects no text" if bad else "every block selects text"
        if not row.evidence and row.task != UNANSWERABLE:
            bad, reason = ["none"], "there is no evidence"
        return Check("evidence_span", not bad, float(not bad), reason), "bad_evidence"

    async def _answer_not_in_question(self, row: Row, text: str, evidence: list[str]) -> tuple[Check, str]:
        # Of two things compared, both stand in the question
        is_copied = row.task != "comparison" and gives_away(row.question, row.answer, row.language)
        reason = "the question holds the answer" if is_copied else "the question does not hold the answer"
        return Check("answer_not_in_question", not is_copied, float(not is_copied), reason), "answer_in_question"

    async def _language(self, row: Row, text: str, evidence: list[str]) -> tuple[Check, str]:
        texts = {"question": row.question, "answer": row.answer}
        if row.task == UNANSWERABLE:
            del texts["answer"]  # a set phrase, which is English where there is none in the language
        found = other_language(texts, row.language, self.identify)
        if found is not None:
            reason, confidence = found
            return Check("language", False, 1 - confidence, reason), "wrong_language"
        return Check("language", True, 1.0, f"nothing is in another language than {row.language}"), ""

    # --- Checks with a model

    async def _grounded(self, row: Row, text: str, evidence: list[str]) -> tuple[Check, str]:
        share = await self._agreement(row, evidence)
        reason = f"{share:.0%} of the answers from the evidence alone agree"
        return Check("grounded", share >= self.config.min_agreement, share, reason), "not_grounded"

    async def _not_closed_book(self, row: Row, text: str, evidence: list[str]) -> tuple[Check, str]:
        share = await self._agreement(row, [])
        reason = f"{share:.0%} of the answers without any text agree"
        return Check("not_closed_book", share <= self.config.max_closed_book, 1 - share, reason), "closed_book"

    async def _needs_hops(self, row: Row, text: str, evidence: list[str]) -> tuple[Check, str]:
        removals = [evidence[:i] + evidence[i + 1 :] for i in range(min(len(evidence), self.config.max_removals))]
        answered = await _gather(self._is_answered(row, rest) for rest in removals)
        broken = answered.count(False) / len(answered)
        reason = f"{broken:.0%} of the removals of a block break the answer"
        return Check("needs_hops", broken >= self.config.min_broken_hops, broken, reason), "hop_not_needed"

    async def _not_answerable(self, row: Row, text: str, evidence: list[str]) -> tuple[Check, str]:
        share = await self._agreement(row, [text])
        reason = f"{share:.0%} of the answers from the whole document say that it does not tell"
        return Check("not_answerable", share >= self.config.min_agreement, share, reason), "answerable"

    async def _judged(self, row: Row, text: str, evidence: list[str]) -> tuple[Check, str]:
        shows_evidence = bool(evidence)
        prompt = PROMPTS["judge"].format(
            seen="the excerpt that the answer rests on" if shows_evidence else "no excerpt of it",
            by_evidence=", and the excerpt proves it" if shows_evidence else ", as far as can be told",
            context=quote("\n\n".join(evidence), "excerpt"),
            question=quote(row.question, "question"),
            answer=quote(row.answer, "answer"),
        )
        verdict = await self._verdict(prompt, "ACCEPT", "REJECT")
        if verdict is None:
            return Check("judge", False, 0.0, "no verdict in the agreed form"), "no_verdict"
        return Check("judge", verdict, float(verdict), "accepted" if verdict else "rejected"), "judge_rejected"

    async def _agreement(self, row: Row, texts: list[str]) -> float:
        """Share of the answers from these texts that agree with the reference."""
        agree = await _gather(self._draw(row, texts, sample) for sample in range(self.config.num_samples))
        return sum(agree) / len(agree)

    async def _is_answered(self, row: Row, texts: list[str]) -> bool:
        """Whether enough answers from these texts agree with the reference. Draws no more than it takes to know."""
        num_left = self.config.num_samples
        num_needed = next(n for n in range(1, num_left + 1) if n / num_left >= self.config.min_agreement)
        while 0 < num_needed <= num_left:
            # The fewest draws that can decide, if they all come out the same
            size, first = min(num_needed, num_left - num_needed + 1), self.config.num_samples - num_left
            agree = await _gather(self._draw(row, texts, sample) for sample in range(first, first + size))
            num_needed, num_left = num_needed - sum(agree), num_left - size
        return num_needed == 0

    async def _draw(self, row: Row, texts: list[str], sample: int) -> bool:
        unknown = row.answer if row.task == UNANSWERABLE else "UNKNOWN"
        context = quote("\n\n".join(texts), "text") + "\n\n" if texts else ""
        prompt = PROMPTS["answer"].format(context=context, question=quote(row.question, "question"), unknown=unknown)
        reply = await self._ask(self.answerer, prompt, sample)
        if row.task != UNANSWERABLE and words_of(reply) == words_of(unknown):
            return False
        return await self._agrees(row, reply)

    async def _agrees(self, row: Row, reply: str) -> bool:
        # No judge for what is the same words, nor for the phrase that says that there is no answer
        if self.config.agreement == "rule" or row.task == UNANSWERABLE or words_of(row.answer) == words_of(reply):
            return answers_agree(row.answer, reply, self.config.min_f1)
        prompt = PROMPTS["same"].format(
            question=quote(row.question, "question"),
            reference=quote(row.answer, "answer-1"),
            reply=quote(reply, "answer-2"),
        )
        verdict = await self._verdict(prompt, "SAME", "DIFFERENT")
        if verdict is None:  # taken as DIFFERENT, it would let a row through that is known without any text
            raise RequestFailed("no_verdict", f"whether {reply[:200]!r} is the answer")
        return verdict

    async def _verdict(self, prompt: str, accept: str, reject: str) -> bool | None:
        """The judge's verdict; `None` if it never gave one in the agreed form."""

        def is_verdict(text: str) -> bool:
            with suppress(ValueError):
                parse_verdict(text, accept, reject)
                return True
            return False

        for sample in range(self.config.num_verdicts):
            reply = await self._ask(self.judge, prompt, sample, is_verdict)
            if is_verdict(reply):
                return parse_verdict(reply, accept, reject)
        return None

    async def _ask(
        self, client: ChatClient | None, prompt: str, sample: int, is_usable: Callable[[str], bool] | None = None
    ) -> str:
        assert client is not None  # the configuration names one where a check asks it
        messages = [{"role": "user", "content": prompt}]
        completion = await client.complete(
            messages, max_tokens=self.config.max_tokens, sample=sample, is_usable=is_usable
        )
        return completion.text


async def _gather(draws: Iterable[Awaitable[Any]]) -> list[Any]:
    """The results of all. Of several failures, the first in their order is raised, whichever was the first in time."""
    results = await asyncio.gather(*draws, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, RequestFailed))  # what ends the run goes before
    return results
