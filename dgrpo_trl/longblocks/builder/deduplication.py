"""Documents that repeat another, exactly or nearly; and when two questions are the same.

Near duplicates are found by MinHash over shingles, and looked up in bands of the signature that lie in SQLite: memory
does not grow with the number of documents.
"""

import hashlib
import re
import sqlite3
import struct
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from ...extras import import_extra
from ...strict_model import StrictModel
from ...text import IS_UNSPACED
from ..records import Drop


STAGE = "deduplication"

_SEED = 1
_EXACT_BYTES = 8


class DeduplicationConfig(StrictModel):
    """Section `deduplication`. Of documents that are alike the first stays."""

    enabled: bool = Field(True, description="Whether to look for duplicates at all.")
    near: bool = Field(True, description="Whether to look for near duplicates too, not only exact ones.")
    threshold: float = Field(0.7, gt=0, le=1, description="Estimated Jaccard of shingles from which they are alike.")
    shingle_words: int = Field(5, ge=1, description="Words of a shingle.")
    shingle_chars: int = Field(10, ge=1, description="Characters of a shingle where no space stands between words.")
    num_bands: int = Field(32, ge=1, description="Bands of the signature; a pair is compared where one agrees.")
    rows_per_band: int = Field(4, ge=1, description="Values of a band. More miss more pairs, and compare fewer.")


def signature(text: str, config: DeduplicationConfig) -> bytes:
    """What tells whether a text is a duplicate: the same in every process, whatever the order of documents.

    8 bytes of a hash of the text, then `num_bands * rows_per_band` numbers of 4 bytes, or none of these where near
    duplicates are not looked for.
    """
    normalized = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    exact = hashlib.blake2b(normalized.encode(), digest_size=_EXACT_BYTES).digest()
    if not (config.enabled and config.near):
        return exact
    otherwise = ", or set `deduplication.near: false`"
    datasketch = import_extra("datasketch", "Finding near duplicates", otherwise=otherwise)
    num_values = config.num_bands * config.rows_per_band
    minhash = datasketch.MinHash(num_values, seed=_SEED, hashfunc=_hash, scheme="affine32")
    minhash.update_batch([shingle.encode() for shingle in _shingles(normalized, config)])
    return exact + np.asarray(minhash.hashvalues, dtype="<u4").tobytes()


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


def _shingles(text: str, config: DeduplicationConfig) -> set[str]:
    if len(IS_UNSPACED.findall(text)) * 4 > len(text):
        size, characters = config.shingle_chars, re.sub(r"\W+", "", text)
        return {characters[i : i + size] for i in range(max(1, len(characters) - size + 1))}
    size, words = config.shingle_words, re.findall(r"\w+", text)
    return {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


class Deduplicator:
    """Decides on documents one after the other. A context manager around an SQLite file.

    With 32 bands of 4 values, a pair at a Jaccard of 0.7 is compared with a probability of `1 - (1 - 0.7 ** 4) ** 32`,
    which is 0.9998.
    """

    def __init__(self, path: Path, config: DeduplicationConfig):
        self.config = config
        self._database = sqlite3.connect(path)
        self._database.executescript(
            "CREATE TABLE IF NOT EXISTS documents (number INTEGER PRIMARY KEY, part TEXT, id TEXT, exact BLOB, "
            "values_ BLOB);"
            "CREATE TABLE IF NOT EXISTS bands (band BLOB, number INTEGER, part TEXT);"
            "CREATE INDEX IF NOT EXISTS by_exact ON documents (exact);"
            "CREATE INDEX IF NOT EXISTS by_band ON bands (band);"
        )

    def __enter__(self) -> "Deduplicator":
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()

    def add(self, record: dict[str, Any], part: str) -> Drop | None:
        """Remembers a document, unless it is a duplicate: then says of which."""
        if not self.config.enabled:
            return None
        exact, values = record["signature"][:_EXACT_BYTES], record["signature"][_EXACT_BYTES:]
        found = self._database.execute("SELECT id FROM documents WHERE exact = ?", (exact,)).fetchone()
        if found:
            return Drop(STAGE, record["source"], record["source_id"], "exact_duplicate", f"of {found[0]}")
        bands = list(self._bands(values))
        if bands and (near := self._nearest(values, bands)):
            return Drop(
                STAGE, record["source"], record["source_id"], "near_duplicate", f"of {near[0]} ({near[1]:.2f})"
            )
        number = self._database.execute(
            "INSERT INTO documents (part, id, exact, values_) VALUES (?, ?, ?, ?)", (part, record["id"], exact, values)
        ).lastrowid
        self._database.executemany("INSERT INTO bands VALUES (?, ?, ?)", ((band, number, part) for band in bands))
        return None

    def decisions(self, records: Iterable[dict[str, Any]], part: str) -> Iterator[tuple[int, str, Drop | None]]:
        """Position, id and, where it leaves, the drop of each document of a part; then keeps what was added."""
        for position, record in enumerate(records):
            yield position, record["id"], self.add(record, part)
        self._database.commit()

    def _bands(self, values: bytes) -> Iterator[bytes]:
        size = 4 * self.config.rows_per_band
        for number in range(len(values) // size):
            band = struct.pack("<I", number) + values[number * size : (number + 1) * size]
            yield hashlib.blake2b(band, digest_size=8).digest()

    def _nearest(self, values: bytes, bands: list[bytes]) -> tuple[str, float] | None:
        """The document that is most alike, of equals the first, and how much."""
        marks = ", ".join("?" * len(bands))
        candidates = self._database.execute(
            "SELECT id, values_ FROM documents WHERE number IN "
            f"(SELECT number FROM bands WHERE band IN ({marks})) ORDER BY number",
            bands,
        )
        own, best = np.frombuffer(values, "<u4"), None
        for document_id, other in candidates:
            similarity = float(np.mean(own == np.frombuffer(other, "<u4")))
            if similarity >= self.config.threshold and (best is None or similarity > best[1]):
                best = document_id, similarity
        return best

    def forget_from(self, part: str) -> None:
        """Forgets the documents of this part and of those after it, in the order of their names.

        They are in this file before their part is written: of an unfinished part, all of them are forgotten.
        """
        self._database.execute("DELETE FROM documents WHERE part >= ?", (part,))
        self._database.execute("DELETE FROM bands WHERE part >= ?", (part,))


def normalize_question(text: str) -> str:
    """A question without what makes no difference: case, punctuation, white space, and forms of the same character."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())
