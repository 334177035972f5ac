"""Prompts as chats: literal control tokens in them, and their length in tokens."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .text import break_special_tokens


Prompt = str | list[dict]


def escape_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Breaks up every special token of `tokenizer` that stands literally in `text`, so that it remains text.

    A zero-width space (U+200B) goes in after the first character: `<|im_end|>` then tokenizes as the characters that a
    reader sees, never as the control token. Text without such literals is returned unchanged.

    Args:
        text (`str`):
            A document or a question; not a rendered chat template, whose control tokens are meant.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decides what is special.

    Returns:
        `str`
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return break_special_tokens(text, special | set(tokenizer.all_special_tokens))


def escape_messages(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """`messages` with `escape_special_tokens` applied to what others wrote: all roles but the assistant's.

    That is all text of such a message, in parts or not, the name of a tool included.
    """
    return [
        message
        if message["role"] == "assistant"
        else {key: value if key == "role" else _escape_value(value, tokenizer) for key, value in message.items()}
        for message in messages
    ]


def _escape_value(value: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    if isinstance(value, str):
        return escape_special_tokens(value, tokenizer)
    if isinstance(value, list):
        return [_escape_value(item, tokenizer) for item in value]
    if isinstance(value, dict):
        return {key: _escape_value(item, tokenizer) for key, item in value.items()}
    return value


# More than any chat template adds without tools
_MAX_TEMPLATE_TOKENS = 512


def max_num_tokens(prompt: Prompt) -> int:
    """A number of tokens that the prompt cannot exceed: one per byte, plus those of the chat template."""
    return _num_bytes(prompt) + _MAX_TEMPLATE_TOKENS


def _num_bytes(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt.encode())
    total = 0
    for message in prompt:
        content = message.get("content") or ""
        texts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
        total += sum(len(text.encode()) for text in texts)
    return total


def num_prompt_tokens(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
    tools: Sequence[Callable] | None = None,
) -> int:
    """Tokens of a prompt as the trainer tokenizes it, with the chat template and its generation prompt."""
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        escape_messages(prompt, tokenizer),
        tools=list(tools) if tools else None,
        add_generation_prompt=True,
        return_dict=True,
        **(chat_template_kwargs or {}),
    )
    return len(encoded["input_ids"])


def num_row_tokens(prompt: Prompt, completion: Prompt, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a row for SFT, prompt and completion together."""
    if isinstance(prompt, str):
        return len(tokenizer(f"{prompt}{completion}")["input_ids"])
    return len(tokenizer.apply_chat_template([*prompt, *completion], return_dict=True)["input_ids"])
