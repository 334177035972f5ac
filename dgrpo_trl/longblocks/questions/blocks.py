"""Blocks: the contiguous pieces of a document that questions and evidence point at.

Splitting is the work of [semantic-text-splitter](https://github.com/benbrandt/text-splitter), which cuts at the widest
border that fits the sizes:

| kind | borders, the widest first |
| --- | --- |
| `text` | empty lines, lines, sentences, words, characters |
| `markdown` | headings, thematic breaks, blocks such as lists, tables and fenced code, then as in text |
| `code` | the levels of the syntax tree, by the tree-sitter grammar of the file's suffix; without one, as in text |
"""

import functools
import hashlib
import importlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import PurePosixPath

from pydantic import Field
from semantic_text_splitter import CodeSplitter, MarkdownSplitter, TextSplitter

from ...strict_model import StrictModel
from ...text import HANGUL, UNSPACED
from ..records import Kind
from ..sources.files import SUFFIXES


Span = tuple[int, int]

# Module and function of the grammar by the suffix of the file
_GRAMMARS = {suffix: name.split() for name, suffixes in SUFFIXES["grammars"].items() for suffix in suffixes.split()}

# The splitter's work grows with the square of a stretch that has no border but between words or characters
_NO_BORDER = r"[^\n.!?。！？؟।]"
_STRETCH = re.compile(rf"{_NO_BORDER}{{3000,4000}}(?<=\s)|{_NO_BORDER}{{4000}}")
# Parsing holds a node for every few characters
_MAX_PARSED_CHARS = 3_000_000

# Compared by pairs of characters. In Korean too, words are not to be had: particles are joined to them
_PAIRED = UNSPACED + HANGUL
_TERM = re.compile(rf"[{_PAIRED}]+|[^\W{_PAIRED}]+")
_IS_PAIRED = re.compile(f"[{_PAIRED}]")

_BM25_K1, _BM25_B = 1.5, 0.75
_MAX_QUERY_TERMS = 16  # terms of a block by which others are found, the most telling first
_MAX_DOCUMENT_FREQUENCY = 64  # blocks; a term in more of them tells little, and its postings would make this slow


@dataclass(frozen=True)
class Block:
    """A contiguous piece of a document: `document[start:end] == text`, with no white space at either end.

    Its `id` is the first 12 hex digits of the SHA-256 of the text; the n-th block of the same text in a document ends
    in `-n`. An edit elsewhere in the document leaves it unchanged.
    """

    id: str
    start: int
    end: int
    text: str


class BlocksConfig(StrictModel):
    """Section `blocks`: how documents are split, and which blocks count as related."""

    min_block_chars: int = Field(400, ge=1, description="Neighbors are joined up to this length, where they fit.")
    max_block_chars: int = Field(2000, ge=16, description="Longest block. A longer paragraph is cut at its sentences.")
    links_per_block: int = Field(default=4, ge=0, description="Largest number of related blocks kept for a block.")
    min_link_distance: int = Field(3, ge=1, description="Least distance of related blocks, in blocks; 1: neighbors.")
    min_shared_terms: int = Field(2, ge=1, description="Least number of rare terms that related blocks share.")


def split_blocks(
    document: str, kind: Kind = "text", config: BlocksConfig | None = None, name: str = ""
) -> list[Block]:
    """Splits a document at its natural borders. Each of its characters but white space is in exactly one block.

    Args:
        document (`str`):
            The text.
        kind (`str`, *optional*, defaults to `"text"`):
            `"text"`, `"markdown"` or `"code"`, whose language the suffix of the file's `name` says.
        config ([`BlocksConfig`], *optional*):
            Sizes.
        name (`str`, *optional*):
            Name of the file.
    """
    config = config or BlocksConfig()
    splitter = _splitter(kind, config.min_block_chars, config.max_block_chars, name, len(document))
    spans = []
    for start, end in _without_long_stretches(document):
        pieces = splitter.chunk_indices(document[start:end])
        spans += [(start + offset, start + offset + len(text)) for offset, text in pieces]
    return blocks_at(document, spans)


def _splitter(
    kind: Kind, min_chars: int, max_chars: int, name: str, num_chars: int
) -> TextSplitter | MarkdownSplitter | CodeSplitter:
    if kind == "markdown":
        return MarkdownSplitter((min_chars, max_chars))
    grammar = _GRAMMARS.get(PurePosixPath(name.lower()).suffix) if kind == "code" else None
    if grammar is None or num_chars > _MAX_PARSED_CHARS:
        return TextSplitter((min_chars, max_chars))
    return CodeSplitter(_language(*grammar), (min_chars, max_chars))


@functools.cache
def _language(module: str, function: str) -> object:
    return getattr(importlib.import_module(module), function)()


def _without_long_stretches(document: str) -> Iterator[Span]:
    """The document cut where 4,000 characters hold no end of a line or of a sentence; else whole."""
    start = 0
    for match in _STRETCH.finditer(document):
        yield start, match.end()
        start = match.end()
    yield start, len(document)


def blocks_at(document: str, spans: Iterable[Span]) -> list[Block]:
    """The blocks at given offsets, in order, with their ids; white space at their ends, and empty spans, left out."""
    repeats: Counter[str] = Counter()
    blocks = []
    for span in spans:
        text = document[slice(*span)].strip()
        if not text:
            continue
        start = document.index(text, span[0])
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        repeats[digest] += 1
        block_id = digest if repeats[digest] == 1 else f"{digest}-{repeats[digest]}"
        blocks.append(Block(id=block_id, start=start, end=start + len(text), text=text))
    return blocks


def link_blocks(blocks: list[Block], config: BlocksConfig) -> list[list[int]]:
    """Finds the related blocks of each block of a document, by BM25 over the terms that are rare in it.

    A term counts where it is in at least two blocks and in at most a fifth of them. Scripts without spaces between
    words are compared by pairs of characters.

    Returns:
        `list[list[int]]`: for each block the indices of related ones, the best first; of equals, the farthest first.
    """
    counts = [Counter(terms(block.text)) for block in blocks]
    postings = _postings(counts)
    mean_length = sum(count.total() for count in counts) / max(1, len(counts)) or 1.0
    return [_links(index, counts, postings, mean_length, config) for index in range(len(blocks))]


def terms(text: str) -> Iterator[str]:
    """Words of three characters and more, in lower case; pairs of characters without spaces and in Korean."""
    for run in _TERM.findall(text.casefold()):
        if not _IS_PAIRED.match(run):
            if len(run) > 2:
                yield run
        else:
            yield from (run[i : i + 2] for i in range(len(run) - 1))


def _postings(counts: list[Counter[str]]) -> dict[str, list[int]]:
    """The blocks of each term that can relate two blocks, in order."""
    max_frequency = min(max(2, len(counts) // 5), _MAX_DOCUMENT_FREQUENCY)
    frequencies = Counter(term for count in counts for term in count)
    postings = defaultdict(list)
    for index, count in enumerate(counts):
        for term in count:
            if 2 <= frequencies[term] <= max_frequency:
                postings[term].append(index)
    return postings


def _links(
    index: int,
    counts: list[Counter[str]],
    postings: dict[str, list[int]],
    mean_length: float,
    config: BlocksConfig,
) -> list[int]:
    def idf(term: str) -> float:
        frequency = len(postings[term])
        return math.log1p((len(counts) - frequency + 0.5) / (frequency + 0.5))

    known = [term for term in counts[index] if term in postings]
    query = nsmallest(_MAX_QUERY_TERMS, known, key=lambda term: (-counts[index][term] * idf(term), term))
    scores: defaultdict[int, float] = defaultdict(float)
    num_shared: Counter[int] = Counter()
    for term in query:
        weight = idf(term) * (_BM25_K1 + 1)
        for other in postings[term]:
            if abs(other - index) >= config.min_link_distance:
                frequency = counts[other][term]
                norm = 1 - _BM25_B + _BM25_B * counts[other].total() / mean_length
                scores[other] += weight * frequency / (frequency + _BM25_K1 * norm)
                num_shared[other] += 1
    related = [other for other in scores if num_shared[other] >= config.min_shared_terms]
    return nsmallest(config.links_per_block, related, key=lambda other: (-scores[other], -abs(other - index), other))
