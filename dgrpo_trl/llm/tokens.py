"""Lengths in tokens, and which texts are special to a tokenizer, without waiting for transformers to be imported."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer


# Bytes of UTF-8 to a token, where no tokenizer is given: roughly that of English with a vocabulary of 50,000 and more
BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class TokenCounter:
    """What the builder asks of a tokenizer."""

    name: str  # of the tokenizer, or how the length is estimated, for the card
    count: Callable[[str], int]  # tokens of a text, without any that a template would add
    special_tokens: tuple[str, ...] | None  # texts that become control tokens; `None` where there is no tokenizer


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
    special = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
    return TokenCounter(name_or_path, lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), special)
