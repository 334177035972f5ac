"""Reading LongBlocks, as published or as built here, into training rows; splitting them; mixing short rows in.

Rows that cannot be trained on leave with a reason, which is counted:

| reason | the row left because |
| --- | --- |
| `no_document` | its document is not in the set, and no copy of the books was given |
| `book_not_found` | the copy of the books does not hold its document, or no page of it |
| `book_differs` | the document put together from the pages is not the one that the question was made from |
| `empty_question`, `empty_answer`, `empty_response` | that column is empty |
| `bad_evidence` | the offsets of its evidence select nothing in the document |
| `prompt_too_short`, `prompt_too_long` | its prompt is outside the token budget |
| `no_messages`, `no_answer_turn`, `not_text` | of conversations: no turn, none that answers at the end, not all text |
"""

import bisect
import hashlib
import itertools
import json
import logging
import sqlite3
import string
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
)

from ..chat import escape_messages, prompt_token_counter
from ..data_loading import DropCounts, load_rows
from .source_configs import BOOK_COLUMNS
from .sources import book_pages


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)
Messages = list[dict[str, str]]

HUB_ID = "utter-project/LongBlocks"
PROMPT_TEMPLATE = "{document}\n\n{question}"
EVIDENCE_JOINER = "\n\n"

_MESSAGES_FEATURE = [{"role": Value("string"), "content": Value("string")}]
_REASON = "drop_reason"
# A prompt has no more tokens than bytes, plus those of the chat template, which are never so many without tools
_MAX_TEMPLATE_TOKENS = 512
# Rows are long: more of them at a time would fill the memory
_ROWS_IN_MEMORY = 64
_MISSING_DOCUMENTS = (
    "Rows have no `document`: books that may not be passed on with LongBlocks. Ask for access to "
    "institutional/institutional-books-1.0 on the Hub and give it, or your copy of it, as `books`; without it these "
    "rows are left out and counted as `no_document`."
)
_EMPTY_SIDE = "`{}` is empty. There is nothing to mix. Check what its filters dropped."


# --- Books


class BookCache:
    """Pages of the books that a set needs, in an SQLite file: of a million volumes, a few may be wanted.

    Args:
        path (`str` or `Path`):
            The file; made if it is not there. It stays where it is, and is added to.
    """

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
    if isinstance(books, (str, Path)):
        books = _read(books, "train", streaming=True)
    if not isinstance(books, (Dataset, IterableDataset)):
        yield from (book for book in books if book["barcode_src"] in wanted)
        return
    for table in books.with_format("arrow").iter(batch_size=_ROWS_IN_MEMORY):
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
    """Ids of the rows without a document: the bar codes to look for.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            LongBlocks; a stream is read to its end.
    """
    ids = set()
    for table in dataset.select_columns(["id", "document"]).with_format("arrow").iter(batch_size=_ROWS_IN_MEMORY):
        ids.update(table.filter(table["document"].is_null())["id"].to_pylist())
    return ids


# --- Training rows


@dataclass(frozen=True)
class _TokenBudget:
    """The lengths that a prompt may have, in tokens, chat template and generation prompt included."""

    tokenizer: "PreTrainedTokenizerBase | None"
    min_tokens: int | None
    max_tokens: int | None
    chat_template_kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        if self.tokenizer is None and (self.min_tokens, self.max_tokens) != (None, None):
            raise ValueError(
                f"`min_prompt_tokens` is {self.min_tokens} and `max_prompt_tokens` is {self.max_tokens}, but there is "
                "no `tokenizer`. Lengths are counted with the student's. Give it, or no budget."
            )

    def escape(self, messages: Messages) -> Messages:
        """Keeps literal special tokens text, as the trainer does; as they are where there is no tokenizer."""
        if self.tokenizer is None:
            return messages
        return escape_messages(messages, self.tokenizer)

    def reason(self, messages: Messages) -> str | None:
        """Why the prompt may not stay. Only one that its size in bytes does not decide is tokenised."""
        if self.min_tokens is None and self.max_tokens is None:
            return None
        at_most = sum(len(message["content"].encode()) for message in messages) + _MAX_TEMPLATE_TOKENS
        if self.min_tokens is None and at_most <= self.max_tokens:
            return None
        if self.min_tokens is not None and at_most < self.min_tokens:
            return "prompt_too_short"
        num_tokens = prompt_token_counter(self.tokenizer, self.chat_template_kwargs, None)([messages])[0]
        if self.min_tokens is not None and num_tokens < self.min_tokens:
            return "prompt_too_short"
        return "prompt_too_long" if self.max_tokens is not None and num_tokens > self.max_tokens else None


@dataclass(frozen=True)
class _QuestionReader:
    """Makes a training row of a row of LongBlocks, or says why not."""

    text_column: str
    is_completion: bool
    prompt_template: str
    system_message: str | None
    budget: _TokenBudget
    books: BookCache | None
    books_digest: str | None
    join_pages: str

    def reason(self, row: dict[str, Any]) -> str | None:
        document = self._document(row)
        if _is_empty(document):
            return "no_document" if row["document"] is not None or self.books is None else "book_not_found"
        if row["document"] is None and row.get("document_sha256"):
            if hashlib.sha256(document.encode()).hexdigest() != row["document_sha256"]:
                return "book_differs"
        if _is_empty(row["question"]):
            return "empty_question"
        if _is_empty(row[self.text_column]):
            return "empty_answer" if self.text_column == "answer" else "empty_response"
        if not all(0 <= start < end <= len(document) for start, end in _spans(row)):
            return "bad_evidence"
        return self.budget.reason(self._prompt(document, row["question"]))

    def training_row(self, row: dict[str, Any]) -> dict[str, Any]:
        document = self._document(row)
        made = {"document": document, "prompt": self._prompt(document, row["question"])}
        if self.is_completion:
            return {**made, "completion": [{"role": "assistant", "content": str(row[self.text_column])}]}
        if "evidence" in row:
            evidence = EVIDENCE_JOINER.join(document[start:end] for start, end in _spans(row))
            made["teacher_prompt"] = self._prompt(evidence, row["question"]) if evidence else None
        return made

    def _document(self, row: dict[str, Any]) -> str | None:
        if row["document"] is not None or self.books is None:
            return row["document"]
        return self.join_pages.join(self.books.pages(row["id"]))

    def _prompt(self, context: str, question: str) -> Messages:
        content = self.prompt_template.format(document=context, question=question)
        messages = [{"role": "user", "content": content}]
        if self.system_message is not None:
            messages.insert(0, {"role": "system", "content": self.system_message})
        return self.budget.escape(messages)


def _is_empty(value: Any) -> bool:
    return value is None or not str(value).strip()


def _spans(row: dict[str, Any]) -> list[tuple[int, int]]:
    """Offsets of the evidence, in the order of the document, none twice; -1 for one that is missing."""
    blocks = row.get("evidence") or ()
    return sorted({tuple(-1 if block[name] is None else block[name] for name in ("start", "end")) for block in blocks})


def load_longblocks(
    name_or_path: str | Path | Dataset | IterableDataset = HUB_ID,
    *,
    split: str = "train",
    streaming: bool = False,
    completion_column: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    min_prompt_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    prompt_template: str = PROMPT_TEMPLATE,
    system_message: str | None = None,
    books: str | Path | Iterable[dict[str, Any]] | None = None,
    books_cache: str | Path | None = None,
    join_pages: str = "\n\n",
    keep_document: bool = True,
    num_proc: int | None = None,
    counts: DropCounts | None = None,
) -> Dataset | IterableDataset:
    """Training rows of LongBlocks, the published set or one built here.

    All columns stay, and these are added:

    - `prompt`: conversational, the document and then the question, in one user message.
    - `teacher_prompt`: the same with only the evidence in place of the document, for the trainer's teacher. Only where
      the set records evidence, and `None` in rows without; not with `completion_column`.
    - `completion`: conversational, the text of `completion_column`, if that is given: TRL's form for `SFTTrainer`.

    Documents that the set may not hold are put together from the pages of `books`, and in rows that record a
    `document_sha256`, checked against it. Rows that cannot be used leave, see [`DropCounts`].

    Args:
        name_or_path (`str`, `Path`, [`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Hub id, folder of Parquet or JSONL files or of `save_to_disk`, one such file, or rows already read. By
            default the published set.
        split (`str`, *optional*, defaults to `"train"`):
            Split to read.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed.
        completion_column (`str`, *optional*):
            Column to learn from in the cold start, such as `"response_Qwen3.5-27B"`. `None` gives rows for dGRPO, with
            the reference in `answer`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's. Counts the budget, and breaks up special tokens that stand literally in prompts.
        min_prompt_tokens, max_prompt_tokens (`int`, *optional*):
            Shortest and longest prompt, both included, in tokens, with the chat template and its generation prompt.
        chat_template_kwargs (`dict`, *optional*):
            What the trainer gives to the chat template.
        prompt_template (`str`, *optional*, defaults to `"{document}\\n\\n{question}"`):
            The user message; holds `{document}` and `{question}`.
        system_message (`str`, *optional*):
            System message of every prompt; `None` for none.
        books (`str`, `Path` or iterable of rows, *optional*):
            `institutional/institutional-books-1.0`: Hub id, file or folder, or its rows, a stream of them too. It is
            read once, unless `books_cache` holds all that is wanted.
        books_cache (`str` or `Path`, *optional*):
            File of a [`BookCache`] that keeps the books found. A stream needs one that was filled before.
        join_pages (`str`, *optional*, defaults to `"\\n\\n"`):
            What stands between two pages; the published set does not state it.
        keep_document (`bool`, *optional*, defaults to `True`):
            Keep the column `document`, which the prompt repeats.
        num_proc (`int`, *optional*):
            Processes to work with; not for streams.
        counts ([`DropCounts`], *optional*):
            Filled with what was dropped, for streams as they flow.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        ValueError: If the set cannot be read or lacks a column, a budget comes without a tokenizer, the template lacks
            a field, or a stream is to be joined with books that are not cached.
    """
    rows = _read(name_or_path, split, streaming)
    text_column = completion_column or "answer"
    _check_columns(rows, ("id", "document", "question", text_column))
    fields = sorted(name for _, name, _, _ in string.Formatter().parse(prompt_template) if name is not None)
    if fields != ["document", "question"]:
        raise ValueError(
            f"`prompt_template` has the fields {fields}. A prompt holds the document and the question, once each. "
            "Write `{document}` and `{question}` in it, and double other braces."
        )
    features = Features({**rows.features, "document": Value("string"), "prompt": _MESSAGES_FEATURE})
    if completion_column is not None:
        features["completion"] = _MESSAGES_FEATURE
    elif "evidence" in features:
        features["teacher_prompt"] = _MESSAGES_FEATURE

    budget = _TokenBudget(tokenizer, min_prompt_tokens, max_prompt_tokens, chat_template_kwargs or {})
    with ExitStack() as stack:
        cache = _book_cache(rows, books, books_cache, stack)
        reader = _QuestionReader(
            text_column=text_column,
            is_completion=completion_column is not None,
            prompt_template=prompt_template,
            system_message=system_message,
            budget=budget,
            books=cache,
            books_digest=None if cache is None else cache.digest(),
            join_pages=join_pages,
        )
        dropped_columns = [] if keep_document else ["document"]
        return _select_and_map(rows, reader, features, dropped_columns, num_proc, counts)


def _read(name_or_path: str | Path | Dataset | IterableDataset, split: str, streaming: bool) -> Any:
    if isinstance(name_or_path, (Dataset, IterableDataset)):
        rows = name_or_path
    else:
        rows = load_rows(str(name_or_path), split=split, streaming=streaming)
    return rows.to_iterable_dataset() if streaming and isinstance(rows, Dataset) else rows


def _check_columns(rows: Dataset | IterableDataset, names: Iterable[str]) -> None:
    if rows.features is None:
        raise ValueError(
            "The columns of this stream are not known. They decide what the training rows hold. State the `features` "
            "in the last `map` that made the stream."
        )
    missing = sorted(set(names) - set(rows.features))
    if missing:
        raise ValueError(
            f"The data set has no column {missing}; its columns are {sorted(rows.features)}. Training rows are made "
            "from them. Rename yours, or name another `completion_column`."
        )


def _book_cache(
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


def _select_and_map(
    rows: AnyDataset,
    reader: "_QuestionReader | _ConversationReader",
    features: Features,
    dropped_columns: list[str],
    num_proc: int | None,
    counts: DropCounts | None,
) -> AnyDataset:
    """The training rows of those rows that the reader has no reason to drop."""
    counts = DropCounts() if counts is None else counts
    made = Features({name: feature for name, feature in features.items() if name not in dropped_columns})
    dropped_columns = [name for name in dropped_columns if name in rows.features]

    if isinstance(rows, IterableDataset):
        # A column that is to go must not come back: `map` removes it only if the function does not return it
        def training_row(row: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in {**row, **reader.training_row(row)}.items() if name in made}

        kept = rows.filter(lambda row: _count(reader.reason(row), counts))
        return kept.map(training_row, remove_columns=dropped_columns, features=made)

    # Reasons first: the long columns are then written once, of the rows that stay
    reasons = (
        rows.map(
            lambda row: {_REASON: reader.reason(row)},
            remove_columns=rows.column_names,
            features=Features({_REASON: Value("string")}),
            num_proc=num_proc,
            desc="Checking rows",
        )[_REASON][:]
        if len(rows)
        else []
    )
    kept = [index for index, reason in enumerate(reasons) if _count(reason, counts)]
    (logger.info if kept else logger.warning)(f"Rows for training:\n{counts.table()}")
    if not kept:  # `map` adds no columns to an empty data set
        return Dataset.from_dict({name: [] for name in made}, features=made)
    return rows.select(kept).map(
        lambda row: {name: value for name, value in reader.training_row(row).items() if name in made},
        remove_columns=dropped_columns,
        features=made,
        num_proc=num_proc,
        writer_batch_size=_ROWS_IN_MEMORY,
        desc="Making training rows",
    )


def _count(reason: str | None, counts: DropCounts) -> bool:
    """Counts a row; whether it stays."""
    counts.add(reason)
    if reason == "no_document" and counts.reasons[reason] == 1:
        logger.warning(_MISSING_DOCUMENTS)
    return reason is None


# --- Short rows


@dataclass(frozen=True)
class _ConversationReader:
    """Makes a training row of a conversation, or says why not."""

    messages_column: str
    is_completion: bool
    budget: _TokenBudget

    def reason(self, row: dict[str, Any]) -> str | None:
        messages = row[self.messages_column]
        if not messages:
            return "no_messages"
        if messages[-1]["role"] != "assistant" or all(message["role"] == "system" for message in messages[:-1]):
            return "no_answer_turn"
        if any(not isinstance(message["content"], str) for message in messages):
            return "not_text"
        if _is_empty(messages[-1]["content"]):
            return "empty_response" if self.is_completion else "empty_answer"
        return self.budget.reason(self._prompt(messages))

    def training_row(self, row: dict[str, Any]) -> dict[str, Any]:
        messages = row[self.messages_column]
        made = {"prompt": self._prompt(messages)}
        answer = messages[-1]["content"]
        if self.is_completion:
            return {**made, "completion": [{"role": "assistant", "content": answer}]}
        return {**made, "answer": answer}

    def _prompt(self, messages: list[dict[str, Any]]) -> Messages:
        """All turns before the last; an empty system message is the same as none."""
        turns = [{"role": message["role"], "content": message["content"]} for message in messages[:-1]]
        return self.budget.escape([turn for turn in turns if turn["role"] != "system" or turn["content"].strip()])


def load_conversations(
    name_or_path: str | Path | Dataset | IterableDataset,
    *,
    split: str = "train",
    streaming: bool = False,
    completion: bool = False,
    messages_column: str = "messages",
    keep_columns: Iterable[str] = (),
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_prompt_tokens: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    num_proc: int | None = None,
    counts: DropCounts | None = None,
) -> Dataset | IterableDataset:
    """Training rows of short conversations, such as the Nemotron sets: the last answer, and all turns before it.

    Args:
        name_or_path (`str`, `Path`, [`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            As for [`load_longblocks`].
        split, streaming, tokenizer, max_prompt_tokens, chat_template_kwargs, num_proc, counts:
            As for [`load_longblocks`].
        completion (`bool`, *optional*, defaults to `False`):
            Give the last answer as conversational `completion`, for `SFTTrainer`, and not as the reference `answer`.
        messages_column (`str`, *optional*, defaults to `"messages"`):
            Column with the turns, each with a `role` and a `content`.
        keep_columns (`Iterable[str]`, *optional*):
            Columns to keep; the others go.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`] with `prompt`, and `answer` or `completion`.

    Raises:
        ValueError: If the set cannot be read, lacks a column, or a budget comes without a tokenizer.
    """
    rows = _read(name_or_path, split, streaming)
    keep_columns = list(keep_columns)
    _check_columns(rows, (messages_column, *keep_columns))
    answer = {"completion": _MESSAGES_FEATURE} if completion else {"answer": Value("string")}
    kept = {name: rows.features[name] for name in keep_columns}
    reader = _ConversationReader(
        messages_column, completion, _TokenBudget(tokenizer, None, max_prompt_tokens, chat_template_kwargs or {})
    )
    features = Features({**kept, "prompt": _MESSAGES_FEATURE, **answer})
    dropped_columns = [name for name in rows.features if name not in features]
    return _select_and_map(rows, reader, features, dropped_columns, num_proc, counts)


# --- Splits, mixtures


def split_by_id(
    dataset: Dataset | IterableDataset, test_share: float, seed: int = 0, column: str = "id"
) -> DatasetDict | IterableDatasetDict:
    """Splits by a hash: a row falls on the same side on every machine, whatever other rows there are.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows.
        test_share (`float`):
            Expected share of `"test"`, between 0 and 1.
        seed (`int`, *optional*, defaults to `0`):
            Another seed gives another split.
        column (`str`, *optional*, defaults to `"id"`):
            Column to hash. With `"document_sha256"`, no document has questions on both sides.

    Returns:
        [`~datasets.DatasetDict`] or [`~datasets.IterableDatasetDict`] with `"train"` and `"test"`.

    Raises:
        ValueError: If the share is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"`test_share` is {test_share}. Both sides are to have rows. Choose between 0 and 1.")

    def is_test(value: Any) -> bool:
        digest = hashlib.sha256(f"{seed}:{value}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < test_share * 2**64

    if isinstance(dataset, IterableDataset):
        sides = {
            "train": dataset.filter(lambda row: not is_test(row[column])),
            "test": dataset.filter(lambda row: is_test(row[column])),
        }
        return IterableDatasetDict(sides)
    sides = {"train": [], "test": []}
    for index, value in enumerate(dataset[column]):
        sides["test" if is_test(value) else "train"].append(index)
    return DatasetDict({name: dataset.select(indices) for name, indices in sides.items()})


@dataclass(frozen=True)
class _Proportion:
    """Which rows of a mixture are short: of the first n, n times the share, rounded."""

    share: Fraction

    def num_short(self, num_rows: int) -> int:
        return (2 * num_rows * self.share.numerator + self.share.denominator) // (2 * self.share.denominator)

    def is_short(self, position: int) -> bool:
        return self.num_short(position + 1) > self.num_short(position)

    def num_rows(self, num_short: int, num_long: int, when_exhausted: str) -> int:
        """Longest mixture of so many rows: until one side ("stop") or both ("repeat") would have to begin again."""
        combine = any if when_exhausted == "stop" else all

        def is_too_long(num_rows: int) -> bool:
            short = self.num_short(num_rows)
            return combine((short > num_short, num_rows - short > num_long))

        bound = 2 + int(max((num_short + 1) / self.share, (num_long + 1) / (1 - self.share)))
        return bisect.bisect_left(range(bound + 1), True, key=is_too_long) - 1


def mix_short_and_long(
    short: Dataset | IterableDataset,
    long: Dataset | IterableDataset,
    short_share: float = 0.1,
    seed: int = 0,
    num_rows: int | None = None,
    when_exhausted: Literal["stop", "repeat"] = "stop",
    buffer_size: int | None = None,
) -> Dataset | IterableDataset:
    """Interleaves short and long rows in exact proportion: of any first n rows, n times the share are short, rounded.

    The paper trains on 10 % of short rows (arXiv 2605.12227), so that what the model does in short contexts is not
    lost. Columns that one side lacks are `None` in its rows. If either is a stream, the mixture is one, in a single
    shard.

    Args:
        short, long ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training rows, see [`load_conversations`] and [`load_longblocks`].
        short_share (`float`, *optional*, defaults to `0.1`):
            Share of short rows, between 0 and 1.
        seed (`int`, *optional*, defaults to `0`):
            Order of the rows of each side. Which positions are short does not depend on it.
        num_rows (`int`, *optional*):
            Rows of the mixture; as many as `when_exhausted` allows by default.
        when_exhausted (`str`, *optional*, defaults to `"stop"`):
            `"stop"`: the mixture ends where a side has no row left. `"repeat"`: that side begins again (in another
            order, unless it is a stream) until the other one is used up too.
        buffer_size (`int`, *optional*):
            Rows of each stream that are held in memory to shuffle it; `None` keeps its order.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        ValueError: If an argument is out of range, a side is empty or too small for `num_rows`, or the same column has
            two types.
    """
    if not 0 < short_share < 1:
        raise ValueError(f"`short_share` is {short_share}. A mixture has rows of both sides. Choose between 0 and 1.")
    if when_exhausted not in ("stop", "repeat"):
        raise ValueError(f"`when_exhausted` is {when_exhausted!r}. It must be 'stop' or 'repeat'.")
    for name, side in (("short", short), ("long", long)):
        if isinstance(side, Dataset) and len(side) == 0:
            raise ValueError(_EMPTY_SIDE.format(name))
    proportion = _Proportion(Fraction(str(short_share)))  # by way of its digits: 0.1 is not a tenth in binary
    if isinstance(short, Dataset) and isinstance(long, Dataset):
        return _mix_tables(short, long, proportion, seed, num_rows, when_exhausted)
    sides = [_shuffled_stream(side, seed, buffer_size) for side in (short, long)]
    return IterableDataset.from_generator(
        _mixed_rows,
        gen_kwargs={
            "short": sides[0],
            "long": sides[1],
            "proportion": proportion,
            "num_rows": num_rows,
            "when_exhausted": when_exhausted,
        },
        features=_common_features(short, long),
    )


def _mix_tables(
    short: Dataset, long: Dataset, proportion: _Proportion, seed: int, num_rows: int | None, when_exhausted: str
) -> Dataset:
    longest = proportion.num_rows(len(short), len(long), when_exhausted)
    if num_rows is None:
        num_rows = longest
    elif num_rows > longest and when_exhausted == "stop":
        raise ValueError(
            f"`num_rows` is {num_rows}, but {len(short)} short and {len(long)} long rows make {longest} at a share of "
            f"{float(proportion.share)}. Ask for fewer, or set `when_exhausted` to 'repeat'."
        )
    num_short = proportion.num_short(num_rows)
    short_indices = iter(_order(len(short), num_short, f"{seed}:short"))
    long_indices = iter(_order(len(long), num_rows - num_short, f"{seed}:long"))
    indices = [
        next(short_indices) if proportion.is_short(position) else len(short) + next(long_indices)
        for position in range(num_rows)
    ]
    _common_features(short, long)  # raises where `concatenate_datasets` would, with a way out
    return concatenate_datasets([short, long]).select(indices)


def _order(num_rows: int, num_wanted: int, seed: str) -> list[int]:
    """Indices of rows, all of them before any comes again."""
    indices = []
    for epoch in itertools.count():
        if len(indices) >= num_wanted:
            return indices[:num_wanted]
        indices += Random(f"{seed}:{epoch}").sample(range(num_rows), num_rows)


def _shuffled_stream(side: Dataset | IterableDataset, seed: int, buffer_size: int | None) -> IterableDataset:
    if isinstance(side, Dataset):
        return side.shuffle(seed=seed).to_iterable_dataset()
    return side if buffer_size is None else side.shuffle(seed=seed, buffer_size=buffer_size)


def _common_features(short: Dataset | IterableDataset, long: Dataset | IterableDataset) -> Features:
    """Columns of both sides; a column that holds nothing on one side has the type of the other."""
    for side in (short, long):
        _check_columns(side, ())
    empty = Value("null")
    features = dict(long.features)
    for name, feature in short.features.items():
        other = features.get(name, empty)
        if empty not in (feature, other) and feature != other:
            raise ValueError(
                f"Column {name!r} is {feature} in `short` and {other} in `long`. A column has one type. Cast or "
                "remove it on one side."
            )
        features[name] = other if feature == empty else feature
    return Features(features)


def _mixed_rows(
    short: IterableDataset,
    long: IterableDataset,
    proportion: _Proportion,
    num_rows: int | None,
    when_exhausted: str,
) -> Iterator[dict[str, Any]]:
    columns = list(_common_features(short, long))
    sides = {True: short, False: long}
    rows = {is_short: iter(side) for is_short, side in sides.items()}
    exhausted = set()
    for position in itertools.count() if num_rows is None else range(num_rows):
        is_short = proportion.is_short(position)
        row = next(rows[is_short], None)
        if row is None:
            exhausted.add(is_short)
            if when_exhausted == "stop" or (num_rows is None and len(exhausted) == 2):
                break
            rows[is_short] = iter(sides[is_short])
            row = next(rows[is_short], None)
            if row is None:
                raise ValueError(_EMPTY_SIDE.format("short" if is_short else "long"))
        yield {name: row.get(name) for name in columns}
    else:
        return
    if num_rows is not None:
        side = "short" if is_short else "long"
        logger.warning(f"The mixture ends after {position:,} of {num_rows:,} rows: `{side}` has no more.")
