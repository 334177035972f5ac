"""What is done to a document before it is used, and the documents that are not used at all.

A new filter is a function in `FILTERS`, and its reason in [`reasons`]. Cleaning a clean document changes nothing.
"""

import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Literal

from pydantic import Field

from ...extras import import_extra
from ...strict_model import StrictModel
from ...text import WELL_KNOWN_SPECIAL_TOKENS, break_special_tokens
from ..identification import foreign_script, identify
from ..records import Document, Drop
from .gutenberg import strip_gutenberg


STAGE = "sources"

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}(?![\w-])")
_IP = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]|\.\d)")
_EMAIL_PLACEHOLDER, _IP_PLACEHOLDER, _SECRET_PLACEHOLDER = "email@example.com", "192.0.2.1", "REMOVED-SECRET"
# Keys whose form says what they are; a general search for random text would take hashes and identifiers for keys
_SECRET = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_[A-Za-z0-9_]{22,}\b"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\bAIza[0-9A-Za-z_-]{35}"
    r"|\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{32,}"
    r"|\bhf_[A-Za-z0-9]{30,}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----",
    re.S,
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")

# A long document is judged by samples of this many characters, at its beginning, in its middle and at its end
_SAMPLE_CHARS = 1000
# From this confidence on, the language that the source states is doubted
_CERTAIN = 0.95


class CleaningConfig(StrictModel):
    """Section `cleaning`: each step can be switched off."""

    repair_encoding: bool = Field(True, description="Repair text that was decoded wrongly (by `ftfy`); not in code.")
    strip_gutenberg: bool = Field(True, description="Remove header, license and credits of Project Gutenberg.")
    break_special_tokens: bool = Field(True, description="Zero-width spaces keep literal control tokens text.")
    scrub_pii: bool = Field(True, description="Replace e-mail addresses and public IPv4 addresses.")
    secrets: Literal["replace", "drop", "keep"] = Field("replace", description="What to do with keys of known form.")
    identify_language: bool = Field(True, description="Recognize the language (by `py3langid`); not of code.")
    languages: tuple[str, ...] = Field((), description="Two-letter codes to keep. Default: all.")
    min_tokens: int = Field(512, ge=0, description="Shortest document, in tokens.")
    max_tokens: int | None = Field(None, ge=1, description="Longest document, in tokens. Default: no limit.")
    truncate_too_long: bool = Field(
        False, description="Cut a document that is too long after a paragraph; else drop it."
    )
    min_letter_share: float = Field(0.5, ge=0, le=1, description="Least share of letters in what is no white space.")
    max_repeated_line_share: float = Field(0.3, ge=0, le=1, description="Largest share of one line, from 10 lines on.")


# Why a document is rejected: a reason, and what a person may want to know besides
Rejection = tuple[str, str]
Filter = Callable[[Document, CleaningConfig], Rejection | None]


def _no_text(document: Document, config: CleaningConfig) -> Rejection | None:
    return None if document.text else ("no_text", "")


def _secret(document: Document, config: CleaningConfig) -> Rejection | None:
    match = _SECRET.search(document.text) if config.secrets == "drop" else None
    return match and ("secret", f"{match[0][:4]}... at character {match.start()}")


def _mostly_symbols(document: Document, config: CleaningConfig) -> Rejection | None:
    if document.kind == "code":
        return None
    characters = "".join(document.text.split())[:100_000]
    share = sum(map(_is_letter, characters)) / max(1, len(characters))
    return ("mostly_symbols", f"{share:.2f} of it are letters") if share < config.min_letter_share else None


def _repetitive(document: Document, config: CleaningConfig) -> Rejection | None:
    if document.kind == "code":
        return None
    lines = Counter(line.strip() for line in document.text.splitlines() if line.strip())
    share = max(lines.values()) / lines.total()
    if lines.total() < 10 or share <= config.max_repeated_line_share:
        return None
    return "repetitive", f"{share:.2f} of its lines are {lines.most_common(1)[0][0]!r:.60}"


# What a document is looked at for once it is repaired, in this order; its language and its length come after
FILTERS: tuple[Filter, ...] = (_no_text, _secret, _mostly_symbols, _repetitive)


class Cleaner:
    """Cleans documents, one at a time. `special_tokens` are broken up beside `WELL_KNOWN_SPECIAL_TOKENS`."""

    def __init__(
        self, config: CleaningConfig, count_tokens: Callable[[str], int], special_tokens: Collection[str] | None = ()
    ):
        self.config = config
        self.count_tokens = count_tokens
        self.special_tokens = {*WELL_KNOWN_SPECIAL_TOKENS, *(special_tokens or ())}

    def clean(self, document: Document) -> Document | Drop:
        """The document as it is used, with its language and its length; or why it is not."""

        def drop(reason: str, detail: str = "") -> Drop:
            return Drop(STAGE, document.source, document.source_id, reason, detail)

        document = replace(document, text=self._repair(document.text, document.kind == "code"))
        for find in FILTERS:
            if rejection := find(document, self.config):
                return drop(*rejection)
        language, rejection = self._language(document)
        if rejection:
            return drop(*rejection)
        text = document.text
        num_tokens = self.count_tokens(text)
        maximum = self.config.max_tokens
        if maximum is not None and num_tokens > maximum:
            if not self.config.truncate_too_long:
                return drop("too_long", f"{num_tokens} tokens")
            text = self._truncate(text, maximum)
            num_tokens = self.count_tokens(text)
        if not text or num_tokens < self.config.min_tokens:
            return drop("too_short", f"{num_tokens} tokens")
        return replace(document, text=text, language=language, num_tokens=num_tokens)

    def _repair(self, text: str, is_code: bool) -> str:
        config = self.config
        text = _SURROGATE.sub("\ufffd", text)
        text = re.sub(r"\r\n?|[\x85\u2028\u2029]", "\n", text)
        if config.repair_encoding and not is_code:
            text = _fix_encoding(text)
        text = _CONTROL.sub("", text)
        if not is_code:
            text = unicodedata.normalize("NFC", text)
            if config.strip_gutenberg:
                text = strip_gutenberg(text)
        if config.scrub_pii:
            text = _EMAIL.sub(_EMAIL_PLACEHOLDER, text)
            text = _IP.sub(lambda match: _IP_PLACEHOLDER if _is_public(match[0]) else match[0], text)
        if config.secrets == "replace":
            text = _SECRET.sub(_SECRET_PLACEHOLDER, text)
        if config.break_special_tokens:
            text = break_special_tokens(text, self.special_tokens)
        return text.strip("\n") if text.strip() else ""

    def _language(self, document: Document) -> tuple[str | None, Rejection | None]:
        """The language, or why none can be used. Code is in that of its comments, or in English."""
        stated = document.language
        if document.kind == "code":
            stated = stated or "en"
        elif self.config.identify_language:
            samples = _samples(document.text)
            if stated is not None and (script := foreign_script(samples, stated)):
                return None, ("wrong_language", f"{script} letters, not {stated}")
            found, confidence = identify(samples)
            if stated is None and found is None:
                return None, ("unknown_language", f"{document.text[:60]!r}")
            if stated is not None and found not in (stated, None) and confidence >= _CERTAIN:
                return None, ("wrong_language", f"{found} ({confidence:.2f}), not {stated}")
            stated = stated or found
        if stated is None:
            return None, ("unknown_language", "none is stated")
        if self.config.languages and stated not in self.config.languages:
            return None, ("language_not_wanted", stated)
        return stated, None

    def _truncate(self, text: str, max_tokens: int) -> str:
        """The longest beginning that ends with a paragraph and fits."""
        ends = [match.start() for match in re.finditer(r"\n[ \t]*\n", text)]
        low, high = 0, len(ends)  # ends[:low] fit
        while low < high:
            middle = (low + high + 1) // 2
            if self.count_tokens(text[: ends[middle - 1]]) <= max_tokens:
                low = middle
            else:
                high = middle - 1
        return text[: ends[low - 1]].strip("\n") if low else ""


def _fix_encoding(text: str) -> str:
    ftfy = import_extra("ftfy", "Repairing encodings")
    options = ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, fix_character_width=False)
    for _ in range(4):  # text that was decoded wrongly twice
        fixed = ftfy.fix_text(text, options)
        if fixed == text:
            break
        text = fixed
    return text


def _samples(text: str) -> str:
    if len(text) <= 3 * _SAMPLE_CHARS:
        return text
    middle = (len(text) - _SAMPLE_CHARS) // 2
    return "\n".join((text[:_SAMPLE_CHARS], text[middle : middle + _SAMPLE_CHARS], text[-_SAMPLE_CHARS:]))


def _is_letter(character: str) -> bool:
    """Letters, and the marks that are part of them in Indic scripts."""
    return character.isalpha() or unicodedata.category(character) in ("Mn", "Mc")


def _is_public(address: str) -> bool:
    try:
        return ipaddress.IPv4Address(address).is_global
    except ValueError:  # a number over 255: a version, or the number of a section
        return False
