"""Questions about held-out rows of LongBlocks."""

import bisect
import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..chat import escape_messages
from ..data_loading import DropCounts, require_columns
from ..longblocks.read.documents import document_key
from ..rewards import normalize_answer
from ..training_data import load_questions
from .arguments import EvaluationArguments
from .samples import Sample, count_tokens, prompt_text


logger = logging.getLogger(__name__)

_ANY_LENGTH = 1 << 40


def question_cells(
    args: EvaluationArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[tuple[str, int], list[Sample]]:
    """The questions of `args.questions`, by task and length.

    A column `length_bin` is the length of its row; without it, it is the smallest of `lengths` that fits the row.
    Raises a `ValueError` if they cannot be read, lack a column, or no length is given.
    """
    if args.questions is None:
        return {}
    rows = load_questions(args.questions, tokenizer, args.questions_split, args.system_message)
    require_columns(
        rows.column_names,
        [args.prompt_column, "answer", "id"],
        f"`questions` ({args.questions!r})",
        "Prompts are asked and answers compared.",
        "Rename one, or set `prompt_column`.",
    )

    def samples_of(rows: Iterable[dict[str, Any]], lengths: Sequence[int]) -> dict[tuple[str, int], list[Sample]]:
        return question_samples(
            *(rows, lengths, tokenizer),
            num_samples=args.num_samples,
            prompt_column=args.prompt_column,
            max_new_tokens=args.max_new_tokens,
        )

    if "length_bin" not in rows.column_names:
        if not args.lengths:
            raise ValueError("`questions` need `lengths`, in tokens, or a column 'length_bin'. Set `lengths`.")
        return samples_of(rows, args.lengths)
    by_length: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_length[row["length_bin"]].append(row)
    cells = {
        (task, length): samples
        for length, part in by_length.items()
        for (task, _), samples in samples_of(part, [_ANY_LENGTH]).items()
    }
    return {cell: cells[cell] for cell in sorted(cells)}


def question_samples(
    rows: Iterable[dict[str, Any]],
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int | None = None,
    prompt_column: str = "prompt",
    max_new_tokens: int = 32,
) -> dict[tuple[str, int], list[Sample]]:
    """The questions of held-out LongBlocks rows, by task and by length, both sorted; there are no empty cells.

    The length of a row is the smallest of `lengths`, in tokens, that fits its prompt and `max_new_tokens`. Rows that
    fit none, or without an answer to compare with, are dropped; how many is logged. Which rows make up the
    `num_samples` of a cell depends on their ids alone. Those of the same document are next to each other and
    `shared_with` each other, if their prompts begin with it.

    Args:
        rows (iterable of `dict`):
            Rows of [`load_longblocks`], with messages in `prompt_column`, `answer` (a text, or several, any of them
            correct), `id`, and optionally `task` (default `"questions"`), `document_id`,
            and `document_sha256` or `document`. Samples of one document have one [`Sample.document`].

    Raises:
        ValueError: If there are no lengths, no row is left, or the tokenizer has no chat
            template.
    """
    if not lengths:
        raise ValueError("`lengths` is empty. Rows are grouped by length. Give at least one.")
    lengths = sorted(lengths)
    counts = DropCounts()
    num_of_id: Counter[str] = Counter()
    cells: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for row in rows:
        num_of_id[row["id"]] += 1  # in the published set, the questions of one document have one id
        answers = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"] or ())
        references = tuple(answer for answer in answers if answer and normalize_answer(answer))
        messages = escape_messages(row[prompt_column], tokenizer)
        num_tokens = count_tokens(prompt_text(messages, "", tokenizer), tokenizer)
        index = bisect.bisect_left(lengths, num_tokens + max_new_tokens)
        reason = "no_answer" if not references else "prompt_too_long" if index == len(lengths) else None
        counts.add(reason)
        if reason is not None:
            continue
        task, text = row.get("task") or "questions", row.get("document_sha256")
        if not text:
            text = hashlib.sha256(row["document"].encode()).hexdigest() if row.get("document") else None
        number = "" if num_of_id[row["id"]] == 1 else f"-{num_of_id[row['id']]}"
        cells[task, lengths[index]].append(
            Sample(
                id=f"{task}-{row['id']}{number}",
                messages=messages,
                answer_prefix="",
                references=references,
                max_new_tokens=max_new_tokens,
                num_tokens=num_tokens,
                shared_with=text,
                document=document_key(row),
            )
        )
    if counts.reasons:
        logger.warning("Rows that are evaluated, and that are dropped:\n%s", counts.table())
    if not cells:
        raise ValueError(
            f"All {counts.num_rows} rows are dropped: {dict(counts.reasons)}. There is nothing to evaluate. Give "
            f"rows with answers, or a length over {lengths[-1]} tokens."
        )
    if num_samples is not None:  # the same ones whatever the order of the rows
        for cell, samples in cells.items():
            cells[cell] = sorted(samples, key=lambda s: hashlib.sha256(s.id.encode()).digest())[:num_samples]
    return {cell: _with_documents(cells[cell]) for cell in sorted(cells)}


def _with_documents(samples: list[Sample]) -> list[Sample]:
    """Puts samples of one document next to each other; removes `shared_with` if they do not begin with it."""
    groups: dict[str | None, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.shared_with].append(sample)
    for document, group in groups.items():
        texts = [repr(sample.messages) for sample in group]
        if document is not None and 2 * len(os.path.commonprefix(texts)) < min(map(len, texts)):
            groups[document] = [replace(sample, shared_with=None) for sample in group]
    return [sample for group in groups.values() for sample in group]
