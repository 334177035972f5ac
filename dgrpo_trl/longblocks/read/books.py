"""Documents that LongBlocks may not hold: the pages of books, joined in from a copy of their collection."""

import hashlib
import json
import logging
import sqlite3
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from ..sources.corpora import BOOK_COLUMNS, book_pages
from .rows import ROWS_IN_MEMORY, read_rows


logger = logging.getLogger(__name__)


class BookCache:
    """Pages of the books that a set needs, in an SQLite file that is kept, and added to."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS books (barcode TEXT PRIMARY KEY, pages BLOB NOT NULL)")

    def add(self, books: str | Path | Iterable[dict[str, Any]], barcodes: Iterable[str]) -> list[str]:
        """Takes the wanted books out of the collection, in one pass over it that ends when all are found.

        Args:
            books (`str`, `Path` or iterable of rows):
                Hub id, file or folder of Institutional Books, or its rows: a data set or a stream.
            barcodes (`Iterable[str]`):
                Books to take, by `barcode_src`. Those that the file already holds are not looked for again.

        Returns:
            `list[str]`: the bar codes that were not found, sorted.

        Raises:
            ValueError: If the collection cannot be read or has no column `barcode_src`.
        """
        with closing(sqlite3.connect(self.path)) as connection:
            held = {barcode for (barcode,) in connection.execute("SELECT barcode FROM books")}
            missing = set(barcodes) - held
            for book in _wanted_books(books, missing) if missing else ():
                pages = zlib.compress(json.dumps(book_pages(book)).encode(), level=1)
                with connection:  # a transaction for each: what was found stays after a crash
                    connection.execute("INSERT OR REPLACE INTO books VALUES (?, ?)", (book["barcode_src"], pages))
                missing.remove(book["barcode_src"])
                if not missing:
                    break
        return sorted(missing)

    def pages(self, barcode: str) -> list[str]:
        """Text of each page; empty if the book is not there."""
        with closing(sqlite3.connect(self.path)) as connection:
            row = connection.execute("SELECT pages FROM books WHERE barcode = ?", (barcode,)).fetchone()
        return [] if row is None else json.loads(zlib.decompress(row[0]))

    def digest(self) -> str:
        """Names what the file holds: `datasets` must not take results of its cache that were made from other books."""
        digest = hashlib.sha256()
        with closing(sqlite3.connect(self.path)) as connection:
            for barcode, pages in connection.execute("SELECT barcode, pages FROM books ORDER BY barcode"):
                digest.update(barcode.encode() + hashlib.sha256(pages).digest())
        return digest.hexdigest()


def _wanted_books(books: str | Path | Iterable[dict[str, Any]], wanted: set[str]) -> Iterator[dict[str, Any]]:
    """Rows of the collection that are wanted. Only these leave Arrow: there are hundreds of pages in each."""
    rows = read_rows(books, "train", streaming=True) if isinstance(books, (str, Path)) else books
    if not isinstance(rows, (Dataset, IterableDataset)):
        yield from (book for book in rows if book["barcode_src"] in wanted)
        return
    for table in rows.with_format("arrow").iter(batch_size=ROWS_IN_MEMORY):
        if "barcode_src" not in table.column_names:
            raise ValueError(
                f"`books` has no column 'barcode_src'; its columns are {table.column_names}. Books are found by their "
                "bar code. Give institutional/institutional-books-1.0, or a copy with its columns."
            )
        table = table.select([name for name in ("barcode_src", *BOOK_COLUMNS) if name in table.column_names])
        for index, barcode in enumerate(table["barcode_src"].to_pylist()):
            if barcode in wanted:
                yield table.slice(index, 1).to_pylist()[0]


def missing_documents(dataset: Dataset | IterableDataset) -> set[str]:
    """Ids of the rows of LongBlocks without a document: the bar codes to look for. A stream is read to its end."""
    ids = set()
    for table in dataset.select_columns(["id", "document"]).with_format("arrow").iter(batch_size=ROWS_IN_MEMORY):
        ids.update(table.filter(table["document"].is_null())["id"].to_pylist())
    return ids


def filled_cache(
    rows: Dataset | IterableDataset,
    books: str | Path | Iterable[dict[str, Any]] | None,
    books_cache: str | Path | None,
    stack: ExitStack,
) -> BookCache | None:
    """The pages of the missing documents; in a file that goes with `stack`, unless one is to be kept."""
    if books is None:
        return None if books_cache is None else BookCache(books_cache)
    if isinstance(rows, IterableDataset):
        raise ValueError(
            "`books` cannot be joined with a stream. Which of them it needs shows only at its end. Fill a file once "
            "with `BookCache(path).add(books, missing_documents(stream))`, and give its path as `books_cache`."
        )
    if books_cache is None:
        books_cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="longblocks-"))) / "books.sqlite"
    cache = BookCache(books_cache)
    not_found = cache.add(books, missing_documents(rows))
    if not_found:
        logger.warning(f"{len(not_found):,} books are not in `books`, for instance {not_found[0]!r}.")
    return cache
