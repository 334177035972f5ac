"""The builder's memory on disk: parts that are complete or missing, and what the configuration was.

    work/<stage>/<part>/rows.parquet     what the stage made of the part
                        drops.parquet    what it left out, and why
                        part.json        how much it read

All in `output_dir`. A part is written under another name and renamed, so that one that exists is complete. Killed at
any moment, a run finds the finished parts and makes the others again, with the same result.
"""

import dataclasses
import errno
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..questions.blocks import Block
from ..reasons import is_known
from ..records import Check, Document, Drop, Evidence, Row


Item = TypeVar("Item")


def _text(*names: str) -> dict[str, pa.DataType]:
    return dict.fromkeys(names, pa.string())


DOCUMENT_SCHEMA = pa.schema(
    {
        **{"id": pa.string(), "text": pa.large_string()},
        **_text("source", "source_id", "language", "license", "url", "kind"),
        **{"num_tokens": pa.int64(), "signature": pa.binary()},
    }
)
EVIDENCE_TYPE = pa.list_(pa.struct({"block": pa.string(), "start": pa.int64(), "end": pa.int64()}))
CHECKS_TYPE = pa.list_(
    pa.struct({"name": pa.string(), "passed": pa.bool_(), "score": pa.float64(), "reason": pa.string()})
)
ROW_SCHEMA = pa.schema(
    {
        **_text("id", "document_id", "source", "language", "question", "answer", "task"),
        **{"evidence": EVIDENCE_TYPE, "document": pa.large_string(), "checks": CHECKS_TYPE},
        **dict.fromkeys(("start", "end"), pa.int64()),
        "responses": pa.string(),  # JSON: the models are not known to the schema
    }
)
BLOCKS_SCHEMA = pa.schema(
    {
        "document_id": pa.string(),
        "blocks": pa.list_(pa.struct({"id": pa.string(), "start": pa.int64(), "end": pa.int64()})),
        "links": pa.list_(pa.list_(pa.int32())),
    }
)
KEPT_SCHEMA = pa.schema({"position": pa.int64(), "id": pa.string()})  # position: of the row in the part before
DROP_SCHEMA = pa.schema(_text(*(field.name for field in dataclasses.fields(Drop))))


def document_record(document: Document, signature: bytes | None) -> dict[str, Any]:
    return {**vars(document), "id": document.id, "signature": signature}


def document_of(record: dict[str, Any]) -> Document:
    return Document(**{field.name: record[field.name] for field in dataclasses.fields(Document)})


def blocks_of(record: dict[str, Any], text: str) -> list[Block]:
    return [Block(**block, text=text[block["start"] : block["end"]]) for block in record["blocks"]]


def row_record(row: Row) -> dict[str, Any]:
    return {
        **vars(row),  # not `asdict`, which copies everything below
        "id": row.id,
        "evidence": [vars(evidence) for evidence in row.evidence],
        "checks": [vars(check) for check in row.checks],
        "responses": json.dumps(row.responses, ensure_ascii=False),
    }


def row_of(record: dict[str, Any]) -> Row:
    # Parts that an earlier version wrote lack what rows did not have then
    values = {field.name: record[field.name] for field in dataclasses.fields(Row) if field.name in record}
    values["evidence"] = tuple(Evidence(**evidence) for evidence in values["evidence"])
    values["checks"] = tuple(Check(**check) for check in values["checks"])
    values["responses"] = json.loads(values["responses"])
    return Row(**values)


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Says what to do when a disk is full or a quota is used up."""
    try:
        yield
    except (OSError, sqlite3.OperationalError, RuntimeError) as error:
        # Arrow and SQLite have only words for it
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not is_full and not re.search(r"no space left|disk is full|quota exceeded", str(error), re.I):
            raise
        free = shutil.disk_usage(folder).free
        raise OSError(
            errno.ENOSPC,
            f"The disk of {str(folder)!r} is full: {error}. It has {free:,} bytes left. What is complete stays. Free "
            "some space, or move the folder to a larger disk, and run again with the same command: the build resumes.",
        ) from error


class Store:
    """Parts of all stages under one folder, the builder's `work`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, stage: str, part: str) -> Path:
        return self.folder / stage / part

    def is_complete(self, stage: str, part: str) -> bool:
        return self.path(stage, part).is_dir()

    def parts(self, stage: str) -> list[str]:
        """Names of the complete parts of a stage, sorted."""
        folder = self.folder / stage
        if not folder.is_dir():
            return []
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))

    def write(
        self,
        stage: str,
        part: str,
        schema: pa.Schema,
        records: Iterable[dict[str, Any]],
        drops: Iterable[Drop],
        num_read: int,
    ) -> None:
        """Writes a part, atomically: after a crash it is complete, or missing."""
        final = self.path(stage, part)
        unfinished = final.parent / f".{part}"
        shutil.rmtree(unfinished, ignore_errors=True)  # what a killed run left
        unfinished.mkdir(parents=True)
        records, dropped = list(records), [vars(drop) for drop in drops]
        if unknown := sorted({drop["reason"] for drop in dropped if not is_known(stage, drop["reason"])}):
            raise ValueError(
                f"The stage {stage!r} left something out for {', '.join(unknown)}, which `longblocks/reasons.yaml` "
                "does not explain. Add it there."
            )
        pq.write_table(pa.Table.from_pylist(records, schema), unfinished / "rows.parquet", compression="zstd")
        pq.write_table(pa.Table.from_pylist(dropped, DROP_SCHEMA), unfinished / "drops.parquet", compression="zstd")
        counts = {"num_read": num_read, "num_rows": len(records), "num_drops": len(dropped)}
        (unfinished / "part.json").write_text(json.dumps(counts), encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            _flush(path)
        os.rename(unfinished, final)
        _flush(final.parent)

    def counts(self, stage: str, part: str) -> dict[str, int]:
        """`num_read`, `num_rows` and `num_drops` of a complete part."""
        return json.loads((self.path(stage, part) / "part.json").read_text(encoding="utf-8"))

    def records(self, stage: str, part: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of a complete part, a few in memory at a time."""
        with pq.ParquetFile(self.path(stage, part) / "rows.parquet") as file:
            for batch in file.iter_batches(batch_size=16, columns=columns):
                yield from batch.to_pylist()

    def drops(self, stage: str, part: str) -> Iterator[Drop]:
        """What a stage left out of a complete part."""
        if self.counts(stage, part)["num_drops"] == 0:
            return
        with pq.ParquetFile(self.path(stage, part) / "drops.parquet") as file:
            for batch in file.iter_batches():
                yield from (Drop(**record) for record in batch.to_pylist())

    def remove(self, stage: str, part: str | None = None) -> None:
        """Removes a part, or a whole stage: after a crash it is complete, or missing."""
        path = self.folder / stage if part is None else self.path(stage, part)
        removed = path.with_name(f".removed-{path.name}")
        shutil.rmtree(removed, ignore_errors=True)  # what a killed run left
        if path.exists():
            os.rename(path, removed)
            _flush(path.parent)
            shutil.rmtree(removed)


def in_chunks(
    items: Iterable[Item], size_of: Callable[[Item], int], max_items: int, max_size: int
) -> Iterator[list[Item]]:
    """Items in lists, each of which closes at a number of items or at a size."""
    chunk: list[Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += size_of(item)
        if len(chunk) == max_items or size >= max_size:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _flush(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
