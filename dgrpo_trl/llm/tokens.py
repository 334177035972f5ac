"""Lengths in tokens, and which texts are special to a tokenizer, without waiting for transformers to be imported."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer


# Bytes of UTF-8 to a token, where no tokenizer is given: roughly that of English with a vocabulary of 50,000 and more
BYTES_PER_TOKEN = 4
# What sets control tokens off from text: <think>, [INST], <|im_start|>, DeepSeek's <｜User｜>, Kimi's ◁think▷
_MARKS = re.compile(r"<.*>|\[.*\]|\{.*\}|\|.*\||◁.*▷")
_HTML_TAG = re.compile(
    r"</?(?:a|abbr|article|b|blockquote|br|caption|code|dd|del|div|dl|dt|em|figure|footer|h[1-6]|head|header|hr|html|i|img"
    r"|ins|li|main|nav|ol|p|pre|q|section|small|span|strong|sub|sup|table|tbody|td|tfoot|th|thead|tr|u|ul)>"
)


@dataclass(frozen=True)
class TokenCounter:
    """What the builder asks of a tokenizer."""

    name: str  # of the tokenizer, or how the length is estimated, for the card
    count: Callable[[str], int]  # tokens of a text, without any that a template would add
    special_tokens: tuple[str, ...] | None  # texts that become control tokens; `None` without a tokenizer


def is_control_token(text: str) -> bool:
    """Whether an added token is one of control by its form: not a word, white space, or a tag of HTML.

    Tokenizers do not mark all of them as special: Qwen3's `<think>` is not.
    """
    return _MARKS.search(text) is not None and _HTML_TAG.fullmatch(text) is None


def load_token_counter(name_or_path: str | None) -> TokenCounter:
    """Reads a tokenizer: folder or file of a `tokenizer.json`, or a Hub id. Raises a `ValueError` if there is none.

    `None` estimates `BYTES_PER_TOKEN` bytes of UTF-8 a token, which is far off for languages with other scripts.
    """
    if name_or_path is None:
        estimate = f"estimate of {BYTES_PER_TOKEN} bytes per token"
        return TokenCounter(estimate, lambda text: -(-len(text.encode()) // BYTES_PER_TOKEN), None)
    path = Path(name_or_path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.exists() else Tokenizer.from_pretrained(name_or_path)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(
            f"`tokenizer` {name_or_path!r} cannot be read: {error}. It counts lengths. Give a folder or file "
            "of a `tokenizer.json`, a Hub id that this machine can reach, or leave it out for an estimate."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added = tokenizer.get_added_tokens_decoder().values()
    special = tuple(token.content for token in added if token.special or is_control_token(token.content))
    return TokenCounter(name_or_path, lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), special)
