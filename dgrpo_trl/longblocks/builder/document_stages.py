"""The stages that make documents: `sources` reads and cleans them, `deduplication` keeps one of those alike."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..records import Document, Drop
from ..sources.reading import SourceConfig
from .build import Build
from .cleaning import Cleaner
from .deduplication import Deduplicator, signature
from .store import DOCUMENT_SCHEMA, document_record


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
        items = source.read(skip=num_done)
        for number, chunk in enumerate(_chunks(items, build.config.documents_per_part), start=len(done)):
            _write_documents(build, cleaner, f"{prefix}{number:05d}", source, chunk)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def _chunks(items: Iterator[Document | Drop], max_items: int) -> Iterator[list[Document | Drop]]:
    chunk: list[Document | Drop] = []
    num_chars = 0
    for item in items:
        chunk.append(item)
        num_chars += len(item.text) if isinstance(item, Document) else 0
        if len(chunk) == max_items or num_chars > MAX_PART_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


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
