"""Blocks: the contiguous pieces of a document that questions and evidence point at."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass


_PARAGRAPH_BORDER = re.compile(r"\n[ \t\r]*\n\s*")


@dataclass(frozen=True)
class Block:
    """A contiguous piece of a document.

    Args:
        id (`str`):
            First 12 hex digits of the SHA-256 of the text; the n-th block of the same text in a document ends in
            `-n`. An edit elsewhere in the document leaves it unchanged.
        start (`int`):
            Offset of the first character, so that `document[start:end] == text`.
        end (`int`):
            Offset after the last character.
        text (`str`):
            The text of the block, with no white space at either end.
    """

    id: str
    start: int
    end: int
    text: str


def split_blocks(document: str) -> list[Block]:
    """Split a document at its empty lines, in order. White space around a paragraph belongs to no block."""
    repeats = Counter()
    blocks = []
    position = 0
    borders = [match.span() for match in _PARAGRAPH_BORDER.finditer(document)] + [(len(document), len(document))]
    for border_start, border_end in borders:
        paragraph = document[position:border_start]
        start = position + len(paragraph) - len(paragraph.lstrip())
        text = paragraph.strip()
        position = border_end
        if not text:
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        repeats[digest] += 1
        block_id = digest if repeats[digest] == 1 else f"{digest}-{repeats[digest]}"
        blocks.append(Block(id=block_id, start=start, end=start + len(text), text=text))
    return blocks
