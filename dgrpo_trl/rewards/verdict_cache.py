"""The file of a judge's replies: opened, or made anew where it is damaged."""

import logging
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path

from ..llm import RequestCache


logger = logging.getLogger(__name__)


def open_cache(path: Path | None) -> RequestCache:
    """The cache at a path. One that is damaged is renamed and made anew: its verdicts can be asked for again.

    Raises:
        ValueError: If the file cannot be opened for another reason, or is the database of something else.
    """
    if path is None or not path.exists():
        return RequestCache(path)
    inode, damage = path.stat().st_ino, _damage(path)
    if damage is not None and path.exists() and path.stat().st_ino == inode:  # or another rank has renamed it
        renamed = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        path.rename(renamed)
        for suffix in ("-wal", "-shm"):  # they belong to the old file, and would damage the new one
            with suppress(FileNotFoundError):
                path.with_name(path.name + suffix).rename(renamed.with_name(renamed.name + suffix))
        logger.warning(
            f"The judge's cache {str(path)!r} is damaged: {damage}. It is now {str(renamed)!r}, and a new one is "
            "made: its verdicts are asked for again. Look at the disk, and whether hosts share the file: each needs "
            "its own."
        )
    return RequestCache(path)


def _damage(path: Path) -> str | None:
    """What SQLite finds wrong with a file; `None` if nothing, or if it cannot tell now, as when the file is locked."""
    address = f"{path.absolute().as_uri()}?mode=rw"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=60)) as database:
            found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
            return None if found == "ok" else str(found)
    except sqlite3.OperationalError:
        return None
    except sqlite3.DatabaseError as error:
        return str(error)
