"""Texts of any script: which have no spaces between words, words and n-grams, literal control tokens."""

import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterator
from typing import Any


# Scripts that are written without spaces between words, as ranges of a character class. Their letters and marks: those
# with Line_Break=SA in Unicode's LineBreak.txt (UAX #14: a line of Thai breaks where a dictionary says), and those of
# Han, kana, Bopomofo, Yi, Javanese and Balinese. Not their digits and punctuation: "๒๕๖๐" is one word, as "2560" is.
# Not Hangul, as Korean has spaces, and not Tibetan, which has a mark between its syllables.
UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ec6\u0ec8-\u0ece\u0edc-\u0edf"  # Lao
    "\u1000-\u103f\u1050-\u108f\u109a-\u109d\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa76\uaa7a-\uaa7f"  # Myanmar
    "\u1780-\u17d3\u17d7\u17dc\u17dd"  # Khmer
    "\u1950-\u19cf\u1a20-\u1a7c\u1aa7\uaa80-\uaadd\U00011700-\U0001172f\U00011740-\U0001174f"  # Tai scripts, Ahom
    "\u1b00-\u1b4c\u1b6b-\u1b73\ua980-\ua9c0\ua9cf"  # Balinese, Javanese
    "\u3005-\u3007\u3021-\u302d\u3031-\u3035\u3038-\u303c"  # Iteration and tone marks, Hangzhou numerals
    "\u3041-\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # Kana
    "\u3105-\u312f\u31a0-\u31bf"  # Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00016fe3\U00016ff0-\U00016ff6\U00020000-\U00033fff"  # Han
    "\ua000-\ua48c"  # Yi
)
# Korean has spaces, but particles join its words, and a character is a syllable
HANGUL = "\uac00-\ud7a3"
IS_UNSPACED = re.compile(f"[{UNSPACED}]")
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


def hash_share(text: str, seed: int) -> float:
    """A number in [0, 1) that depends only on the text and the seed: the same on every machine and in every run."""
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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


# Control tokens of common tokenizers, where the tokenizer of the reader is not known
WELL_KNOWN_SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> "
    "<|eot_id|> <|system|> <|user|> <|assistant|> <s> </s> <bos> <eos> <pad> <unk> [INST] [/INST] <start_of_turn> "
    "<end_of_turn> <think> </think> <tool_call> </tool_call> <|start|> <|channel|> <|message|> <|end|> "
    "<|return|> <|call|> [THINK] [/THINK] <tool_response> </tool_response> <mask>"
).split()


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
    return re.sub(pattern, lambda match: broken(match[0]), text)


# Zero-width space: it is not seen, and no token has it
SEPARATOR = "\u200b"


def broken(token: str) -> str:
    """A control token as [`break_special_tokens`] leaves it."""
    return f"{token[0]}{SEPARATOR}{token[1:]}"
