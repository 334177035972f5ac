"""The `llm` engine: a model writes questions on the blocks of a document, in the document's language.

Each question is one request. It shows some blocks, related ones that lie far apart where the task needs several, and
asks for a question, its answer, and the blocks that the answer rests on. A reply without one of these, or refused, is
drawn again; the last draw's reason counts. A new task is an entry of `llm_tasks.yaml`.
"""

import asyncio
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, field_validator

from ...files import read_table
from ...llm import ChatClient, RequestFailed, parse_object, quote
from ...strict_model import StrictModel
from ..identification import Identify, other_language
from ..records import UNANSWERABLE, Document, Drop, Evidence, Row
from .blocks import Block
from .languages import PROMPTS, language_name, not_stated, or_say_not_stated
from .rule_engine import checked_weights


STAGE = "questions"

# From a reason and a detail
MakeDrop = Callable[..., Drop]


@dataclass(frozen=True)
class LLMTask:
    """A kind of question."""

    weight: float  # share of the questions on text, where the configuration does not say
    instruction: str  # what the writer is to do
    min_evidence_blocks: int = 1  # that an answer rests on
    is_for_code: bool = False  # whether it is asked of code too


LLM_TASKS = {name: LLMTask(**values) for name, values in read_table(__package__, "llm_tasks.yaml").items()}
_SCHEMA = {
    "type": "object",
    "properties": {
        "question": {"type": "string"},
        "answer": {"type": "string"},
        "evidence": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["question", "answer", "evidence"],
    "additionalProperties": False,
}
_MAX_QUESTION_CHARS = 2000
_MAX_ANSWER_CHARS = 8000


class LLMEngineConfig(StrictModel):
    """Section `questions` with a language model as the writer."""

    engine: Literal["llm"]
    server: str = Field(description="Name of the writer among `servers`.")
    questions_per_document: int = Field(2, ge=1, description="Questions asked of the writer for each document.")
    tasks: dict[str, float] = Field(
        {name: task.weight for name, task in LLM_TASKS.items() if task.weight > 0},
        description="Weights of the tasks of text; code has `code` instead of those of prose.",
    )
    min_blocks: int = Field(3, ge=2, description="Blocks shown at least for a task that needs several.")
    max_blocks: int = Field(6, ge=2, description="Blocks shown at most.")
    not_stated_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Share of the answerable questions that also say what to answer if the document does not tell: "
        "otherwise these words would give the unanswerable ones away.",
    )
    max_tokens: int = Field(4096, ge=1, description="Longest reply, in tokens, reasoning included.")
    max_draws: int = Field(3, ge=1, description="Draws until one is a question in its language; one at temperature 0.")
    seed: int = Field(0, description="Seed of the choice of tasks and blocks.")

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: dict[str, float]) -> dict[str, float]:
        return checked_weights(tasks, LLM_TASKS)


class LLMEngine:
    """Writes questions with a model. Without `identify`, languages are not looked at."""

    def __init__(self, config: LLMEngineConfig, client: ChatClient, identify: Identify | None = None):
        self.config = config
        self.client = client
        self.identify = identify

    async def rows(
        self, document: Document, blocks: list[Block], links: list[list[int]]
    ) -> tuple[list[Row], list[Drop]]:
        """Questions on one document, and those that failed; `links` are the related blocks of each, the best first."""
        numbers = range(self.config.questions_per_document)
        results = await asyncio.gather(*(self._row(document, blocks, links, number) for number in numbers))
        rows = [result for result in results if isinstance(result, Row)]
        return rows, [result for result in results if isinstance(result, Drop)]

    async def _row(self, document: Document, blocks: list[Block], links: list[list[int]], number: int) -> Row | Drop:
        def drop(reason: str, detail: str = "") -> Drop:
            return Drop(STAGE, document.source, f"{document.id}:{number}", reason, detail)

        rng = random.Random(f"{self.config.seed}:{document.id}:{number}")
        task = self._task(rng, document)
        shown = self._choose(rng, task, len(blocks), links)
        if len(shown) < max(1, LLM_TASKS[task].min_evidence_blocks):
            return drop("too_few_blocks", f"{len(blocks)} for {task}")
        row = await self._write(document, task, [blocks[index] for index in shown], drop)
        if isinstance(row, Row) and (task == UNANSWERABLE or rng.random() < self.config.not_stated_share):
            return replace(row, question=f"{row.question} ({or_say_not_stated(row.language)})")
        return row

    async def _write(self, document: Document, task: str, shown: list[Block], drop: MakeDrop) -> Row | Drop:
        """The first reply that is a row; the reason of the last one if none is."""
        messages = [{"role": "user", "content": _prompt(document, task, shown)}]
        read = functools.cache(lambda text: self._read(document, task, shown, text, drop))
        result: Row | Drop
        for sample in range(1 if self.client.config.temperature == 0 else self.config.max_draws):
            try:
                completion = await self.client.complete(
                    messages,
                    max_tokens=self.config.max_tokens,
                    schema=_SCHEMA,
                    sample=sample,
                    is_usable=lambda text: isinstance(read(text), Row),
                )
            except RequestFailed as error:
                result = drop(error.reason, error.detail)
                if error.reason == "refused_content":
                    continue
                return result  # the client has tried as often as it helps
            result = read(completion.text)
            if isinstance(result, Row):
                return result
        return result

    def _task(self, rng: random.Random, document: Document) -> str:
        weights = dict(self.config.tasks)
        if document.kind == "code":
            of_prose = sum(weight for task, weight in weights.items() if not LLM_TASKS[task].is_for_code)
            weights = {task: weight for task, weight in weights.items() if LLM_TASKS[task].is_for_code}
            weights["code"] = weights.get("code", 0) + of_prose
        else:
            weights.pop("code", None)
        if sum(weights.values()) <= 0:
            weights = {"code" if document.kind == "code" else "grounding": 1.0}
        return rng.choices(list(weights), list(weights.values()))[0]

    def _choose(self, rng: random.Random, task: str, num_blocks: int, links: list[list[int]]) -> list[int]:
        """Indices of the blocks to show, in order: one drawn, those related to it, and those related to these."""
        if num_blocks == 0:
            return []
        wanted = rng.randint(self.config.min_blocks, self.config.max_blocks)
        if LLM_TASKS[task].min_evidence_blocks <= 1:
            wanted = min(wanted, 2)
        linked = [index for index in range(num_blocks) if links[index]]
        chosen = [rng.choice(linked or range(num_blocks))]
        for index in chosen:  # grows while it is walked
            chosen += [other for other in links[index] if other not in chosen][: wanted - len(chosen)]
        others = [index for index in range(num_blocks) if index not in chosen]
        missing = min(wanted - len(chosen), len(others))
        return sorted(chosen + (rng.sample(others, missing) if missing > 0 else []))

    def _read(self, document: Document, task: str, shown: list[Block], text: str, drop: MakeDrop) -> Row | Drop:
        """The row that a reply describes."""
        try:
            # What breaks off could be repaired, but not what its answer lost
            reply = parse_object(text) if text.rfind("}") > text.find("{") else {}
        except ValueError:
            reply = {}
        if not reply:
            return drop("malformed_reply", text[:300])
        language = document.language or "en"
        question, answer = (_text(reply.get(name)) for name in ("question", "answer"))
        if not 3 <= len(question) <= _MAX_QUESTION_CHARS:
            return drop("no_question", question[:300])
        if task == UNANSWERABLE:
            answer, evidence = not_stated(language), []
        else:
            if not 1 <= len(answer) <= _MAX_ANSWER_CHARS:
                return drop("no_answer", question)
            by_label = {f"B{number}": block for number, block in enumerate(shown, start=1)}
            labels = _labels(reply.get("evidence"))
            if unknown := [label for label in labels if label not in by_label]:
                return drop("unknown_evidence", f"{unknown[0]!r:.80} for {question}")
            if len(labels) < LLM_TASKS[task].min_evidence_blocks:
                return drop("too_few_evidence_blocks", f"{len(labels)} for {task}: {question}")
            evidence = sorted((by_label[label] for label in labels), key=lambda block: block.start)
        texts = {"question": question} if task == UNANSWERABLE else {"question": question, "answer": answer}
        if self.identify is not None and (found := other_language(texts, language, self.identify)):
            return drop("wrong_language", f"{found[0]}, not {language}: {question}")
        return Row(
            document_id=document.id,
            source=document.source,
            language=language,
            question=question,
            answer=answer,
            task=task,
            evidence=tuple(Evidence(block.id, block.start, block.end) for block in evidence),
        )


def _prompt(document: Document, task: str, blocks: list[Block]) -> str:
    labelled = (f"B{number}:\n{quote(block.text, 'block')}" for number, block in enumerate(blocks, start=1))
    return PROMPTS["write"].format(
        what="source file" if document.kind == "code" else "document",
        instruction=LLM_TASKS[task].instruction,
        language=language_name(document.language or "en"),
        blocks="\n\n".join(labelled),
    )


def _text(value: Any) -> str:
    """A field of a reply as text: models write numbers and lists where text was asked for."""
    if isinstance(value, list | tuple):
        value = ", ".join(str(item) for item in value)
    if value is None or isinstance(value, bool | dict):
        return ""
    return str(value).encode("utf-8", "replace").decode().strip()


def _labels(value: Any) -> list[str]:
    """Labels of blocks, each once: from a list, or from text such as "B1, B3"; a number n is taken for Bn."""
    items = value if isinstance(value, list | tuple) else str("" if value is None else value).split(",")
    labels = (str(item).strip(" []\"'.").upper() for item in items)
    return list(dict.fromkeys(f"B{label}" if label.isdigit() else label for label in labels if label))
