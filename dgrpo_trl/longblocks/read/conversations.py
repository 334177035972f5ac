"""Short conversations as training rows: the last answer, and all turns before it."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, IterableDataset, Value

from ...data_loading import DropCounts
from .rows import MESSAGES_FEATURE, Messages, TokenBudget, check_columns, is_empty, read_rows, select_and_map


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _ConversationReader:
    """Makes a training row of a conversation, or says why not."""

    messages_column: str
    is_completion: bool
    budget: TokenBudget

    def reason(self, row: dict[str, Any]) -> str | None:
        messages = row[self.messages_column]
        if not messages:
            return "no_messages"
        if messages[-1]["role"] != "assistant" or all(message["role"] == "system" for message in messages[:-1]):
            return "no_answer_turn"
        if any(not isinstance(message["content"], str) for message in messages):
            return "not_text"
        if is_empty(messages[-1]["content"]):
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
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_prompt_tokens: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    keep_special_tokens: Collection[str] = (),
    num_proc: int | None = None,
    counts: DropCounts | None = None,
) -> Dataset | IterableDataset:
    """Training rows of short conversations, such as the Nemotron sets: the last answer, and all turns before it.

    Args:
        messages_column (`str`, *optional*, defaults to `"messages"`):
            Column with the turns, each with a `role` and a `content`.
        completion (`bool`, *optional*, defaults to `False`):
            Give the last answer as conversational `completion`, for `SFTTrainer`, and not as the reference `answer`.
        name_or_path, split, streaming, tokenizer, max_prompt_tokens, chat_template_kwargs, keep_special_tokens,
        num_proc, counts:
            As for [`load_longblocks`].

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`] with `prompt`, and `answer` or `completion`.

    Raises:
        ValueError: If the set cannot be read, lacks a column, or a budget comes without a tokenizer.
    """
    rows = read_rows(name_or_path, split, streaming)
    check_columns(rows, (messages_column,))
    answer = {"completion": MESSAGES_FEATURE} if completion else {"answer": Value("string")}
    budget = TokenBudget(tokenizer, None, max_prompt_tokens, chat_template_kwargs or {}, keep_special_tokens)
    reader = _ConversationReader(messages_column, completion, budget)
    features = Features({"prompt": MESSAGES_FEATURE, **answer})
    dropped_columns = [name for name in rows.features if name not in features]
    return select_and_map(rows, reader, features, dropped_columns, num_proc, counts)
