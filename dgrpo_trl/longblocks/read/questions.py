"""LongBlocks as training rows: a long document, a question, and the answer or a teacher's response."""

import hashlib
import string
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, IterableDataset, Value

from ...data_loading import DropCounts
from .books import BookCache, filled_cache
from .documents import document_key
from .rows import MESSAGES_FEATURE, Messages, TokenBudget, check_columns, is_empty, read_rows, select_and_map


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_ID = "utter-project/LongBlocks"
PROMPT_TEMPLATE = "{document}\n\n{question}"
EVIDENCE_JOINER = "\n\n"


@dataclass(frozen=True)
class _QuestionReader:
    """Makes a training row of a row of LongBlocks, or says why not."""

    text_column: str
    is_completion: bool
    prompt_template: str
    system_message: str | None
    budget: TokenBudget
    books: BookCache | None
    books_digest: str | None
    join_pages: str

    def reason(self, row: dict[str, Any]) -> str | None:
        document = self._document(row)
        if is_empty(document):
            return "no_document" if row["document"] is not None or self.books is None else "book_not_found"
        if row["document"] is None and row.get("document_sha256"):
            if hashlib.sha256(document.encode()).hexdigest() != row["document_sha256"]:
                return "book_differs"
        if is_empty(row["question"]):
            return "empty_question"
        if is_empty(row[self.text_column]):
            return "empty_answer" if self.text_column == "answer" else "empty_response"
        if not all(0 <= start < end <= len(document) for start, end in _spans(row)):
            return "bad_evidence"
        return self.budget.reason(self._prompt(document, row["question"]))

    def training_row(self, row: dict[str, Any]) -> dict[str, Any]:
        document = self._document(row)
        made: dict[str, Any] = {
            "document": document,
            "document_id": document_key({**row, "document": document}),
            "prompt": self._prompt(document, row["question"]),
        }
        if self.is_completion:
            return {**made, "completion": [{"role": "assistant", "content": str(row[self.text_column])}]}
        if "evidence" in row:
            evidence = EVIDENCE_JOINER.join(document[start:end] for start, end in _spans(row))
            made["teacher_prompt"] = self._prompt(evidence, row["question"]) if evidence else None
        return made

    def _document(self, row: dict[str, Any]) -> str:
        if row["document"] is not None or self.books is None:
            return row["document"] or ""
        return self.join_pages.join(self.books.pages(row["id"]))

    def _prompt(self, context: str, question: str) -> Messages:
        content = self.prompt_template.format(document=context, question=question)
        messages = [{"role": "user", "content": content}]
        if self.system_message is not None:
            messages.insert(0, {"role": "system", "content": self.system_message})
        return self.budget.escape(messages)


def _spans(row: dict[str, Any]) -> list[tuple[int, int]]:
    """Offsets of the evidence, in the order of the document, none twice; -1 for one that is missing."""
    blocks = row.get("evidence") or ()
    spans = {(block["start"], block["end"]) for block in blocks}
    return sorted((-1 if start is None else start, -1 if end is None else end) for start, end in spans)


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
    keep_special_tokens: Collection[str] = (),
    num_proc: int | None = None,
    counts: DropCounts | None = None,
) -> Dataset | IterableDataset:
    """Training rows of LongBlocks, the published set or one built here.

    All columns stay, and these are added:

    - `prompt`: conversational, the document and then the question, in one user message.
    - `teacher_prompt`: the same with only the evidence in place of the document, for the trainer's teacher. Only where
      the set records evidence, and `None` in rows without; not with `completion_column`.
    - `document_id`: names the document, so that rows of one are held out together; where the set has none, by the text
      of the document, see [`split_by_id`].
    - `completion`: conversational, the text of `completion_column`, if that is given: TRL's form for `SFTTrainer`.

    Documents that the set may not hold are joined from the pages of `books`, and checked against the `document_sha256`
    of rows that record one. Rows that cannot be used leave, see [`DropCounts`].

    Args:
        name_or_path (`str`, `Path`, [`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Hub id, folder of Parquet or JSONL files or of `save_to_disk`, one such file, or rows already read. By
            default the published set.
        split (`str`, *optional*, defaults to `"train"`), streaming (`bool`, *optional*, defaults to `False`):
            Split to read, and whether rows are read as they are needed.
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
        keep_special_tokens (`Collection[str]`, *optional*):
            Special tokens that are not broken up; `["all"]` for all of them.
        num_proc (`int`, *optional*), counts ([`DropCounts`], *optional*):
            Processes to work with, not for streams; filled with what was dropped, for streams as they flow.

    Raises:
        ValueError: If the set cannot be read or lacks a column, a budget comes without a tokenizer, the template lacks
            a field, or a stream is to be joined with books that are not cached.
    """
    rows = read_rows(name_or_path, split, streaming)
    text_column = completion_column or "answer"
    check_columns(rows, ("id", "document", "question", text_column))
    fields = sorted(name for _, name, _, _ in string.Formatter().parse(prompt_template) if name is not None)
    if fields != ["document", "question"]:
        raise ValueError(
            f"`prompt_template` has the fields {fields}. A prompt holds the document and the question, once each. "
            "Write `{document}` and `{question}` in it, and double other braces."
        )
    texts = dict.fromkeys(("document", "document_id"), Value("string"))
    features = Features({**rows.features, **texts, "prompt": MESSAGES_FEATURE})
    if completion_column is not None:
        features["completion"] = MESSAGES_FEATURE
    elif "evidence" in features:
        features["teacher_prompt"] = MESSAGES_FEATURE

    budget = TokenBudget(
        tokenizer, min_prompt_tokens, max_prompt_tokens, chat_template_kwargs or {}, keep_special_tokens
    )
    with ExitStack() as stack:
        cache = filled_cache(rows, books, books_cache, stack)
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
        return select_and_map(rows, reader, features, dropped_columns, num_proc, counts)
