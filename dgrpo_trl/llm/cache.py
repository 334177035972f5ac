"""Replies kept in an SQLite file, so that each is paid for once, except those in flight when a process dies."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .replies import Completion


logger = logging.getLogger(__name__)

# How long another process may hold the file
_MAX_LOCKED_SECONDS = 60
# A short wait: a lock must not hold up the event loop
_BUSY_MILLISECONDS = 10
_CREATE_TABLES = """\
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, thinking TEXT, finish_reason TEXT NOT NULL, model TEXT NOT NULL,
    prompt_tokens INTEGER, completion_tokens INTEGER, unix_seconds REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS failures (
    key TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL, unix_seconds REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS failures_by_key ON failures (key);
COMMIT;
"""
_SELECT_REPLY = "SELECT text, thinking, finish_reason, model FROM replies WHERE key = ?"
_SELECT_STREAK = """\
SELECT key, reason FROM failures
WHERE unix_seconds > COALESCE((SELECT unix_seconds FROM replies ORDER BY rowid DESC LIMIT 1), 0)
"""
_SELECT_FAILURES = "SELECT reason, detail FROM failures WHERE key = ? ORDER BY rowid"


class RequestCache:
    """Replies by a hash of the request, usable or not, in an SQLite file that several processes of one host may share.

    Without a `path`, replies are kept in memory. They are also looked for in the `read_only` files of other processes;
    one that cannot be read is left out, with a warning.

    Raises:
        ValueError: If the file is no cache.
    """

    def __init__(self, path: Path | None = None, read_only: Sequence[Path] = ()):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path or Path(":memory:")
        try:
            self._database = _open_cache(self._path)
        except sqlite3.Error as error:
            raise ValueError(
                f"The cache of requests {str(path)!r} cannot be opened: {error}. It holds what was paid for. Restore "
                "it, or rename it to send all requests again."
            ) from error
        self._others: dict[Path, sqlite3.Connection] = {}
        for other in read_only:
            try:
                self._others[other] = sqlite3.connect(f"{other.absolute().as_uri()}?mode=ro", uri=True, timeout=60)
                _probe(self._others[other])
            except sqlite3.Error as error:
                self._leave_out(other, error)

    def get(self, key: str) -> Completion | None:
        """The reply to a request, if it was kept."""
        return next((Completion(*row) for row in self._select(_SELECT_REPLY, key)), None)

    def failures(self, key: str) -> list[tuple[str, str]]:
        """Reason and detail of the replies to a request that could not be used, in their order."""
        return list(self._select(_SELECT_FAILURES, key))

    def _select(self, query: str, key: str) -> Iterator[tuple[Any, ...]]:
        """Rows of this file, then those of the others."""
        try:
            rows = self._database.execute(query, (key,)).fetchall()
        except sqlite3.Error as error:
            raise self._error("read", error) from error
        yield from rows
        for path, other in list(self._others.items()):
            try:
                rows = other.execute(query, (key,)).fetchall()
            except sqlite3.Error as error:
                self._leave_out(path, error)
                continue
            yield from rows

    async def put(self, key: str, completion: Completion, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Keeps a reply: it is in the file when this returns."""
        content = (completion.text, completion.thinking, completion.finish_reason, completion.model)
        row = (key, *content, prompt_tokens, completion_tokens, time.time())
        await self._insert("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    async def put_failure(self, key: str, reason: str, detail: str) -> None:
        """Keeps that a reply could not be used, and why."""
        await self._insert("INSERT INTO failures VALUES (?, ?, ?, ?)", (key, reason, detail, time.time()))

    def failures_since_last_reply(self, reasons: Sequence[str]) -> list[str]:
        """Keys of the failures for one of these reasons since the last reply, one for each; of this file alone."""
        try:
            return [key for key, reason in self._database.execute(_SELECT_STREAK) if reason in reasons]
        except sqlite3.Error as error:
            raise self._error("read", error) from error

    async def _insert(self, statement: str, row: tuple[Any, ...]) -> None:
        give_up_at = time.monotonic() + _MAX_LOCKED_SECONDS
        while True:
            try:
                # Not on a thread: that takes longer than the 40 microseconds of a commit
                self._database.execute(statement, row)
                return
            except sqlite3.Error as error:
                if "locked" not in str(error) or time.monotonic() > give_up_at:
                    raise self._error("written", error) from error
            await asyncio.sleep(0.02)

    def forget_failures(self, reasons: Sequence[str]) -> None:
        """Lets requests that failed for one of these reasons be sent again; in this file alone."""
        self._delete("failures WHERE reason = ?", ((reason,) for reason in reasons))

    def forget_requests(self, keys: Iterable[str], reasons: Sequence[str]) -> None:
        """Lets these requests be sent again if they failed for one of these reasons; in this file alone."""
        self._delete("failures WHERE key = ? AND reason = ?", ((key, reason) for key in keys for reason in reasons))

    def forget_replies(self, keys: Iterable[str]) -> None:
        """Lets these requests be sent again though they have replies; in this file alone."""
        self._delete("replies WHERE key = ?", ((key,) for key in keys))

    def _delete(self, what: str, parameters: Iterable[tuple[str, ...]]) -> None:
        """Deletes rows, for each of the `parameters`."""
        try:
            self._database.execute(f"PRAGMA busy_timeout = {1000 * _MAX_LOCKED_SECONDS}")
            self._database.executemany(f"DELETE FROM {what}", parameters)
            self._database.execute(f"PRAGMA busy_timeout = {_BUSY_MILLISECONDS}")
        except sqlite3.Error as error:
            raise self._error("written", error) from error

    def close(self) -> None:
        for database in (self._database, *self._others.values()):
            database.close()

    def _leave_out(self, path: Path, error: sqlite3.Error) -> None:
        logger.warning(f"The cache of requests {str(path)!r} cannot be read and is left out: {error}.")
        self._others.pop(path, None)

    def _error(self, verb: str, error: sqlite3.Error) -> RuntimeError:
        return RuntimeError(
            f"The cache of requests {str(self._path)!r} cannot be {verb}: {error}. Replies would be paid for and "
            "lost. Look for a full disk, or a process that holds the file, and run again: finished requests are kept."
        )


def _open_cache(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_BUSY_MILLISECONDS / 1000, isolation_level=None)
    give_up_at = time.monotonic() + _MAX_LOCKED_SECONDS
    while True:
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")  # survives the death of the process at any moment
            database.executescript(_CREATE_TABLES)
            _probe(database)
            return database
        except sqlite3.OperationalError as error:  # another process may be creating the file at this moment
            if "locked" not in str(error) or time.monotonic() > give_up_at:
                raise
        time.sleep(0.02)


def _probe(database: sqlite3.Connection) -> None:
    """Raises an error of SQLite if the file is no cache."""
    for query in (_SELECT_REPLY, _SELECT_FAILURES):
        database.execute(query, ("",))
