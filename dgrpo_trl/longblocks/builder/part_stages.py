"""The stages that work part by part: each item of a part by itself, and several at once.

A new one is a function that makes what is done with an item, and a line in `PART_STAGES`.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import pyarrow as pa

from ...llm.client import ChatClient
from ..identification import identify
from ..questions.blocks import Block, link_blocks, split_blocks
from ..questions.llm_engine import LLMEngine
from ..questions.rule_engine import RuleEngine, RuleEngineConfig
from ..questions.verification import Verifier
from ..records import Document, Drop, Row
from .build import Build
from .config import STAGES
from .responses import Responder
from .store import BLOCKS_SCHEMA, ROW_SCHEMA, blocks_of, row_of, row_record


T = TypeVar("T")
R = TypeVar("R")

# The records that a stage makes of one item, and what it leaves out
Result = tuple[list[dict[str, Any]], list[Drop]]
Work = Callable[..., Awaitable[Result]]
# The models that a stage asks, by their names in the configuration
Clients = dict[str, ChatClient]


@dataclass(frozen=True)
class PartStage:
    """A stage that works part by part."""

    inputs: Callable[[Build, str, str], Iterator[tuple[Any, ...]]]  # arguments of the work on each item of a part
    make_work: Callable[[Build, Clients], Work]  # from the build and the models that the stage asks
    schema: pa.Schema = ROW_SCHEMA  # of the records


def run_parts(build: Build, stage: str) -> None:
    """Runs a stage over this shard's parts. Several parts are under way at once; each is written when done."""
    asyncio.run(_run_parts(build, stage))


async def _run_parts(build: Build, stage: str) -> None:
    before = STAGES[STAGES.index(stage) - 1]
    parts = build.source_parts()[build.shard :: build.num_shards]
    for part in parts:
        if not build.store.is_complete(before, part):
            raise ValueError(
                f"The part {part!r} has not been through the stage {before!r}, which {stage!r} builds on. Run "
                f"{before!r} first, on every shard."
            )
    pending = [part for part in parts if not build.store.is_complete(stage, part)]
    done = set(parts) - set(pending)
    build.progress.start(stage, build.num_rows(before, parts), build.num_rows(before, done))
    part_stage = PART_STAGES[stage]
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(ChatClient(build.config.servers[name], build.request_cache(name)))
            for name in build.config.servers_of(stage)
        }
        work = part_stage.make_work(build, clients)
        window = max([8, *(4 * client.config.max_concurrency for client in clients.values())])

        async def process(item: tuple[str, tuple[Any, ...] | None]) -> tuple[str, Result | None]:
            part, arguments = item
            if arguments is None:
                return part, None
            records, drops = await work(*arguments)
            build.progress.advance(
                len(records), drops, lambda: " ".join(str(client.stats) for client in clients.values())
            )
            return part, (records, drops)

        inputs = ((part, part_stage.inputs(build, before, part)) for part in pending)
        items = ((part, item) for part, of_part in inputs for item in chain(of_part, [None]))  # `None` ends a part
        records: list[dict[str, Any]] = []
        drops: list[Drop] = []
        num_read = 0
        async with aclosing(ordered_map(process, items, window)) as results:
            async for part, result in results:
                if result is None:
                    build.store.write(stage, part, part_stage.schema, records, drops, num_read)
                    records, drops, num_read = [], [], 0
                    continue
                records += result[0]
                drops += result[1]
                num_read += 1


async def ordered_map(
    function: Callable[[T], Awaitable[R]], items: Iterable[T], window: int
) -> AsyncGenerator[R, None]:
    """Results of `function` in the order of `items`, with at most `window` of them under way."""
    pending: deque[asyncio.Future[R]] = deque()
    try:
        for item in items:
            pending.append(asyncio.ensure_future(function(item)))
            if len(pending) >= window:
                yield await pending[0]
                pending.popleft()
        while pending:
            yield await pending[0]
            pending.popleft()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


# --- What the stages work on


def _documents(build: Build, before: str, part: str) -> Iterator[tuple[Document]]:
    return ((document,) for document in build.documents(part))


def _documents_with_blocks(
    build: Build, before: str, part: str
) -> Iterator[tuple[Document, list[Block], list[list[int]]]]:
    for document, record in zip(build.documents(part), build.store.records(before, part), strict=True):
        yield document, blocks_of(record, document.text), record["links"]


def _rows_with_texts(build: Build, before: str, part: str) -> Iterator[tuple[Row, str]]:
    texts = {document.id: document.text for document in build.documents(part)}
    for record in build.store.records(before, part):
        row = row_of(record)
        yield row, texts[row.document_id] if row.document is None else row.document


# --- What the stages do with one item


def _splitting(build: Build, clients: Clients) -> Work:
    config = build.config.blocks

    async def split(document: Document) -> Result:
        blocks = split_blocks(document.text, document.kind, config, document.source_id)
        record = {
            "document_id": document.id,
            "blocks": [{"id": block.id, "start": block.start, "end": block.end} for block in blocks],
            "links": link_blocks(blocks, config),
        }
        return [record], []

    return split


def _asking(build: Build, clients: Clients) -> Work:
    config = build.config.questions
    engine: RuleEngine | LLMEngine
    if isinstance(config, RuleEngineConfig):
        engine = RuleEngine(config, build.tokenizer.count)
    else:
        engine = LLMEngine(config, clients[config.server], identify if build.config.verification.language else None)

    async def ask(document: Document, blocks: list[Block], links: list[list[int]]) -> Result:
        rows, drops = await engine.rows(document, blocks, links)
        return [row_record(row) for row in rows], drops

    return ask


def _verifying(build: Build, clients: Clients) -> Work:
    config = build.config.verification
    answerer, judge = (None if name is None else clients[name] for name in (config.answerer, config.judge))
    verifier = Verifier(config, answerer, judge, identify)

    async def verify(row: Row, text: str) -> Result:
        row, drop = await verifier.check(row, text)
        return ([], [drop]) if drop else ([row_record(row)], [])

    return verify


def _responding(build: Build, clients: Clients) -> Work:
    identify_or_none = identify if build.config.verification.language else None
    responder = Responder(build.config.responses, clients, identify_or_none)

    async def respond(row: Row, text: str) -> Result:
        answered, drops = await responder.respond(row, text)
        return [] if answered is None else [row_record(answered)], drops

    return respond


def _decontaminating(build: Build, clients: Clients) -> Work:
    async def decontaminate(row: Row, text: str) -> Result:
        drop = build.decontaminator.check(row, text)
        return ([], [drop]) if drop else ([row_record(row)], [])

    return decontaminate


PART_STAGES = {
    "blocks": PartStage(_documents, _splitting, BLOCKS_SCHEMA),
    "questions": PartStage(_documents_with_blocks, _asking),
    "verification": PartStage(_rows_with_texts, _verifying),
    "responses": PartStage(_rows_with_texts, _responding),
    "decontamination": PartStage(_rows_with_texts, _decontaminating),
}
