"""Data of a training run, as its recipe describes it: LongBlocks or any prompts, short rows, rows held out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .chat import escape_messages, num_row_tokens
from .config import LongBlocksArguments
from .data_loading import AnyDataset, load_rows, require_columns
from .longblocks import load_conversations, load_longblocks, mix_short_and_long, split_by_id
from .longblocks.read.rows import TokenBudget


logger = logging.getLogger(__name__)


def load_training_data(
    args: LongBlocksArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_column: str | None = None,
    max_length: int | None = None,
    chat_template_kwargs: dict | None = None,
    seed: int = 0,
    with_test: bool = False,
) -> tuple[AnyDataset, AnyDataset | None]:
    """Rows to train on, and rows to evaluate on.

    Args:
        args ([`LongBlocksArguments`]):
            What the recipe says.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's. Counts prompts, and breaks up special tokens that stand literally in them.
        completion_column (`str`, *optional*):
            Column to learn from by SFT; the rows then have `prompt` and `completion` alone. Without it they have
            `prompt` and all their columns, for dGRPO.
        max_length (`int`, *optional*):
            Longest row for SFT, prompt and completion, in tokens. Longer ones are left out and counted; `SFTTrainer`
            would cut them, and train on answers without their ends.
        chat_template_kwargs (`dict`, *optional*):
            What the trainer gives to the chat template.
        seed (`int`, *optional*, defaults to `0`):
            Order of the mixture, and choice of the documents held out.
        with_test (`bool`, *optional*, defaults to `False`):
            Also give rows to evaluate on: those held out, or the split `dataset_test_split`. No short row is among
            them.

    Returns:
        `tuple`: two data sets; the second is `None` without `with_test`.

    Raises:
        ValueError: If a set cannot be read or lacks a column, a share is out of range, or no row is left.
    """
    if not 0 <= args.test_share < 1:
        raise ValueError(
            f"`test_share` is {args.test_share}. It is a share of the documents. Choose from 0 to below 1."
        )
    if args.dataset_name is None:
        raise ValueError("`dataset_name` is missing. There is nothing to train on. Set it in the recipe or as a flag.")
    reader = _Reader(args, tokenizer, completion_column, chat_template_kwargs or {})
    train, test = reader.long_rows(args.dataset_train_split), None
    if args.test_share > 0:
        column = next((c for c in ("document_sha256", "id") if c in (train.column_names or ())), None)
        if column is None:
            raise ValueError(
                f"`test_share` is {args.test_share}, but the rows have no column 'id'. Documents are held out by a "
                "hash of it. Add one, or set `test_share: 0`."
            )
        sides = split_by_id(train, args.test_share, seed, column)
        train, test = sides["train"], sides["test"] if with_test else None
    elif with_test:
        test = reader.long_rows(args.dataset_test_split)
    if completion_column is not None:
        train = reader.for_sft(train, max_length)
        test = None if test is None else reader.for_sft(test, max_length)
    if isinstance(train, Dataset) and len(train) == 0:
        raise ValueError(
            f"No row of {args.dataset_name!r} is left to train on. The log says why they were left out. Raise "
            "`max_prompt_tokens`, or give `books` where rows have no document."
        )
    if args.short_dataset_name is not None and args.short_share != 0:
        short = reader.short_rows()
        if completion_column is not None:
            short = reader.for_sft(short, max_length)
        train = mix_short_and_long(short, train, args.short_share, seed)
        logger.info(f"{args.short_share:.0%} of the rows are short, from {args.short_dataset_name}")
    return train, test


def load_questions(
    name_or_path: str, tokenizer: PreTrainedTokenizerBase, split: str = "train", system_message: str | None = None
) -> Dataset:
    """Held-out rows with a `prompt` to evaluate: as they are, or made of LongBlocks rows.

    Args:
        name_or_path (`str`):
            File, folder or Hub id.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's. Breaks up special tokens that stand literally in LongBlocks rows.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a data set of the Hub.
        system_message (`str`, *optional*):
            System turn of prompts made of LongBlocks rows.

    Raises:
        ValueError: If they cannot be read, or have neither a `prompt` nor the columns of LongBlocks.
    """
    rows = load_rows(name_or_path, split=split)
    if "prompt" in rows.column_names:
        return rows
    return load_longblocks(rows, tokenizer=tokenizer, system_message=system_message)


@dataclass(frozen=True)
class _Reader:
    args: LongBlocksArguments
    tokenizer: PreTrainedTokenizerBase
    completion_column: str | None
    chat_template_kwargs: dict

    def long_rows(self, split: str) -> AnyDataset:
        """Rows of `dataset_name` with a `prompt`, within the budget; all their columns are kept."""
        args = self.args
        rows = load_rows(args.dataset_name, args.dataset_config, split, args.dataset_streaming)
        if rows.column_names is not None and "prompt" in rows.column_names:
            return self._with_completion(self._within_budget(rows))
        return load_longblocks(
            rows,
            streaming=args.dataset_streaming,
            completion_column=self.completion_column,
            tokenizer=self.tokenizer,
            max_prompt_tokens=args.max_prompt_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
            books=args.books,
            books_cache=args.books_cache,
            keep_document=False,
        )

    def short_rows(self) -> AnyDataset:
        return load_conversations(
            self.args.short_dataset_name,
            split=self.args.short_dataset_split,
            streaming=self.args.dataset_streaming,
            completion=self.completion_column is not None,
            tokenizer=self.tokenizer,
            max_prompt_tokens=self.args.max_prompt_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def for_sft(self, rows: AnyDataset, max_length: int | None) -> AnyDataset:
        """`prompt` and `completion` alone (TRL would take other columns for parts of the example), none too long."""
        rows = rows.select_columns(["prompt", "completion"])
        if max_length is None:
            return rows

        def fits(row: dict) -> bool:
            return num_row_tokens(row["prompt"], row["completion"], self.tokenizer) <= max_length

        return self._filtered(rows, fits, "longer_than_max_length")

    def _filtered(self, rows: AnyDataset, keeps: Callable[[dict], bool], reason: str) -> AnyDataset:
        kept = rows.filter(keeps)
        if isinstance(rows, Dataset) and len(kept) < len(rows):
            logger.warning(f"{len(rows) - len(kept)} of {len(rows)} rows are left out: {reason}")
        return kept

    def _within_budget(self, rows: AnyDataset) -> AnyDataset:
        if self.args.max_prompt_tokens is None:
            return rows
        budget = TokenBudget(self.tokenizer, None, self.args.max_prompt_tokens, self.chat_template_kwargs)
        return self._filtered(rows, lambda row: budget.reason(row["prompt"]) is None, "prompt_too_long")

    def _with_completion(self, rows: AnyDataset) -> AnyDataset:
        if self.completion_column is None:
            return rows
        require_columns(
            rows.column_names,
            [self.completion_column],
            f"`dataset_name` ({self.args.dataset_name!r})",
            "SFT learns it.",
            "Rename one, or set `completion_column`.",
        )

        def convert(row: dict) -> dict:
            prompt = row["prompt"]
            if isinstance(prompt, str):
                return {"completion": row[self.completion_column]}
            completion = [{"role": "assistant", "content": row[self.completion_column]}]
            return {"prompt": escape_messages(prompt, self.tokenizer), "completion": completion}

        return rows.map(convert)
