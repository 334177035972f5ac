"""The builder: documents in, verified questions out, in stages that can be run alone and go on after any crash.

| stage | reads | leaves |
| --- | --- | --- |
| `sources` | the sources | clean documents |
| `deduplication` | documents | which of them stay |
| `blocks` | documents | their blocks, and which are related |
| `questions` | documents, blocks | rows |
| `verification` | rows, documents | rows with checks |
| `responses` | rows, documents | rows with teachers' answers |
| `decontamination` | rows | rows |
| `mixing` | rows of all parts | which of them stay |
| `card` | all of it | `dataset/README.md` and its figure |
| `publish` | all of it | `dataset/data/*.parquet`, and the Hub where asked |
"""

import asyncio
import json
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, aclosing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from filelock import FileLock, Timeout

from ...files import write_text
from ...llm import ChatClient, RequestCache, TokenCounter, load_token_counter
from ..questions.blocks import Block, link_blocks, split_blocks
from ..questions.llm_engine import LLMEngine
from ..questions.rule_engine import RuleEngine
from ..questions.verification import Verifier
from ..records import Document, Drop, Row
from ..sources import reading as sources
from ..sources.reading import SourceConfig
from .card import Statistics, write_card
from .cleaning import Cleaner, identify
from .config import STAGES, BuildConfig
from .decontamination import Decontaminator
from .deduplication import Deduplicator, signature
from .mixing import Mixer
from .progress import Progress
from .publish import published_record, push, save_to_disk, write_parquet
from .responses import Responder
from .store import (
    BLOCKS_SCHEMA,
    DOCUMENT_SCHEMA,
    KEPT_SCHEMA,
    ROW_SCHEMA,
    Store,
    blocks_of,
    document_of,
    document_record,
    row_of,
    row_record,
)


logger = logging.getLogger(__name__)

T, R = TypeVar("T"), TypeVar("R")
Result = tuple[list[dict[str, Any]], list[Drop]]

# The stages that see all parts at once; the others can be shared out among processes
GLOBAL_STAGES = ("deduplication", "mixing", "card", "publish")
# Reasons that another try may mend, see `client`
RETRYABLE_REASONS = (
    "rate_limited",
    "server_error",
    "timeout",
    "connection_closed",
    "malformed_reply",
    "empty_reply",
    "truncated",
)
# A part closes early at so many characters, so that its documents fit in memory whatever their size
MAX_PART_CHARS = 64_000_000


async def ordered_map(function: Callable[[T], Awaitable[R]], items: Iterable[T], window: int) -> AsyncIterator[R]:
    """Results of `function` in the order of `items`, with at most `window` of them under way."""
    pending: deque[asyncio.Task[R]] = deque()
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


class Builder:
    """Runs the stages of one configuration in one folder.

    Args:
        config ([`BuildConfig`]):
            What to build.
        output_dir (`Path`):
            Folder of the build: `work/` for what stages leave, `dataset/` for what is published, `summary.json`.
        shard (`int`, *optional*, defaults to `0`):
            Which share of the parts this process works on; of the sources, in the stage `sources`.
        num_shards (`int`, *optional*, defaults to `1`):
            Number of processes that share the work, each with its own `shard`.

    Raises:
        ValueError: If `shard` is not one of `num_shards`.
    """

    def __init__(self, config: BuildConfig, output_dir: Path, shard: int = 0, num_shards: int = 1):
        if not 0 <= shard < num_shards:
            raise ValueError(
                f"`shard` is {shard} of {num_shards}. Shards count from 0. Give one of 0 to {num_shards - 1}."
            )
        self.config = config
        self.output_dir = output_dir
        self.shard, self.num_shards = shard, num_shards
        self.store = Store(output_dir / "work")
        self.progress = Progress()

    def run(
        self,
        stages: Iterable[str] = STAGES,
        restart_from: str | None = None,
        retry_failed: bool = False,
        push: bool = False,
    ) -> dict[str, Any]:
        """Runs stages, in their order; what is done already is not done again.

        Args:
            stages (`Iterable[str]`, *optional*):
                Names out of `STAGES`.
            restart_from (`str`, *optional*):
                Forget what this stage and those after it made: needed after a change of configuration. Finished
                requests are kept all the same.
            retry_failed (`bool`, *optional*, defaults to `False`):
                Go again through the parts from which a server's failure has left something out.
            push (`bool`, *optional*, defaults to `False`):
                Let the stage `publish` upload. Without it, it says what it would upload.

        Returns:
            `dict`: the summary, which is also in `summary.json`: rows and drops by stage and reason.

        Raises:
            ValueError: If the configuration is not the one that earlier stages were run with, a stage that this one
                needs has not been run, or a source or an evaluation set cannot be read.
            RuntimeError: If another process works on the same shard, or a server refuses every request.
        """
        wanted = [stage for stage in STAGES if stage in set(stages)]
        with ExitStack() as stack:
            lock = FileLock(self.store.folder / f".lock-{self.shard}-of-{self.num_shards}")
            try:
                stack.enter_context(lock.acquire(blocking=False))
            except Timeout as error:
                raise RuntimeError(
                    f"Another process builds in {self.output_dir}. Two would write the same parts. Wait for it, or "
                    "give this one another `--output_dir`."
                ) from error
            if restart_from is not None:
                self._forget(restart_from)
            if retry_failed:
                self._forget_failures()
            self._check_config()
            if "decontamination" in wanted:
                self._decontaminator  # noqa: B018 - an evaluation set that is not there is seen before the work
            stack.enter_context(self.progress)
            for stage in wanted:
                if stage in GLOBAL_STAGES and self.num_shards > 1:
                    raise ValueError(
                        f"The stage {stage!r} sees all parts at once. It cannot be shared out among "
                        f"{self.num_shards} processes. Run it alone, without a shard."
                    )
                self._run_stage(stage, push)
        return self._write_summary()

    def _run_stage(self, stage: str, push: bool) -> None:
        if stage == "sources":
            self._run_sources()
        elif stage == "deduplication":
            self._run_deduplication()
        elif stage == "mixing":
            self._run_mixing()
        elif stage == "card":
            self._write_card()
        elif stage == "publish":
            self._publish(push)
        else:
            asyncio.run(self._run_parts(stage))

    # --- The configuration that the parts were made with

    def _check_config(self) -> None:
        """Refuses to go on with another configuration, which would leave parts of both in one data set."""
        path = self.store.folder / "config.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        current = {stage: json.loads(json.dumps(self.config.settings(stage))) for stage in STAGES}
        for stage in STAGES:
            if stage in known and self.store.parts(stage) and known[stage] != current[stage]:
                keys = sorted(k for k in current[stage] | known[stage] if current[stage].get(k) != known[stage].get(k))
                raise ValueError(
                    f"The configuration of the stage {stage!r} differs from the one that {self.output_dir} was built "
                    f"with, in {', '.join(f'`{key}`' for key in keys)}. Parts of both would be mixed. Restore it, "
                    f"give another `--output_dir`, or run with `--restart_from {stage}`, which makes this stage and "
                    "the later ones again and keeps the finished requests."
                )
        write_text(path, json.dumps(current, indent=1))

    def _forget(self, stage: str) -> None:
        if stage not in STAGES:
            raise ValueError(f"`restart_from` is {stage!r}, which is no stage. Give one of {', '.join(STAGES)}.")
        # The last first: killed in between, no later stage keeps what was made of something that is gone
        for later in reversed(STAGES[STAGES.index(stage) :]):
            self.store.remove(later)

    def _forget_failures(self) -> None:
        """Forgets its bad replies, the parts that lack something because of a server, and what was made of them."""
        for path in (self.store.folder / "requests").glob("*.sqlite"):
            cache = RequestCache(path)
            cache.forget_failures(RETRYABLE_REASONS)
            cache.close()
        for index, stage in enumerate(STAGES):
            parts = {part for part in self.store.parts(stage) if self._has_failures(stage, part)}
            for later in reversed(STAGES[index:]) if parts else ():
                if later in GLOBAL_STAGES:
                    self.store.remove(later)
                for part in parts:
                    self.store.remove(later, part)

    def _has_failures(self, stage: str, part: str) -> bool:
        return any(
            drop.reason.removeprefix(f"{stage}_") in RETRYABLE_REASONS for drop in self.store.drops(stage, part)
        )

    # --- Sources and duplicates

    def _marker(self, index: int) -> Path:
        """The file that says that a source was read to its end."""
        return self.store.folder / "sources" / f"{index:03d}-{self.config.sources[index].name}-complete"

    def _run_sources(self) -> None:
        own = list(enumerate(self.config.sources))[self.shard :: self.num_shards]
        for index, source in own:
            if not self._marker(index).exists():
                sources.check_source(source)
        for index, source in own:
            prefix = f"{index:03d}-{source.name}-"
            marker = self._marker(index)
            done = [part for part in self.store.parts("sources") if part.startswith(prefix)]
            num_done = sum(self.store.counts("sources", part)["num_read"] for part in done)
            self.progress.start(f"sources: {source.name}", source.max_documents, num_done)
            if marker.exists():
                continue
            items = sources.read_source(source, skip=num_done)
            for number, chunk in enumerate(self._chunks(items), start=len(done)):
                self._write_documents(f"{prefix}{number:05d}", source, chunk)
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()

    def _chunks(self, items: Iterator[Document | Drop]) -> Iterator[list[Document | Drop]]:
        chunk, num_chars = [], 0
        for item in items:
            chunk.append(item)
            num_chars += len(item.text) if isinstance(item, Document) else 0
            if len(chunk) == self.config.documents_per_part or num_chars > MAX_PART_CHARS:
                yield chunk
                chunk, num_chars = [], 0
        if chunk:
            yield chunk

    def _write_documents(self, part: str, source: SourceConfig, items: list[Document | Drop]) -> None:
        records, drops = [], []
        for item in items:
            cleaned = self._cleaner.clean(item) if isinstance(item, Document) else item
            if isinstance(cleaned, Document) and not source.may_redistribute:
                cleaned = self._unedited(item, cleaned)
            if isinstance(cleaned, Drop):
                drops.append(cleaned)
                self.progress.advance(0, [cleaned])
                continue
            records.append(document_record(cleaned, signature(cleaned.text, self.config.deduplication)))
            self.progress.advance(1, [])
        self.store.write("sources", part, DOCUMENT_SCHEMA, records, drops, len(items))

    def _unedited(self, document: Document, cleaned: Document) -> Document | Drop:
        """A document whose reader puts its text together from the source: judged by cleaning, but not edited."""
        num_tokens = self._tokenizer.count(document.text)
        maximum = self.config.cleaning.max_tokens
        if maximum is not None and num_tokens > maximum:  # it cannot be cut either
            return Drop("sources", document.source, document.source_id, "too_long", f"{num_tokens} tokens, not cut")
        return replace(cleaned, text=document.text, num_tokens=num_tokens)

    @cached_property
    def _tokenizer(self) -> TokenCounter:
        return load_token_counter(self.config.tokenizer)

    @cached_property
    def _decontaminator(self) -> Decontaminator:
        return Decontaminator(self.config.decontamination)

    @cached_property
    def _cleaner(self) -> Cleaner:
        return Cleaner(self.config.cleaning, self._tokenizer.count, self._tokenizer.special_tokens)

    def _source_parts(self) -> list[str]:
        """All parts, in the order of the configuration.

        Raises:
            ValueError: If a source has not been read to its end.
        """
        for index, source in enumerate(self.config.sources):
            if not self._marker(index).exists():
                raise ValueError(
                    f"The source {source.name!r} has not been read to its end. This stage needs all documents. Run "
                    "the stage 'sources' first, on every shard."
                )
        return self.store.parts("sources")

    def _run_deduplication(self) -> None:
        parts = self._source_parts()
        pending = [part for part in parts if not self.store.is_complete("deduplication", part)]
        done = sum(self.store.counts("deduplication", part)["num_read"] for part in set(parts) - set(pending))
        self.progress.start("deduplication", self._num_rows("sources", parts), done)
        if not pending:
            return
        with Deduplicator(self.store.folder / "deduplication.sqlite", self.config.deduplication) as deduplicator:
            deduplicator.forget_from(pending[0])
            for part in pending:
                kept, drops = [], []
                records = enumerate(self.store.records("sources", part, ["id", "source", "source_id", "signature"]))
                for position, record in records:
                    drop = deduplicator.add(record, part)
                    if drop is None:
                        kept.append({"position": position, "id": record["id"]})
                    else:
                        drops.append(drop)
                    self.progress.advance(int(drop is None), [drop] if drop else [])
                deduplicator.commit()  # before the part: what it holds of an unfinished part is forgotten
                self.store.write("deduplication", part, KEPT_SCHEMA, kept, drops, len(kept) + len(drops))

    def _num_rows(self, stage: str, parts: Iterable[str]) -> int:
        return sum(self.store.counts(stage, part)["num_rows"] for part in parts)

    # --- Stages that work part by part

    async def _run_parts(self, stage: str) -> None:
        """Runs one stage over this shard's parts. Several parts are under way at once; each is written when done."""
        before = STAGES[STAGES.index(stage) - 1]
        parts = self._source_parts()[self.shard :: self.num_shards]
        for part in parts:
            if not self.store.is_complete(before, part):
                raise ValueError(
                    f"The part {part!r} has not been through the stage {before!r}, which {stage!r} builds on. Run "
                    f"{before!r} first, on every shard."
                )
        pending = [part for part in parts if not self.store.is_complete(stage, part)]
        done = set(parts) - set(pending)
        total = self._num_rows(before, parts)
        self.progress.start(stage, total, self._num_rows(before, done))
        async with AsyncExitStack() as stack:
            work, schema, clients = await self._worker(stage, stack)
            window = max([8, *(4 * client.config.max_concurrency for client in clients)])

            async def process(item: tuple[str, Any]) -> tuple[str, Result | None]:
                part, inputs = item
                if inputs is None:
                    return part, None
                records, drops = await work(*inputs)
                self.progress.advance(len(records), drops, lambda: " ".join(str(client.stats) for client in clients))
                return part, (records, drops)

            records, drops, num_read = [], [], 0
            async with aclosing(ordered_map(process, self._inputs(stage, pending), window)) as results:
                async for part, result in results:
                    if result is None:
                        self.store.write(stage, part, schema, records, drops, num_read)
                        records, drops, num_read = [], [], 0
                        continue
                    records += result[0]
                    drops += result[1]
                    num_read += 1

    def _inputs(self, stage: str, parts: list[str]) -> Iterator[tuple[str, Any]]:
        """What the stage works on, item by item, each with its part; `None` ends a part."""
        for part in parts:
            if stage == "blocks":
                yield from ((part, (document,)) for document in self._documents(part))
            elif stage == "questions":
                records = self.store.records("blocks", part)
                for document, record in zip(self._documents(part), records, strict=True):
                    yield part, (document, blocks_of(record, document.text), record["links"])
            else:
                texts = {document.id: document.text for document in self._documents(part)}
                for record in self.store.records(STAGES[STAGES.index(stage) - 1], part):
                    row = row_of(record)
                    yield part, (row, texts[row.document_id] if row.document is None else row.document)
            yield part, None

    def _documents(self, part: str) -> Iterator[Document]:
        """The documents of a part that are no duplicates."""
        kept = {record["position"] for record in self.store.records("deduplication", part)}
        for position, record in enumerate(self.store.records("sources", part)):
            if position in kept:
                yield document_of(record)

    async def _worker(
        self, stage: str, stack: AsyncExitStack
    ) -> tuple[Callable[..., Awaitable[Result]], pa.Schema, list[ChatClient]]:
        """What a stage does with one item, the form of its output, and the clients that it asks."""
        settings = self.config
        if stage == "blocks":
            return self._split, BLOCKS_SCHEMA, []
        if stage == "decontamination":

            async def decontaminate(row: Row, text: str) -> Result:
                drop = self._decontaminator.check(row, text)
                return ([], [drop]) if drop else ([row_record(row)], [])

            return decontaminate, ROW_SCHEMA, []
        clients = {
            name: await stack.enter_async_context(ChatClient(settings.servers[name], self._cache(name)))
            for name in settings.servers_of(stage)
        }
        identify_or_none = identify if settings.verification.language else None
        if stage == "questions":
            if settings.questions.engine == "rule":
                engine = RuleEngine(settings.questions, self._tokenizer.count)
            else:
                engine = LLMEngine(settings.questions, clients[settings.questions.server], identify_or_none)

            async def ask(document: Document, blocks: list[Block], links: list[list[int]]) -> Result:
                rows, drops = await engine.rows(document, blocks, links)
                return [row_record(row) for row in rows], drops

            return ask, ROW_SCHEMA, list(clients.values())
        if stage == "verification":
            answerer, judge = (
                clients.get(name) for name in (settings.verification.answerer, settings.verification.judge)
            )
            verifier = Verifier(settings.verification, answerer, judge, identify)

            async def verify(row: Row, text: str) -> Result:
                row, drop = await verifier.check(row, text)
                return ([], [drop]) if drop else ([row_record(row)], [])

            return verify, ROW_SCHEMA, list(clients.values())
        responder = Responder(settings.responses, clients, identify_or_none)

        async def respond(row: Row, text: str) -> Result:
            answered, drops = await responder.respond(row, text)
            return [] if answered is None else [row_record(answered)], drops

        return respond, ROW_SCHEMA, list(clients.values())

    async def _split(self, document: Document) -> Result:
        blocks = split_blocks(document.text, document.kind, self.config.blocks, document.source_id)
        record = {
            "document_id": document.id,
            "blocks": [{"id": block.id, "start": block.start, "end": block.end} for block in blocks],
            "links": link_blocks(blocks, self.config.blocks),
        }
        return [record], []

    def _cache(self, name: str) -> RequestCache:
        """This shard's finished requests to a server; those of other shards are read."""
        folder = self.store.folder / "requests"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}-{self.shard}-of-{self.num_shards}.sqlite"
        return RequestCache(path, read_only=sorted(set(folder.glob(f"{name}-*.sqlite")) - {path}))

    # --- The data set as a whole

    def _run_mixing(self) -> None:
        parts = self._source_parts()
        self.progress.start("mixing", self._num_rows("decontamination", parts))
        if all(self.store.is_complete("mixing", part) for part in parts):
            return
        mixer = Mixer(self.store.folder / "mixing.sqlite", self.config.mixing)
        mixer.select(
            (part, position, row_of(record))
            for part in parts
            for position, record in enumerate(self.store.records("decontamination", part))
        )
        for part in parts:
            kept, drops = [], []
            for position, row_id, drop in mixer.decisions(part):
                if drop is None:
                    kept.append({"position": position, "id": row_id})
                else:
                    drops.append(drop)
                self.progress.advance(int(drop is None), [drop] if drop else [])
            self.store.remove("mixing", part)
            self.store.write("mixing", part, KEPT_SCHEMA, kept, drops, len(kept) + len(drops))

    def _published(self, statistics: Statistics | None = None) -> Iterator[dict[str, Any]]:
        """The rows of the data set, in order; those that may not be published are left out, and counted."""
        models = self.config.response_models
        for part in self._source_parts():
            if not self.store.is_complete("mixing", part):
                raise ValueError(
                    "The rows have not been chosen. The data set is made of those that were. Run the stage 'mixing' "
                    "first."
                )
            may_redistribute = self.config.sources[int(part[:3])].may_redistribute
            kept = {record["position"] for record in self.store.records("mixing", part)}
            documents = {document.id: document for document in self._documents(part)}
            for position, record in enumerate(self.store.records("decontamination", part)):
                if position not in kept:
                    continue
                row = row_of(record)
                document = documents[row.document_id]
                published = published_record(row, document, models, may_redistribute=may_redistribute)
                if statistics is not None and isinstance(published, Drop):
                    statistics.add_drop(published)
                elif statistics is not None:
                    changed = None if row.document is None else self._tokenizer.count(row.document)
                    statistics.add(published, document.num_tokens if changed is None else changed, document.license)
                if not isinstance(published, Drop):
                    self.progress.advance(1, [])
                    yield published

    def _write_card(self) -> None:
        parts = self._source_parts()
        self.progress.start("card", self._num_rows("mixing", parts))
        statistics = Statistics()
        for stage in STAGES:
            for part in self.store.parts(stage):
                for drop in self.store.drops(stage, part):
                    statistics.add_drop(drop)
        for _ in self._published(statistics):
            pass
        models = {
            f"{stage}: {name}": self.config.servers[name].model
            for stage in STAGES
            for name in self.config.servers_of(stage)
        }
        write_card(
            self.output_dir / "dataset",
            statistics,
            self.config.card,
            recipe=self.config.public_yaml(),
            fingerprint=self.config.fingerprint,
            command="python scripts/build_longblocks.py --config recipe.yaml",
            engine=self.config.questions.engine,
            models=models,
            tokenizer=self._tokenizer.name,
            evaluation_sets=[evaluation_set.name for evaluation_set in self.config.decontamination.against],
        )

    def _publish(self, pushes: bool) -> None:
        folder, config = self.output_dir / "dataset", self.config.publish
        self.progress.start("publish", self._num_rows("mixing", self._source_parts()))
        files = write_parquet(
            self._published(), folder, self.config.response_models, max_shard_bytes=config.max_shard_bytes
        )
        if config.save_to_disk:
            save_to_disk(files, self.output_dir / "saved", config.max_shard_bytes)
        push(folder, config, dry_run=not pushes)

    # --- What came of it

    def _write_summary(self) -> dict[str, Any]:
        stages = {}
        for stage in STAGES:
            parts = self.store.parts(stage)
            if parts:
                reasons = Counter(drop.reason for part in parts for drop in self.store.drops(stage, part))
                stages[stage] = {"kept": self._num_rows(stage, parts), "dropped": dict(reasons.most_common())}
        summary = {
            "name": self.config.name,
            "fingerprint": self.config.fingerprint,
            "output_dir": str(self.output_dir),
            "stages": stages,
        }
        write_text(self.output_dir / "summary.json", json.dumps(summary, indent=1))
        return summary

    def check(self) -> None:
        """Opens the sources, the tokenizer and the evaluation sets, and reads a little of each; builds nothing.

        Raises:
            ValueError: For the first of them that cannot be read.
        """
        self._tokenizer  # noqa: B018
        for source in self.config.sources:
            sources.check_source(source)
        self._decontaminator  # noqa: B018
        logger.info(f"{self.config.name}: the configuration and {len(self.config.sources)} sources are in order.")
