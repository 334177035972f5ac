"""Windows: a few blocks of a document, from which the rule engine makes a text of its own."""

import itertools
import random
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ..records import Document, Kind
from .blocks import Block, blocks_at


# Where a sentence of any language ends, and not only an abbreviation: what follows is white space, save after `。`
_SENTENCE_END = re.compile(r"(?:(?<=\w{4}[.!?…؟।])|(?<=\w{4}[.!?…؟।][\"'”’)»]))\s+(?=\S)|[。！？][」』”’）]*")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)


@dataclass(frozen=True)
class Window:
    """Neighboring blocks of a document, of which a row is made."""

    document: Document
    language: str
    text: str
    texts: list[str]  # of its blocks
    between: list[str]  # white space before each block
    num_tokens: float
    start: int = 0  # in the document

    @classmethod
    def of(cls, document: Document, num_tokens: int, language: str, blocks: list[Block]) -> "Window":
        """Some blocks of a document that has `num_tokens` tokens; the window's are an estimate."""
        text = document.text[blocks[0].start : blocks[-1].end]
        return cls(
            document=document,
            language=language,
            text=text,
            texts=[block.text for block in blocks],
            between=["", *(document.text[a.end : b.start] for a, b in itertools.pairwise(blocks))],
            num_tokens=len(text) / len(document.text) * num_tokens,
            start=blocks[0].start,
        )


@dataclass(frozen=True)
class Draft:
    """A row before its blocks are cut: the text in pieces, of which some are evidence."""

    pieces: list[str]
    between: list[str]  # white space before each piece
    evidence: set[int]
    question: str
    answer: str


def choose_window(
    rng: random.Random, document: Document, num_tokens: int, blocks: list[Block], max_tokens: int
) -> list[Block]:
    """Neighboring blocks of about `max_tokens` tokens, judged by the document's own rate of characters."""
    max_chars = max_tokens * len(document.text) / max(1, num_tokens)
    # The last place to begin from which the window can still be filled
    last = len(blocks) - 1
    while last > 0 and blocks[-1].end - blocks[last].start < max_chars:
        last -= 1
    start = rng.randint(0, last)
    stop = start + 1
    while stop < len(blocks) and blocks[stop].end - blocks[start].start <= max_chars:
        stop += 1
    return blocks[start:stop]


def insert_facts(
    rng: random.Random,
    pieces: list[str],
    between: list[str],
    facts: list[tuple[str, bool]],
    kind: Kind,
    comment: str | None,
    closed: Collection[int] = (),
) -> tuple[list[str] | None, set[int]]:
    """Writes facts into pieces: these, or `None` if there are too few, and the indices of those with evidence.

    A piece with evidence holds no near miss, so that the evidence alone is not ambiguous. Nothing is written into the
    pieces of `closed`, nor between the lines of verse: there a fact is a paragraph of its own.
    """
    is_verse = kind == "text" and _is_verse("\n\n".join(pieces))
    usable = [index for index in _usable(pieces, between, "verse" if is_verse else kind) if index not in closed]
    num_evidence = sum(is_evidence for _, is_evidence in facts)
    if len(usable) < num_evidence + 1:
        return None, set()
    places = rng.sample(usable, num_evidence)
    others = [index for index in usable if index not in set(places)]
    pieces, evidence = list(pieces), set(places)
    free = iter(places)
    for fact, is_evidence in facts:
        index = next(free) if is_evidence else rng.choice(others)
        piece, newline = pieces[index], "\r\n" if "\r\n" in between[index] else "\n"
        if kind == "code":
            indentation = between[index].rpartition("\n")[2]
            pieces[index] = f"{comment}{fact}{newline}{indentation}{piece}"
        elif kind == "markdown" or is_verse:
            pieces[index] = f"{piece}{newline}{newline}{fact}"
        else:
            ends = [match.end() for match in _SENTENCE_END.finditer(piece)]
            place = rng.choice([*(end for end in ends if not piece[end : end + 1].islower()), len(piece)])
            space = "" if fact.endswith("。") else " "
            if piece[place:]:
                pieces[index] = f"{piece[:place]}{fact}{space}{piece[place:]}"
            else:
                pieces[index] = f"{piece}{space}{fact}"
    return pieces, evidence


def _is_verse(text: str) -> bool:
    """Whether most lines that are not the first of a paragraph are short and begin with a capital."""
    lines = [lines[1:] for paragraph in text.split("\n\n") if len(lines := paragraph.splitlines()) > 2]
    inner = [line.strip() for group in lines for line in group if line.strip()]
    return len(inner) >= 8 and sum(line[0].isupper() and len(line) < 70 for line in inner) > 0.6 * len(inner)


def _usable(pieces: list[str], between: list[str], kind: Kind | Literal["verse"]) -> list[int]:
    """The pieces that facts may be written into.

    Of code those that begin a line, of Markdown those outside fences, of verse those that end a paragraph.
    """
    if kind == "verse":
        return [i for i in range(len(pieces)) if i + 1 == len(pieces) or between[i + 1].count("\n") > 1]
    if kind == "code":
        return [i for i, space in enumerate(between) if i == 0 or "\n" in space]
    if kind == "markdown":
        num_fences = itertools.accumulate(len(_FENCE.findall(piece)) for piece in pieces)
        return [i for i, number in enumerate(num_fences) if number % 2 == 0]
    return list(range(len(pieces)))


def assemble(draft: Draft) -> tuple[str, list[Block]]:
    """The text of a draft, and its pieces as blocks."""
    text, spans = "", []
    for space, piece in zip(draft.between, draft.pieces, strict=True):
        text += space
        spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, blocks_at(text, spans)
