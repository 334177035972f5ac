"""What all readers share: which rows of a data set can be trained on, and what becomes of them.

Rows that cannot be trained on leave with a reason, see [`reasons`].
"""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from datasets import Dataset, Features, IterableDataset, Value

from ...chat import Prompt, escape_messages, max_num_tokens, num_prompt_tokens
from ...data_loading import DropCounts, load_rows, require_columns


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)
Messages = list[dict[str, str]]

MESSAGES_FEATURE = [{"role": Value("string"), "content": Value("string")}]
_REASON = "drop_reason"
# Rows are long: more of them at a time would fill the memory
ROWS_IN_MEMORY = 64
_MISSING_DOCUMENTS = (
    "Rows have no `document`: books that LongBlocks may not redistribute. Ask for access to "
    "institutional/institutional-books-1.0 on the Hub and give it, or your copy of it, as `books`; without it these "
    "rows are left out and counted as `no_document`."
)


class RowReader(Protocol):
    """Makes a training row of a row of a data set, or says why not."""

    def reason(self, row: dict[str, Any]) -> str | None:
        """Why the row cannot be used, or `None`."""

    def training_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the row becomes: columns to add or to replace."""


@dataclass(frozen=True)
class TokenBudget:
    """The lengths that a prompt may have, in tokens, chat template and generation prompt included."""

    tokenizer: "PreTrainedTokenizerBase | None"
    min_tokens: int | None
    max_tokens: int | None
    chat_template_kwargs: dict[str, Any]
    keep_special_tokens: Collection[str] = ()

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
        return escape_messages(messages, self.tokenizer, self.keep_special_tokens)

    def reason(self, prompt: Prompt) -> str | None:
        """Why the prompt may not stay. Only one that its size in bytes does not decide is tokenized."""
        if self.tokenizer is None or (self.min_tokens is None and self.max_tokens is None):
            return None
        at_most = max_num_tokens(prompt)
        if self.min_tokens is None and self.max_tokens is not None and at_most <= self.max_tokens:
            return None
        if self.min_tokens is not None and at_most < self.min_tokens:
            return "prompt_too_short"
        num_tokens = num_prompt_tokens(
            prompt, self.tokenizer, self.chat_template_kwargs, keep_special_tokens=self.keep_special_tokens
        )
        if self.min_tokens is not None and num_tokens < self.min_tokens:
            return "prompt_too_short"
        return "prompt_too_long" if self.max_tokens is not None and num_tokens > self.max_tokens else None


def is_empty(value: Any) -> bool:
    """Whether a column holds nothing, or white space."""
    return value is None or not str(value).strip()


def read_rows(
    name_or_path: str | Path | Dataset | IterableDataset, split: str, streaming: bool
) -> Dataset | IterableDataset:
    """A data set as it is given, or read; as a stream if it is to be one."""
    if isinstance(name_or_path, (Dataset, IterableDataset)):
        rows = name_or_path
    else:
        rows = load_rows(str(name_or_path), split=split, streaming=streaming)
    return rows.to_iterable_dataset() if streaming and isinstance(rows, Dataset) else rows


def check_columns(rows: Dataset | IterableDataset, names: Iterable[str]) -> None:
    """Raises a `ValueError` if the columns are not known, or some are missing."""
    if rows.features is None:
        raise ValueError(
            "The columns of this stream are not known. They decide what the training rows hold. State the `features` "
            "in the last `map` that made the stream."
        )
    require_columns(
        rows.features,
        names,
        "The data set",
        "Training rows are made from them.",
        "Rename yours, or name another `completion_column`.",
    )


def select_and_map(
    rows: AnyDataset,
    reader: RowReader,
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
        writer_batch_size=ROWS_IN_MEMORY,
        desc="Making training rows",
    )


def _count(reason: str | None, counts: DropCounts) -> bool:
    """Counts a row; whether it stays."""
    counts.add(reason)
    if reason == "no_document" and counts.reasons[reason] == 1:
        logger.warning(_MISSING_DOCUMENTS)
    return reason is None
