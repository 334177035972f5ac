"""Data of a training run, as its recipe describes it: LongBlocks or any prompts, short rows, rows held out."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset, ReadInstruction
from transformers import PreTrainedTokenizerBase

from .chat import escape_messages, num_row_tokens
from .checks import raise_problems
from .config import LongBlocksArguments
from .data_loading import AnyDataset, MissingSplitError, load_rows, require_columns
from .longblocks import load_conversations, load_longblocks, mix_short_and_long, split_by_id
from .longblocks.read.documents import COLUMNS
from .longblocks.read.rows import TokenBudget, is_empty
from .row_checks import prompt_column_problems, prompt_problems


logger = logging.getLogger(__name__)


def load_training_data(
    args: LongBlocksArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_column: str | None = None,
    max_length: int | None = None,
    chat_template_kwargs: dict | None = None,
    keep_special_tokens: Collection[str] = (),
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
        keep_special_tokens (`Collection[str]`, *optional*):
            Special tokens that are not broken up.
        seed (`int`, *optional*, defaults to `0`):
            Order of the mixture, and choice of the documents held out.
        with_test (`bool`, *optional*, defaults to `False`):
            Also give rows to evaluate on: those held out, those of `eval_dataset_name`, or the split
            `dataset_test_split`. No short row is among them.

    Returns:
        `tuple`: two data sets; the second is `None` without `with_test`.

    Raises:
        ValueError: If a set cannot be read or lacks a column, a share is out of range, no row is left, or rows to
            evaluate on are missing or are trained on.
    """
    _check_arguments(args)
    reader = _Reader(args, tokenizer, completion_column, chat_template_kwargs or {}, keep_special_tokens)
    train, test = reader.long_rows(args.dataset_name, args.dataset_train_split), None
    if args.test_share > 0:
        if not set(COLUMNS) & set(train.column_names or ()):
            raise ValueError(
                f"`test_share` is {args.test_share}, but the rows have no column 'id' or 'document_id'. Documents are "
                "held out by a hash of it. Add one, or set `test_share: 0`."
            )
        sides = split_by_id(train, args.test_share, seed)
        train, test = sides["train"], sides["test"] if with_test else None
        if isinstance(test, Dataset) and len(test) == 0:
            raise ValueError(
                f"`test_share` is {args.test_share}, which holds none of the documents of {args.dataset_name!r} out. "
                "All rows of a document are held out together. Raise it, or give `eval_dataset_name`."
            )
    elif with_test:
        test = reader.rows_to_evaluate()
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


def _check_arguments(args: LongBlocksArguments) -> None:
    if not 0 <= args.test_share < 1:
        raise ValueError(
            f"`test_share` is {args.test_share}. It is a share of the documents. Choose from 0 to below 1."
        )
    if args.dataset_name is None:
        raise ValueError("`dataset_name` is missing. There is nothing to train on. Set it in the recipe or as a flag.")
    if args.eval_dataset_name is not None and args.test_share > 0:
        raise ValueError(
            f"`eval_dataset_name` is {args.eval_dataset_name!r}, and `test_share` is {args.test_share}. Rows to "
            "evaluate on come from one of them. Remove the other."
        )


def splits_overlap(first: str, second: str) -> bool:
    """Whether two splits in the notation of `datasets`, such as `"train[:90%]"`, have rows in common."""
    names = {part.partition("[")[0].strip() for part in f"{first}+{second}".split("+")}
    num_rows = dict.fromkeys(names, 10**9)  # whatever they are: shares of them are compared

    def parts(spec: str) -> list[tuple[str, int, int]]:
        found = ReadInstruction.from_spec(spec).to_absolute(num_rows)
        return [(p.splitname, p.from_ or 0, 10**9 if p.to is None else p.to) for p in found]

    return any(
        name == other and max(start, other_start) < min(stop, other_stop)
        for name, start, stop in parts(first)
        for other, other_start, other_stop in parts(second)
    )


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
    keep_special_tokens: Collection[str]

    def rows_to_evaluate(self) -> AnyDataset:
        """Those of `eval_dataset_name`, or of `dataset_test_split`.

        Raises:
            ValueError: If they cannot be read, or are rows that are trained on.
        """
        args = self.args
        name = args.eval_dataset_name or args.dataset_name
        ways_out = (
            "Name other rows with `eval_dataset_name`, or a split that there is with `dataset_test_split` (parts too: "
            "'train[90%:]' beside `dataset_train_split: train[:90%]`), hold documents out with `test_share`, or set "
            "`eval_strategy: 'no'`."
        )
        is_own = name == args.dataset_name or Path(name).resolve() == Path(args.dataset_name).resolve()
        if is_own and splits_overlap(args.dataset_train_split, args.dataset_test_split):
            raise ValueError(
                f"The split {args.dataset_test_split!r} of {name!r} would be evaluated on, and "
                f"{args.dataset_train_split!r} is trained on. These are the same rows, in part at least. {ways_out}"
            )
        try:
            return self.long_rows(name, args.dataset_test_split, needs_split=True)
        except MissingSplitError as error:
            if not is_own and len(error.available) == 1:
                return self.long_rows(name, error.available[0])
            raise ValueError(f"There are no rows to evaluate on: {error} {ways_out}") from error
        except ValueError as error:
            raise ValueError(f"There are no rows to evaluate on: {error} {ways_out}") from error

    def long_rows(self, name: str, split: str, needs_split: bool = False) -> AnyDataset:
        """Rows with a `prompt`, within the budget; all their columns are kept."""
        args = self.args
        config = args.dataset_config if name == args.dataset_name else None
        rows = load_rows(name, config, split, args.dataset_streaming, needs_split)
        columns = rows.column_names
        if columns is not None and "prompt" in columns:
            return self._with_completion(self._within_budget(_readable(rows, name)), name)
        if columns is not None and "document" not in columns:
            raise_problems(prompt_column_problems(columns, f"The data set {name!r}"))
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
            keep_special_tokens=self.keep_special_tokens,
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
            keep_special_tokens=self.keep_special_tokens,
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
        budget = TokenBudget(
            self.tokenizer, None, self.args.max_prompt_tokens, self.chat_template_kwargs, self.keep_special_tokens
        )
        return self._filtered(rows, lambda row: budget.reason(row["prompt"]) is None, "prompt_too_long")

    def _with_completion(self, rows: AnyDataset, name: str) -> AnyDataset:
        column = self.completion_column
        if column is None:
            return rows
        require_columns(
            rows.column_names,
            [column],
            f"The data set {name!r}",
            "SFT learns it.",
            "Rename one, or set `completion_column`.",
        )
        rows = self._filtered(rows, lambda row: not is_empty(row[column]), "empty_completion")

        def convert(row: dict) -> dict:
            prompt, completion = row["prompt"], row[column]
            if isinstance(prompt, str):
                return {"completion": str(completion)}
            if not isinstance(completion, list):  # of messages
                completion = [{"role": "assistant", "content": str(completion)}]
            return {
                "prompt": escape_messages(prompt, self.tokenizer, self.keep_special_tokens),
                "completion": completion,
            }

        return rows.map(convert)


def _readable(rows: AnyDataset, name: str) -> AnyDataset:
    """`rows`, whose prompts can be read; those of a stream are checked as they come.

    Raises:
        ValueError: If a prompt cannot be read.
    """

    def is_readable(row: dict) -> bool:
        raise_problems(prompt_problems([row["prompt"]], f"The stream {name!r}"))
        return True

    if isinstance(rows, IterableDataset):
        return rows.filter(is_readable)
    raise_problems(prompt_problems(rows["prompt"], f"The data set {name!r}"))
    return rows
