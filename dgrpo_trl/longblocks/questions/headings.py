"""Questions on headed texts: manuals, encyclopedias and books with chapters.

A heading is a line of its own: `# Title` of Markdown, `9.3. Title`, `CHAPTER IV.`, `BOOK II`, or the `:term:` of a
glossary, whose entries link to others as `{term}`. Lines of a table of
contents, which has no empty lines between, are none, nor are headings that a window holds twice.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass

from ..records import Document
from .passages import draft, passages
from .windows import Draft, Window


_ALONE = r"(?m)(?:\A|(?<=\n\n)|(?<=\n\r\n))"
_NUMBERED = re.compile(
    _ALONE + r"(\d+(?:\.\d+)*\.?[ \xa0][^\W\d_][^\n]{2,90}(?:\r?\n[^\s*-][^\n]{0,90})?)[ \t]*\r?\n[ \t]*\r?\n"
)
_ENTRY = re.compile(_ALONE + r"[ \t]*:([^:\n]{2,50}):[^\n]*\n[ \t]*\r?\n")
_CHAPTER = re.compile(
    _ALONE + r"[ \t]*((?:CHAPTER|BOOK|CANTO|LETTER|Chapter)\s+(?:[IVXLC]+|\d+)\b[^\n]{0,60}?)[ \t]*\r?\n"
)
_MARKDOWN = re.compile(r"(?m)^ {0,3}#{1,6}[ \t]+(\S[^\n]*?)[ \t]*#*[ \t]*\r?$")
# May be an item of a list, a paragraph, or a heading of another form: where one stands, nothing near it is certain
_UNCERTAIN = re.compile(r"\d+\.? |.*[.,;:!?]$")
_UNDERLINED = re.compile(r"(?m)^\S[^\n|]*\n(?:=+|-{3,})[ \t]*$")
_FENCED = re.compile(r"(?ms)^[ \t]*(```|~~~).*?^[ \t]*\1")
_LINK = re.compile(r"\{([^{}]{2,50})\}")
_COMMON = frozenset(
    "because without between through however another whether several against themselves usually".split()
)
_REFERENCE = re.compile(r"(?i)\b(?:see|see also|section|chapter)\b[^.\n]{0,6}?\b(\d+(?:\.\d+)+)\b")


@dataclass(frozen=True)
class Section:
    title: str
    raw: str  # the same with its punctuation
    heading: int  # where its line begins
    start: int  # of what stands under it, up to the next heading of any level
    end: int


def sections(text: str, kind: str = "text") -> list[Section]:
    """The sections of a text, in order."""
    if kind == "markdown":
        fences = [match.span() for match in _FENCED.finditer(text)]
        found = [m for m in _MARKDOWN.finditer(text) if not any(a <= m.start() < b for a, b in fences)]
    else:
        found = [match for pattern in (_NUMBERED, _CHAPTER, _ENTRY) for match in pattern.finditer(text)]
        found.sort(key=lambda match: match.start())
    ends = [*(match.start() for match in found[1:]), len(text)]
    return [
        Section(" ".join(m[1].split()).strip(" ."), _raw(m), m.start(), m.end(), end)
        for m, end in zip(found, ends, strict=False)
    ]


def _raw(match: re.Match[str]) -> str:
    """A title as it is judged: that of a chapter may end in a period."""
    title = " ".join(match[1].split())
    return title.rstrip(".") if match.re is _CHAPTER else title


def is_headed(document: Document) -> bool:
    """Whether a document has several sections."""
    return document.kind != "code" and len(sections(document.text, document.kind)) >= 4


def _unique(window: Window) -> list[Section]:
    """Sections of a window whose heading it holds once; none where there are fewer than three, or not all certain."""
    kind = window.document.kind
    found = sections(window.text, kind)
    if _UNDERLINED.search(window.text) or (kind != "markdown" and any(_UNCERTAIN.match(s.raw) for s in found)):
        return []
    counts = Counter(section.title.casefold() for section in found)
    return found if len(found) >= 3 and max(counts.values()) == 1 else []


def ask_heading(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """Under which heading does a passage stand?"""
    found = _unique(window)
    rng.shuffle(found)
    for section in found:
        words = {word for word in re.findall(r"\w{4,}", section.title.casefold())}
        inside = [
            p
            for p in passages(window, section.start, section.end)
            if not words & set(re.findall(r"\w+", p.text.casefold()))
        ]
        if inside:
            passage = rng.choice(inside)
            question = (
                f"Under which heading does this stand: “{passage.text}”? Answer with the nearest heading before it, "
                "as it stands there."
            )
            return draft(window, [(section.heading, passage.end)], question, section.title)
    return None


def list_headings(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """All headings under which a word stands."""
    found = _unique(window)
    if len(found) < 5 or any(re.search(r",|;|\band\b", section.title) for section in found):
        return None
    holding: dict[str, list[Section]] = {}
    for section in found:
        body = window.text[section.start : section.end]
        for word in set(re.findall(r"(?<![\w'’-])[a-z]{7,}(?![\w'’-])", body)) - _COMMON:
            holding.setdefault(word, []).append(section)
    rest = window.text[: found[0].start] + "".join(section.title.casefold() + " " for section in found)
    for word in rng.sample(sorted(holding), len(holding)):
        # Another form of the word, or one in a heading, would make the list a matter of taste
        anywhere = [s for s in found if word[:5] in window.text[s.start : s.end].casefold()]
        if (
            2 <= len(holding[word]) <= min(6, len(found) - 2)
            and anywhere == holding[word]
            and word[:5] not in rest.casefold()
        ):
            question = (
                f"List all headings under which the word “{word}” occurs, each time the nearest heading before it. "
                "Answer with the headings, separated by commas."
            )
            spans = [(section.heading, section.end) for section in holding[word]]
            return draft(window, spans, question, ", ".join(section.title for section in holding[word]))
    return None


def ask_reference(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """Which section refers to another, of which the question gives the title?"""
    found = _unique(window)
    targets = {match[0].rstrip("."): s for s in found if (match := re.match(r"\d+(?:\.\d+)*\.?", s.title))}
    targets |= {s.title.casefold(): s for s in found}
    sources: dict[str, list[tuple[Section, tuple[int, int]]]] = {}
    for match in [*_REFERENCE.finditer(window.text), *_LINK.finditer(window.text)]:
        name = " ".join(match[1].split()).casefold()
        inside = next((s for s in found if s.start <= match.start() < s.end), None)
        if name in targets and inside != targets[name]:
            # `None`: the window does not hold the heading of the section that refers
            sources.setdefault(name, []).append((inside or targets[name], match.span()))
    spaced = " ".join(window.text.split()).casefold()
    certain = [
        name
        for name, of in sources.items()
        if len(of) == 1
        and of[0][0] != targets[name]
        and len(re.findall(rf"(?<![\w.]){re.escape(name)}(?!\w)", spaced)) == 2
    ]
    if not certain:
        return None
    name = rng.choice(sorted(certain))
    (source, span), target = sources[name][0], targets[name]
    title = re.sub(r"^[\d.]+ ", "", target.title)
    question = f"Which section or entry refers the reader to “{title}”? Answer with its heading."
    return draft(window, [(source.heading, span[1]), (target.heading, target.start)], question, source.title)
