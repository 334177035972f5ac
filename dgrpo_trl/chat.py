"""Prompts as chats: literal control tokens in them, and their length in tokens."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .text import SEPARATOR, break_special_tokens, broken, iter_strings


Prompt = str | list[dict]

_MAX_SHOWN = 8


# As the only item of `keep_special_tokens`
KEEP_ALL = "all"


def breakable_tokens(tokenizer: PreTrainedTokenizerBase, keep: Collection[str] = ()) -> set[str]:
    """The special tokens that are broken up where they stand in a text: all but those of `keep`."""
    if KEEP_ALL in keep:
        return set()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (special | set(tokenizer.all_special_tokens)) - set(keep)


def escape_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase, keep: Collection[str] = ()) -> str:
    """Breaks up every special token of `tokenizer` that stands literally in `text`, so that it remains text.

    A zero-width space (U+200B) goes in after the first character: `<|im_end|>` then tokenizes as the characters that a
    reader sees, never as the control token. Text without such literals is returned unchanged.

    Args:
        text (`str`):
            A document or a question; not a rendered chat template, whose control tokens are meant.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decides what is special.
        keep (`Collection[str]`, *optional*):
            Special tokens that are meant, and stay; `["all"]` keeps all of them.

    Returns:
        `str`
    """
    return break_special_tokens(text, breakable_tokens(tokenizer, keep))


def escape_messages(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, keep: Collection[str] = ()
) -> list[dict]:
    """`messages` with `escape_special_tokens` applied to what others wrote: all roles but the assistant's.

    That is all text of such a message: its role, the name of a tool, parts, and the keys of what is nested.
    """
    tokens = breakable_tokens(tokenizer, keep)
    return [message if message["role"] == "assistant" else _escaped(message, tokens) for message in messages]


def _escaped(value: Any, tokens: Collection[str]) -> Any:
    if isinstance(value, str):
        return break_special_tokens(value, tokens)
    if isinstance(value, list):
        return [_escaped(item, tokens) for item in value]
    if isinstance(value, dict):
        return {_escaped(key, tokens): _escaped(item, tokens) for key, item in value.items()}
    return value


def kept_token_problems(keep: Collection[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A problem if `keep_special_tokens` names what is no special token."""
    unknown = sorted(set(keep) - breakable_tokens(tokenizer) - {KEEP_ALL})
    if not unknown:
        return []
    return [
        f"`keep_special_tokens` names {', '.join(map(repr, unknown))}, which the student's tokenizer does not have as "
        "special tokens. Nothing else is broken up. Correct or remove them; 'all' keeps all special tokens."
    ]


def special_token_warnings(
    prompts: Iterable[Any], name: str, tokenizer: PreTrainedTokenizerBase, keep: Collection[str] = ()
) -> list[str]:
    """A warning that counts the prompts in which special tokens are, or have been, broken up."""
    tokens = {token for token in breakable_tokens(tokenizer, keep) if len(token) > 1}
    beginnings = {start for token in tokens for start in (token[:2], f"{token[0]}{SEPARATOR}")}
    counts: Counter[str] = Counter()
    num_prompts = num_rows = 0
    for prompt in prompts:
        num_rows += 1
        others = [m for m in prompt if m["role"] != "assistant"] if isinstance(prompt, list) else []
        texts = [text for text in iter_strings(others) if any(start in text for start in beginnings)]
        held = [token for token in tokens if any(token in text or broken(token) in text for text in texts)]
        num_prompts += bool(held)
        counts.update(held)
    if not counts:
        return []
    shown = ", ".join(f"{token!r} ({count:,})" for token, count in counts.most_common(_MAX_SHOWN))
    return [
        f"{name}: in {num_prompts:,} of {num_rows:,} prompts special tokens stand in the text, by token: {shown}. "
        "They are broken up by a zero-width space, and the model reads text. Where they are meant, keep them by "
        f"`keep_special_tokens: {[token for token, _ in counts.most_common(1)]}`."
    ]


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
    keep_special_tokens: Collection[str] = (),
) -> int:
    """Tokens of a prompt as the trainer tokenizes it, with the chat template and its generation prompt."""
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        escape_messages(prompt, tokenizer, keep_special_tokens),
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
