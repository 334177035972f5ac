"""The stages that make documents and the data set; those that work part by part are in [`part_stages`].

`sources` reads and cleans documents, `deduplication` keeps one of those alike; `mixing` chooses rows, `card` describes
them, `publish` writes them.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..records import Document, Drop, Row
from ..sources.reading import SourceConfig
from .build import Build
from .card import Statistics, write_card
from .cleaning import Cleaner
from .config import STAGES
from .deduplication import Deduplicator, signature
from .mixing import Mixer
from .publish import published_record, push, save_to_disk, write_parquet
from .store import DOCUMENT_SCHEMA, document_record, in_chunks, row_of


# A part closes early at this many characters, so that its documents fit in memory whatever their size
MAX_PART_CHARS = 64_000_000


def read_sources(build: Build) -> None:
    """Reads this shard's sources to their ends, part by part."""
    cleaner = Cleaner(build.config.cleaning, build.tokenizer.count, build.tokenizer.special_tokens)
    own = list(enumerate(build.config.sources))[build.shard :: build.num_shards]
    for index, source in own:
        if not build.marker(index).exists():
            source.check()
    for index, source in own:
        prefix = f"{index:03d}-{source.name}-"
        marker = build.marker(index)
        done = [part for part in build.store.parts("sources") if part.startswith(prefix)]
        num_done = sum(build.store.counts("sources", part)["num_read"] for part in done)
        build.progress.start(f"sources: {source.name}", source.max_documents, num_done)
        if marker.exists():
            continue
        chunks = in_chunks(source.read(skip=num_done), _num_chars, build.config.documents_per_part, MAX_PART_CHARS)
        for number, chunk in enumerate(chunks, start=len(done)):
            _write_documents(build, cleaner, f"{prefix}{number:05d}", source, chunk)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def _num_chars(item: Document | Drop) -> int:
    return len(item.text) if isinstance(item, Document) else 0


def _write_documents(
    build: Build, cleaner: Cleaner, part: str, source: SourceConfig, items: list[Document | Drop]
) -> None:
    records: list[dict[str, Any]] = []
    drops: list[Drop] = []
    for item in items:
        cleaned = cleaner.clean(item) if isinstance(item, Document) else item
        if isinstance(item, Document) and isinstance(cleaned, Document) and not source.may_redistribute:
            cleaned = _unedited(build, item, cleaned)
        if isinstance(cleaned, Drop):
            drops.append(cleaned)
            build.progress.advance(0, [cleaned])
            continue
        records.append(document_record(cleaned, signature(cleaned.text, build.config.deduplication)))
        build.progress.advance(1, [])
    build.store.write("sources", part, DOCUMENT_SCHEMA, records, drops, len(items))


def _unedited(build: Build, document: Document, cleaned: Document) -> Document | Drop:
    """A document whose reader joins its text from the source: judged by cleaning, but not edited."""
    num_tokens = build.tokenizer.count(document.text)
    maximum = build.config.cleaning.max_tokens
    if maximum is not None and num_tokens > maximum:  # it cannot be cut either
        return Drop("sources", document.source, document.source_id, "too_long", f"{num_tokens} tokens, not cut")
    return replace(cleaned, text=document.text, num_tokens=num_tokens)


def remove_duplicates(build: Build) -> None:
    """Decides on the documents of all parts, in their order."""
    parts, store = build.source_parts(), build.store
    pending = [part for part in parts if not store.is_complete("deduplication", part)]
    done = sum(store.counts("deduplication", part)["num_read"] for part in set(parts) - set(pending))
    build.progress.start("deduplication", build.num_rows("sources", parts), done)
    if not pending:
        return
    with Deduplicator(store.folder / "deduplication.sqlite", build.config.deduplication) as deduplicator:
        deduplicator.forget_from(pending[0])
        for part in pending:
            records = store.records("sources", part, ["id", "source", "source_id", "signature"])
            build.write_decisions("deduplication", part, deduplicator.decisions(records, part))


def choose_rows(build: Build) -> None:
    """Decides on the rows of all parts."""
    parts, store = build.source_parts(), build.store
    build.progress.start("mixing", build.num_rows("decontamination", parts))
    if all(store.is_complete("mixing", part) for part in parts):
        return
    mixer = Mixer(store.folder / "mixing.sqlite", build.config.mixing)
    kinds: dict[str, str] = {}  # of the documents of one part

    def rows() -> Iterator[tuple[str, int, Row]]:
        for part in parts:
            kinds.clear()
            kinds.update((record["id"], record["kind"]) for record in store.records("sources", part, ["id", "kind"]))
            for position, record in enumerate(store.records("decontamination", part)):
                yield part, position, row_of(record)

    mixer.select(rows(), is_code=lambda row: kinds[row.document_id] == "code")
    for part in parts:
        store.remove("mixing", part)
        build.write_decisions("mixing", part, mixer.decisions(part))


def _published(build: Build, statistics: Statistics | None = None) -> Iterator[dict[str, Any]]:
    """The rows of the data set, in order; those that may not be published are left out, and counted."""
    models, store = build.config.response_models, build.store
    for part in build.source_parts():
        if not store.is_complete("mixing", part):
            raise ValueError(
                "The rows have not been chosen. The data set is made of those that were. Run the stage 'mixing' first."
            )
        may_redistribute = build.config.sources[int(part[:3])].may_redistribute
        kept = {record["position"] for record in store.records("mixing", part)}
        documents = {document.id: document for document in build.documents(part)}
        for position, record in enumerate(store.records("decontamination", part)):
            if position not in kept:
                continue
            row = row_of(record)
            document = documents[row.document_id]
            published = published_record(row, document, models, may_redistribute=may_redistribute)
            if isinstance(published, Drop):
                if statistics is not None:
                    statistics.add_drop(published)
                continue
            if statistics is not None:
                num_tokens = document.num_tokens if row.document is None else build.tokenizer.count(row.document)
                statistics.add(published, num_tokens, document.license)
            build.progress.advance(1, [])
            yield published


def describe(build: Build) -> None:
    """Writes the card."""
    parts, config = build.source_parts(), build.config
    build.progress.start("card", build.num_rows("mixing", parts))
    statistics = Statistics()
    for stage in STAGES:
        for part in build.store.parts(stage):
            for drop in build.store.drops(stage, part):
                statistics.add_drop(drop)
    for _ in _published(build, statistics):
        pass
    write_card(
        build.output_dir / "dataset",
        statistics,
        config.card,
        recipe=config.public_yaml(),
        fingerprint=config.fingerprint,
        command="python scripts/build_longblocks.py --config recipe.yaml",
        engine=config.questions.engine,
        models={
            f"{stage}: {name}": config.servers[name].model for stage in STAGES for name in config.servers_of(stage)
        },
        tokenizer=build.tokenizer.name,
        evaluation_sets=[evaluation_set.name for evaluation_set in config.decontamination.against],
    )


def publish(build: Build, pushes: bool) -> None:
    """Writes the Parquet files, and uploads them with the card if `pushes`."""
    folder, config = build.output_dir / "dataset", build.config.publish
    build.progress.start("publish", build.num_rows("mixing", build.source_parts()))
    files = write_parquet(
        _published(build), folder, build.config.response_models, max_shard_bytes=config.max_shard_bytes
    )
    if config.save_to_disk:
        save_to_disk(files, build.output_dir / "saved", config.max_shard_bytes)
    push(folder, config, dry_run=not pushes)
