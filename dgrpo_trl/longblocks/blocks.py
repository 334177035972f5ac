"""Blocks: the contiguous pieces of a document that questions and evidence point at.

| kind | natural borders |
| --- | --- |
| `text` | empty lines |
| `markdown` | headings, which stay with what follows them, and empty lines outside fenced code |
| `code` | Python: statements of the module, or of a class or function that is too long; else: see below |

What is too long is cut at its sentences (`text`) or lines, failing that at clauses, words, anywhere.

Python is read by `ast`. The packages with grammars of other languages fetch them from the network, so their layout
decides instead: an empty line before a line that is not indented.
"""

import ast
import hashlib
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import nsmallest

from pydantic import Field, model_validator

from .records import Kind, StrictModel


Span = tuple[int, int]

_PARAGRAPH_BORDER = re.compile(r"\n[ \t\r]*\n\s*")

_NEWLINE = "(?:\r\n|\n|\r(?!\n)|\x85|\u2028)"  # one line end is never taken for two
_EMPTY_LINE = re.compile(rf"{_NEWLINE}[ \t]*{_NEWLINE}\s*|\u2029\s*")
_LINE = re.compile("\r\n|\r|\n")  # what ends a line of Markdown and of Python
_FENCE = re.compile(r"[ \t]*(?:>[ \t]*)*(`{3,}(?=[^`]*$)|~{3,})")
_UNDERLINE = re.compile(r" {0,3}(?:=+|-+)[ \t]*$")
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]|$)")

# The last border of each kind in a piece of text: a greedy `.*` finds it from the end
_EMPTY_LINES_CUT, _LINE_CUT, _SENTENCE_CUT, _CLAUSE_CUT, _WORD_CUT = (
    re.compile(f"(?s:.*){border}")
    for border in (
        rf"(?:{_NEWLINE}[ \t]*{_NEWLINE}|\u2029)",
        _NEWLINE,
        r"(?:[.!?…؟।][\"'”’)»\]]*\s|[。！？][」』”’）]*)",
        r"(?:[,;:،؛]\s|[、，；：])",
        r"\s",
    )
)
_PROSE_CUTS = (_EMPTY_LINES_CUT, _SENTENCE_CUT, _LINE_CUT, _CLAUSE_CUT, _WORD_CUT)
_LAYOUT_CUTS = (_EMPTY_LINES_CUT, _LINE_CUT, _SENTENCE_CUT, _CLAUSE_CUT, _WORD_CUT)

# Parsing takes about 100 bytes of memory a character
MAX_PARSED_CHARS = 3_000_000

# Written without spaces between words, or with particles joined to them: compared by pairs of characters
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
_TERM = re.compile(rf"[{_UNSPACED}]+|[^\W{_UNSPACED}]+")
_IS_UNSPACED = re.compile(f"[{_UNSPACED}]")

_BM25_K1, _BM25_B = 1.5, 0.75
_MAX_QUERY_TERMS = 16  # terms of a block by which others are found, the most telling first
_MAX_DOCUMENT_FREQUENCY = 64  # blocks; a term in more of them tells little, and its postings would make this slow


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


class BlocksConfig(StrictModel):
    """Section `blocks`: how documents are split, and which blocks count as related."""

    min_block_chars: int = Field(
        default=400, ge=0, description="A shorter block is merged with the next one, where both fit in one block."
    )
    max_block_chars: int = Field(
        default=2000, ge=16, description="Longest block, in characters. A longer paragraph is cut at its sentences."
    )
    links_per_block: int = Field(default=4, ge=0, description="Largest number of related blocks kept for a block.")
    min_link_distance: int = Field(
        default=3, ge=1, description="Related blocks are at least so many blocks apart; 1 allows neighbours."
    )
    min_shared_terms: int = Field(
        default=2, ge=1, description="Related blocks share at least so many terms that are rare in the document."
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> "BlocksConfig":
        if self.min_block_chars > self.max_block_chars:
            raise ValueError(
                f"`min_block_chars` is {self.min_block_chars} and `max_block_chars` {self.max_block_chars}. No block "
                "can be both. Lower the first or raise the second."
            )
        return self


def split_blocks(document: str, kind: Kind = "text", config: BlocksConfig | None = None) -> list[Block]:
    """Splits a document at its natural borders. Each of its characters but white space is in exactly one block.

    A block that is at least `min_block_chars` long as it stands ends a block in any case, so that an edit can move
    borders no further than the next such piece of text.

    Args:
        document (`str`):
            The text.
        kind (`str`, *optional*, defaults to `"text"`):
            `"text"`, `"markdown"` or `"code"`.
        config ([`BlocksConfig`], *optional*):
            Sizes. Without it the blocks are the paragraphs between empty lines, whatever their length and `kind`.

    Returns:
        `list[Block]`: in order, without overlap.
    """
    if config is None:
        return blocks_at(document, _between(document, _PARAGRAPH_BORDER))
    find_spans = {"text": _text_spans, "markdown": _markdown_spans, "code": _code_spans}[kind]
    cuts = _PROSE_CUTS if kind == "text" else _LAYOUT_CUTS
    spans = [
        _trimmed(document, piece)
        for span in find_spans(document, config.max_block_chars)
        for piece in _cut(document, _trimmed(document, span), config.max_block_chars, cuts)
    ]
    spans = [span for span in spans if span[0] < span[1]]
    return blocks_at(document, _merged(spans, config.min_block_chars, config.max_block_chars))


def blocks_at(document: str, spans: Iterable[Span]) -> list[Block]:
    """The blocks at given offsets, in order, with their ids; white space at their ends, and empty spans, left out."""
    repeats = Counter()
    blocks = []
    for span in spans:
        start, end = _trimmed(document, span)
        if start == end:
            continue
        text = document[start:end]
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        repeats[digest] += 1
        block_id = digest if repeats[digest] == 1 else f"{digest}-{repeats[digest]}"
        blocks.append(Block(id=block_id, start=start, end=end, text=text))
    return blocks


def _trimmed(document: str, span: Span) -> Span:
    text = document[span[0] : span[1]]
    stripped = text.lstrip()
    start = span[1] - len(stripped)
    return start, start + len(stripped.rstrip())


def _between(document: str, border: re.Pattern[str]) -> list[Span]:
    """The spans between the matches of a pattern."""
    matches = [match.span() for match in border.finditer(document)]
    starts = [0, *(end for _, end in matches)]
    ends = [*(start for start, _ in matches), len(document)]
    return list(zip(starts, ends, strict=True))


def _from_starts(starts: list[int], end: int) -> list[Span]:
    """The spans that begin at each of these offsets and together reach to `end`."""
    return list(zip(starts, [*starts[1:], end], strict=True))


def _cut(document: str, span: Span, max_chars: int, cuts: tuple[re.Pattern[str], ...]) -> Iterator[Span]:
    """Pieces of at most `max_chars`: each ends at the best kind of border in the second half of what it may hold."""
    start, end = span
    while end - start > max_chars:
        limit = start + max_chars
        matches = (cut.match(document, start + max_chars // 2, limit) for cut in cuts)
        match = next((match for match in matches if match), None)
        middle = match.end() if match else limit
        yield start, middle
        start = middle
    yield start, end


def _merged(spans: list[Span], min_chars: int, max_chars: int) -> list[Span]:
    merged: list[Span] = []
    for start, end in spans:
        if merged and merged[-1][1] - merged[-1][0] < min_chars and end - merged[-1][0] <= max_chars:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    if len(merged) > 1 and merged[-1][1] - merged[-1][0] < min_chars and merged[-1][1] - merged[-2][0] <= max_chars:
        merged[-2:] = [(merged[-2][0], merged[-1][1])]
    return merged


def _text_spans(document: str, max_chars: int) -> list[Span]:
    return _between(document, _EMPTY_LINE)


def _lines(document: str) -> Iterator[tuple[int, str]]:
    """Offset and text of each line, its end left out."""
    start = 0
    for match in _LINE.finditer(document):
        yield start, document[start : match.start()]
        start = match.end()
    yield start, document[start:]


def _markdown_spans(document: str, max_chars: int) -> list[Span]:
    """Paragraphs, lists, tables and fenced code, each whole; headings with the first of these below them."""
    starts = [0]
    fence = ""  # the marks that opened the fenced code which the line is in
    is_after_empty_line = is_below_heading = False
    for offset, line in _lines(document):
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = ""
        elif not line.strip():
            is_after_empty_line = True
        else:
            is_heading = bool(_HEADING.match(line))
            if (is_heading or is_after_empty_line) and not is_below_heading:
                starts.append(offset)
            is_underline = offset > 0 and not is_after_empty_line and bool(_UNDERLINE.match(line))
            is_below_heading, is_after_empty_line = is_heading or is_underline, False
            fence = mark[1] if mark else ""
    return _from_starts(starts, len(document))


def _code_spans(document: str, max_chars: int) -> list[Span]:
    """Statements of a Python module; in other languages, what stands between empty lines and is not indented."""
    module = parse_python(document)
    if module is not None:
        return list(_statement_spans(module.body, (0, len(document)), list(_lines(document)), max_chars))
    ends = (match.end() for match in _EMPTY_LINE.finditer(document))
    starts = [end for end in ends if document[end - 1] in "\r\n" and document[end : end + 1] not in ("", *")]}")]
    return _from_starts([0, *starts], len(document))


def parse_python(document: str) -> ast.Module | None:
    """The syntax tree of a Python module that has any statement; `None` for anything else."""
    if len(document) > MAX_PARSED_CHARS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in its strings
            module = ast.parse(document)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return module if module.body else None


def _statement_spans(
    statements: list[ast.stmt], span: Span, lines: list[tuple[int, str]], max_chars: int
) -> Iterator[Span]:
    """One span for each statement, with the comments above it; its own statements where it is too long."""
    by_start = {span[0]: statements[0]}
    for previous, statement in zip(statements, statements[1:], strict=False):
        line = first_line(statement)
        while line - 1 > previous.end_lineno and lines[line - 2][1].lstrip().startswith("#"):
            line -= 1
        if line > previous.end_lineno:
            by_start[lines[line - 1][0]] = statement
    for start, end in _from_starts(list(by_start), span[1]):
        body = getattr(by_start[start], "body", None)
        if end - start > max_chars and isinstance(body, list):
            yield from _statement_spans(body, (start, end), lines, max_chars)
        else:
            yield start, end


def first_line(statement: ast.stmt) -> int:
    """Number of the line, from 1, where a statement begins, its decorators included."""
    return min([statement.lineno, *(decorator.lineno for decorator in getattr(statement, "decorator_list", []))])


def link_blocks(blocks: list[Block], config: BlocksConfig) -> list[list[int]]:
    """Finds the related blocks of each block of a document, by BM25 over the terms that are rare in it.

    A term counts where it is in at least two blocks and in at most a fifth of them. Scripts without spaces between
    words are compared by pairs of characters.

    Args:
        blocks (`list[Block]`):
            Blocks of one document, in order.
        config ([`BlocksConfig`]):
            How many, how far apart, and how much they must share.

    Returns:
        `list[list[int]]`: for each block the indices of related ones, the best first; of equals, the farthest first.
    """
    counts = [Counter(terms(block.text)) for block in blocks]
    postings = _postings(counts)
    mean_length = sum(count.total() for count in counts) / max(1, len(counts)) or 1.0
    return [_links(index, counts, postings, mean_length, config) for index in range(len(blocks))]


def terms(text: str) -> Iterator[str]:
    """Words of three characters and more, small; pairs of characters where no space stands between words."""
    for run in _TERM.findall(text.casefold()):
        if not _IS_UNSPACED.match(run):
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
    scores, num_shared = Counter(), Counter()
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
