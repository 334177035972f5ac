"""Texts of any script: which have no spaces between words, words and n-grams, literal control tokens."""

import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterator
from typing import Any


UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
# A word; or one character of a script without spaces, which counts as a word of its own
_TOKEN = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


def tokenize(text: str) -> list[str]:
    """Words of a text, in scripts without spaces its characters; case and punctuation make no difference."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def iter_ngrams(tokens: list[str], length: int) -> Iterator[tuple[str, ...]]:
    """All runs of `length` tokens; none where there are fewer."""
    return (tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1))


def hash_ngram(ngram: tuple[str, ...]) -> bytes:
    """Eight bytes that stand for an n-gram."""
    return hashlib.blake2b(" ".join(ngram).encode("utf-8", "replace"), digest_size=8).digest()


def iter_strings(value: Any) -> Iterator[str]:
    """All texts in a value, however its lists and mappings are nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from iter_strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from iter_strings(item)


def break_special_tokens(text: str, special_tokens: Collection[str]) -> str:
    """Puts a zero-width space (U+200B) after the first character of each literal control token: it stays text.

    Args:
        text (`str`):
            A document or a question; not a rendered chat template, whose control tokens are meant.
        special_tokens (`Collection[str]`):
            The texts that the tokenizer would turn into control tokens.

    Returns:
        `str`: `text` itself if it holds none.
    """
    literals = sorted((token for token in special_tokens if token in text and len(token) > 1), key=len, reverse=True)
    if not literals:
        return text
    pattern = "|".join(re.escape(token) for token in literals)
    return re.sub(pattern, lambda match: f"{match[0][0]}\u200b{match[0][1:]}", text)
