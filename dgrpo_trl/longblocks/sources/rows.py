"""Sources of rows with columns: data sets of the Hub, Parquet files, JSON lines."""

import json
import logging
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ..records import Document, Drop
from .corpora import BOOK_COLUMNS, CORPORA, book_pages, two_letter
from .files import BadItem, iter_lines, labelled_paths, printable
from .source import LabelledSource


if TYPE_CHECKING:
    import pyarrow.parquet as pq


logger = logging.getLogger(__name__)

# An escape of JSON takes six bytes for a character of one; a row has other columns too
_LINE_BYTES_PER_TEXT_BYTE = 8
# How many rows may lack a column before it is taken for missing: in JSONL, keys are optional
_ROWS_CHECKED = 100
_MISSING = object()

# (id for drops and for documents without an id, the row or why there is none)
NamedRow = tuple[str, dict[str, Any] | BadItem]


class RowSource(LabelledSource):
    """A source of rows with columns."""

    text_column: str = Field("text", description="Column of the text, or of its list of pages; `a.b` is in a struct.")
    id_column: str | None = Field(None, description="Column of the id. Default: the place of the row in the source.")
    language_column: str | None = Field(None, description="Column of the language, as `en`, `eng` or `eng_Latn`.")
    license_column: str | None = Field(None, description="Column of the license, instead of `license`.")
    url_column: str | None = Field(None, description="Column of the address.")
    join_pages: str = Field("\n\n", description="What goes between the pages of a text that is a list.")
    book_pages: bool = Field(False, description="Whether rows are Institutional Books, whose better text is taken.")

    @model_validator(mode="after")
    def _check_language_given_once(self) -> "RowSource":
        if self.language is not None and self.language_column is not None:
            raise ValueError("`language` and `language_column` are both given. Only one can hold. Remove the other.")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        text = BOOK_COLUMNS if self.book_pages else (self.text_column,)
        others = (self.id_column, self.language_column, self.license_column, self.url_column)
        return tuple(dict.fromkeys(column for column in (*text, *others) if column is not None))

    @abstractmethod
    def rows(self, skip: int, columns: tuple[str, ...] | None) -> Iterator[NamedRow]:
        """The rows but the first `skip`, or why there is none; only some columns, where they can be chosen."""

    def read_from(self, skip: int) -> Iterator[Document | Drop]:
        return (self._read_row(item, row) for item, row in self.rows(skip, self.columns))

    def _read_row(self, item: str, row: dict[str, Any] | BadItem) -> Document | Drop:
        try:
            if isinstance(row, BadItem):
                raise row
            item = _label(row, self.id_column) or item
            language = _label(row, self.language_column)
            return Document(
                text=self._checked(self._text(row)),
                source=self.name,
                source_id=item,
                language=self.language if language is None else two_letter(language),
                license=_label(row, self.license_column) or self.license,
                url=_label(row, self.url_column),
                kind=self.kind or "text",
            )
        except BadItem as bad:
            if bad.reason == "gated":
                logger.warning("The source %r is left out: %s.", self.name, bad.detail)
            return self._drop(item, bad)

    def _text(self, row: dict[str, Any]) -> str:
        value = book_pages(row) if self.book_pages else _cell(row, self.text_column)
        if isinstance(value, list) and all(page is None or isinstance(page, str) for page in value):
            return self.join_pages.join(page or "" for page in value) if any(value) else ""
        if value is not None and not isinstance(value, str):
            raise BadItem("not_text", f"column {self.text_column!r} holds a {type(value).__name__}")
        if value is None and not self.book_pages and _cell(row, self.text_column, _MISSING) is _MISSING:
            raise BadItem("no_text", f"no column {self.text_column!r}")
        return value or ""

    def check(self) -> None:
        missing, bad, not_text = set(self.columns), None, None
        names: set[str] = set()
        for _, row in islice(self.rows(0, None), _ROWS_CHECKED):
            if isinstance(row, BadItem):
                if row.reason == "gated":
                    return
                bad = row
                continue
            names |= row.keys()
            missing = {column for column in missing if _cell(row, column, _MISSING) is _MISSING}
            try:
                has_text = bool(self._text(row))
            except BadItem as item:
                has_text = False
                if item.reason == "not_text":
                    not_text = not_text or item
            if not missing and has_text:
                return
        if not missing and not_text is not None:
            raise ValueError(
                f"The source {self.name!r} has no text in its first rows: {not_text.detail}. All would be left out, "
                f"one by one. Set `text_column` to a column of text, or of lists of pages, among "
                f"{', '.join(sorted(names))}."
            )
        if not missing:
            return  # the first rows are empty, and others may not be
        if not names:
            why = "It is empty" if bad is None else f"Its first rows are unusable ({bad})"
            raise ValueError(f"The source {self.name!r} has no row that can be read. {why}. Check the files.")
        raise ValueError(
            f"The source {self.name!r} has no column {', '.join(map(repr, sorted(missing)))}. Its columns are "
            f"{', '.join(sorted(names))}. Name those of the text, the id and so on among these."
        )


class HubSource(RowSource):
    """A data set of the Hub, or a local folder laid out like one, streamed."""

    type: Literal["hub"]
    dataset: str = Field(description="Hub id, or path of a folder.")
    config: str | None = Field(None, description="Configuration of the data set.")
    split: str = Field("train", description="Split.")
    revision: str | None = Field(None, description="Commit or branch. Only a commit is the same set in every run.")

    @model_validator(mode="after")
    def _check_terms(self) -> "HubSource":
        forbidden = {corpus.dataset for corpus in CORPORA.values() if not corpus.may_redistribute}
        if self.dataset in forbidden and self.may_redistribute:
            raise ValueError(f"The terms of {self.dataset} forbid to share its texts. Set `may_redistribute: false`.")
        return self

    def rows(self, skip: int, columns: tuple[str, ...] | None) -> Iterator[NamedRow]:
        import datasets  # takes seconds, and other sources do without

        try:
            stream = datasets.load_dataset(
                os.path.expanduser(self.dataset),
                name=self.config,
                split=self.split,
                revision=self.revision,
                streaming=True,
            )
            chosen = _existing(columns, stream.column_names)
            if chosen is not None:
                stream = stream.select_columns(chosen)
            rows = iter(stream.skip(skip))
            row = next(rows, None)
        except Exception as error:  # of many libraries: files of any format come over HTTP
            if not _is_gated(error):
                raise ValueError(
                    f"The data set {self.dataset!r} of the source {self.name!r} cannot be read: {error} Check "
                    "`dataset`, `config`, `split` and `revision`, and that this machine can reach it."
                ) from error
            if skip == 0:
                where = f"https://huggingface.co/datasets/{self.dataset}"
                advice = f"Accept its terms at {where}, run `hf auth login`, and read the source again"
                yield self.dataset, BadItem("gated", f"{self.dataset} is gated. {advice}")
            return
        number = skip
        while row is not None:
            yield f"{self.split}:{number}", row
            try:
                row = next(rows, None)
            except Exception as error:
                raise RuntimeError(
                    f"The stream of {self.dataset!r} broke off after row {number} of the source {self.name!r}: "
                    f"{error} What was read stays. Run again to resume there."
                ) from error
            number += 1


class ParquetSource(RowSource):
    """Local Parquet files: one document per row."""

    type: Literal["parquet"]
    paths: list[str] = Field(min_length=1, description="Files, or patterns of files.")

    def rows(self, skip: int, columns: tuple[str, ...] | None) -> Iterator[NamedRow]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for path, label in labelled_paths(self.paths):
            try:
                file = pq.ParquetFile(path, buffer_size=1 << 20)
            except (OSError, pa.ArrowException) as error:
                if skip == 0:
                    yield label, BadItem("unreadable", str(error))
                skip = max(0, skip - 1)
                continue
            with file:
                chosen = _existing(columns, file.schema_arrow.names)
                first = 0
                for group in range(file.num_row_groups):
                    num_rows = file.metadata.row_group(group).num_rows
                    if skip < num_rows:
                        rows = enumerate(_group_rows(file, group, num_rows, chosen), start=first)
                        yield from ((f"{label}:{number}", row) for number, row in islice(rows, skip, None))
                    skip = max(0, skip - num_rows)
                    first += num_rows


class JsonlSource(RowSource):
    """Local files of JSON objects, one per line, plain or compressed (.gz, .bz2, .xz, .zst)."""

    type: Literal["jsonl"]
    paths: list[str] = Field(min_length=1, description="Files, or patterns of files.")

    def rows(self, skip: int, columns: tuple[str, ...] | None) -> Iterator[NamedRow]:
        max_bytes = _LINE_BYTES_PER_TEXT_BYTE * self.max_document_bytes
        lines = (
            (f"{label}:{number}", line)
            for path, label in labelled_paths(self.paths)
            for number, line in enumerate(iter_lines(path, max_bytes))
        )
        for item, line in islice(lines, skip, None):
            yield item, line if isinstance(line, BadItem) else _parse_json(line)


def _is_gated(error: BaseException | None) -> bool:
    """Whether access was refused because the terms have not been accepted.

    `datasets` raises its own error and hides that of `huggingface_hub`: only the message says so.
    """
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _group_rows(
    file: "pq.ParquetFile", group: int, num_rows: int, columns: list[str] | None
) -> Iterator[dict[str, Any] | BadItem]:
    """The rows of a row group: always as many as its footer says, so that the others keep their numbers."""
    import pyarrow as pa

    num_done = 0
    try:
        for batch in file.iter_batches(batch_size=16, row_groups=[group], columns=columns):
            for index in range(batch.num_rows):
                num_done += 1
                try:
                    row = batch.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError as error:  # Parquet does not check its strings
                    row = BadItem("undecodable", str(error))
                yield row
    except (OSError, pa.ArrowException) as error:
        yield from repeat(BadItem("unreadable", str(error)), num_rows - num_done)


def _parse_json(line: bytes) -> dict[str, Any] | BadItem:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadItem("undecodable", str(error))
    except (ValueError, RecursionError) as error:
        return BadItem("malformed_json", str(error))
    return row if isinstance(row, dict) else BadItem("malformed_json", f"a {type(row).__name__}, not an object")


def _existing(columns: Iterable[str] | None, names: list[str] | None) -> list[str] | None:
    """The top-level columns among `names` that `columns` are in; `None`, for all, if names are unknown."""
    if columns is None or names is None:
        return None
    found = dict.fromkeys(column if column in names else column.partition(".")[0] for column in columns)
    return [column for column in found if column in names] or None


def _cell(row: dict[str, Any], column: str, default: Any = None) -> Any:
    """The value in a column, or in a field of a struct."""
    if column in row:
        return row[column]
    top, _, rest = column.partition(".")
    return _cell(row[top], rest, default) if rest and isinstance(row.get(top), dict) else default


def _label(row: dict[str, Any], column: str | None) -> str | None:
    """The value in a column, as the text of a label."""
    value = None if column is None else _cell(row, column)
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return None if value is None or value == "" else printable(str(value))
