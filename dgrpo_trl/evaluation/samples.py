"""A sample: a prompt with what a right completion holds; and a cell of them, a task at a length."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One prompt, with what a right completion holds.

    Args:
        id (`str`):
            The same for the same task, length, seed and number, for any model: it pairs the samples of two runs.
        messages (`list[dict]`):
            Conversational prompt: a user turn, after a system turn if one was asked for.
        answer_prefix (`str`):
            Beginning of the answer, which follows the generation prompt; may be empty.
        references (`tuple[str, ...]`):
            What a right completion holds.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        num_tokens (`int`):
            Tokens of the prompt as the model reads it, see [`prompt_text`].
        shared_with (`str`, *optional*):
            Samples with the same value begin with the same long text, whose prefill they can share.
    """

    id: str
    messages: list[dict]
    answer_prefix: str
    references: tuple[str, ...]
    max_new_tokens: int
    num_tokens: int
    shared_with: str | None = None


def prompt_text(
    messages: list[dict],
    answer_prefix: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> str:
    """The prompt as the model reads it: chat template, generation prompt, beginning of the answer.

    Control tokens stand in it, a first one too if the template has it: tokenise it with `add_special_tokens=False`.

    Args:
        messages (`list[dict]`):
            Conversational prompt.
        answer_prefix (`str`):
            Beginning of the answer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's, with a chat template.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the template, such as `enable_thinking`.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "`tokenizer` has no chat template. Prompts are conversational. Set `tokenizer.chat_template`; for a base "
            "model, one that only joins the contents will do."
        )
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **(chat_template_kwargs or {})
    )
    return rendered + answer_prefix


def count_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    # `verbose` warns of more tokens than the model's longest input, which is for the caller to decide
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class Cell:
    """One number of the table: a task at a length.

    Args:
        task (`str`), length (`int`):
            What it is called.
        metric (`str`):
            Of `METRICS`.
        make (`Callable[[], list[Sample]]`):
            Its samples, the same whenever they are made.
    """

    task: str
    length: int
    metric: str
    make: Callable[[], list[Sample]]

    @property
    def file_name(self) -> str:
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{self.task}-{self.length}") + ".json"
