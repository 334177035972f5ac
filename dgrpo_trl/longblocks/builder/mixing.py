"""Which rows stay: one of equal ones, a limit per document, and shares of tasks, languages or sources."""

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ...strict_model import StrictModel
from ..records import Drop, Row
from .deduplication import normalize_question


class MixingConfig(StrictModel):
    """Section `mixing`. The default keeps every row, but those that repeat another."""

    max_rows: int | None = Field(default=None, ge=1, description="Rows of the data set at most.")
    max_rows_per_document: int | None = Field(default=None, ge=1, description="Rows per document at most.")
    max_code_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the rows on code at most, where other documents have rows as well; 1: as they come.",
    )
    share_by: Literal["task", "language", "source"] = Field(default="task", description="What `shares` are of.")
    shares: dict[str, float] = Field(
        default_factory=dict,
        description="Share of the rows of each value, as many rows as the scarcest allows; they add up to 1. A value "
        "that is not named leaves. Empty: as they come.",
    )
    seed: int = Field(default=0, description="Decides which rows stay where some must leave.")

    @model_validator(mode="after")
    def _check_shares(self) -> "MixingConfig":
        if self.shares and (min(self.shares.values()) <= 0 or abs(sum(self.shares.values()) - 1) > 1e-6):
            raise ValueError(
                f"`shares` are {self.shares}, which add up to {sum(self.shares.values()):g}. They are parts of a "
                "whole. Give positive numbers that add up to 1, or leave `shares` out."
            )
        return self


class Mixer:
    """Chooses rows with an index in an SQLite file, so that memory does not grow with their number."""

    def __init__(self, path: Path, config: MixingConfig):
        self.path, self.config = path, config

    def select(self, rows: Iterable[tuple[str, int, Row]], is_code: Callable[[Row], bool] = lambda row: False) -> None:
        """Reads all rows, each with its part and its position there, and decides on each.

        The first of equal rows stays: equal are those with the same question on the same document, and those with the
        same question and answer. Which stay within the limits is drawn by a hash of seed and id.
        """
        self.path.unlink(missing_ok=True)
        with closing(sqlite3.connect(self.path)) as database, database:
            database.execute(
                "CREATE TABLE rows (part TEXT, position INTEGER, id TEXT, document TEXT, question TEXT, pair TEXT, "
                "kind TEXT, source TEXT, draw TEXT, code INTEGER, reason TEXT)"
            )
            database.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                ((*self._entry(part, position, row), is_code(row)) for part, position, row in rows),
            )
            for columns in ("document, question", "pair"):
                database.execute(
                    "UPDATE rows SET reason = 'duplicate_question' WHERE reason IS NULL AND rowid NOT IN "
                    f"(SELECT MIN(rowid) FROM rows WHERE reason IS NULL GROUP BY {columns})"
                )
            if self.config.max_rows_per_document is not None:
                self._limit(database, "document", self.config.max_rows_per_document, "enough_of_document")
            self._limit_code(database)
            self._share(database)
            if self.config.max_rows is not None:
                self._limit(database, "1", self.config.max_rows, "enough_rows")
            database.execute("CREATE INDEX by_part ON rows (part, position)")

    def _entry(self, part: str, position: int, row: Row) -> tuple[str | int, ...]:
        question = hashlib.sha256(normalize_question(row.question).encode()).hexdigest()
        pair = hashlib.sha256(f"{question}:{row.answer.casefold().strip()}".encode()).hexdigest()
        draw = hashlib.sha256(f"{self.config.seed}:{row.id}".encode()).hexdigest()
        kind = getattr(row, self.config.share_by)
        return part, position, row.id, row.document_id, question, pair, kind, row.source, draw

    def _limit(self, database: sqlite3.Connection, group: str, number: int, reason: str) -> None:
        database.execute(
            "UPDATE rows SET reason = ? WHERE rowid IN (SELECT rowid FROM (SELECT rowid, ROW_NUMBER() OVER "
            f"(PARTITION BY {group} ORDER BY draw, rowid) AS place FROM rows WHERE reason IS NULL) WHERE place > ?)",
            (reason, number),
        )

    def _limit_code(self, database: sqlite3.Connection) -> None:
        share = self.config.max_code_share
        query = "SELECT COUNT(*) FROM rows WHERE reason IS NULL AND NOT code"
        num_other = database.execute(query).fetchone()[0]
        if share == 1 or not num_other:
            return
        most = num_other * share / (1 - share)
        if self.config.max_rows is not None:
            most = min(most, self.config.max_rows * share)
        # The other half of the hash: what `max_rows` draws afterwards must not depend on this draw
        database.execute(
            "UPDATE rows SET reason = 'over_code_share' WHERE rowid IN (SELECT rowid FROM rows WHERE reason IS NULL "
            "AND code ORDER BY substr(draw, 33), rowid LIMIT -1 OFFSET ?)",
            (int(most + 1e-9),),
        )

    def _share(self, database: sqlite3.Connection) -> None:
        if not self.config.shares:
            return
        counts = dict(database.execute("SELECT kind, COUNT(*) FROM rows WHERE reason IS NULL GROUP BY kind"))
        names = list(self.config.shares)
        marks = ", ".join("?" * len(names))
        database.execute(
            f"UPDATE rows SET reason = 'not_in_shares' WHERE reason IS NULL AND kind NOT IN ({marks})", names
        )
        total = min(int(counts.get(name, 0) / share + 1e-9) for name, share in self.config.shares.items())
        total = min(total, self.config.max_rows or total)
        for name, share in self.config.shares.items():
            database.execute(
                "UPDATE rows SET reason = 'over_share' WHERE rowid IN (SELECT rowid FROM rows WHERE reason IS NULL "
                "AND kind = ? ORDER BY draw, rowid LIMIT -1 OFFSET ?)",
                (name, round(total * share)),
            )

    def decisions(self, part: str) -> Iterator[tuple[int, str, Drop | None]]:
        """Position, id and, where it leaves, the drop of each row of a part, in order."""
        with closing(sqlite3.connect(self.path)) as database:
            for position, row_id, source, reason in database.execute(
                "SELECT position, id, source, reason FROM rows WHERE part = ? ORDER BY position", (part,)
            ):
                yield position, row_id, None if reason is None else Drop("mixing", source, row_id, reason)
