"""A sample: a prompt and what a correct completion contains. A cell: the samples of a task at a length."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One prompt, and what a correct completion contains."""

    id: str  # the same for any model, given task, length, seed and number: it pairs the samples of two runs
    messages: list[dict]  # a user turn, after a system turn if there is a `system_message`
    answer_prefix: str  # beginning of the answer, which follows the generation prompt; may be empty
    references: tuple[str, ...]  # what a correct completion contains
    max_new_tokens: int
    num_tokens: int  # of the prompt as the model reads it, see [`prompt_text`]
    shared_with: str | None = None  # samples with the same value begin with the same long text, to be run once
    document: str | None = None  # samples with the same value are of one document, and not independent


def prompt_text(messages: list[dict], answer_prefix: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as the model reads it: chat template, generation prompt, beginning of the answer.

    It contains the control tokens of the template: tokenize it with `add_special_tokens=False`. Raises a `ValueError`
    if the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "`tokenizer` has no chat template. Prompts are conversational. Set `tokenizer.chat_template`; for a base "
            "model, one that only concatenates the contents is enough."
        )
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + answer_prefix


def count_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a prompt, without special tokens added."""
    # `verbose` warns about more tokens than the model's longest input, which the caller checks
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class Cell:
    """A task at a length: one number of the results."""

    task: str
    length: int
    metric: str  # name of its score, one of `METRICS`
    make: Callable[[], list[Sample]]  # its samples, the same at each call

    @property
    def file_name(self) -> str:
        """Where a run keeps its results, below `cells/`."""
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{self.task}-{self.length}") + ".json"
