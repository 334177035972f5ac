"""Which rows have one document: they stand on one side of a split, and are no independent samples."""

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from typing import Any


# What tells the document of a row, the best first
COLUMNS = ("document_id", "document", "document_sha256", "id")


def document_key(row: Mapping[str, Any]) -> str:
    """Names the document of a row.

    Its `document_id` where the set has one: rows on several windows of a text share it. Else its text, but for case,
    width, white space and punctuation; else its hash, or the id of the row, which is the book's where the text is
    missing.
    """
    if row.get("document_id"):
        return str(row["document_id"])
    if text := row.get("document"):
        letters = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", str(text)).casefold())
        return hashlib.sha256((letters or str(text)).encode("utf-8", "replace")).hexdigest()[:16]
    return str(row.get("document_sha256") or row.get("id"))
