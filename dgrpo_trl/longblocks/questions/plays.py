"""Questions on plays: speeches under the names of their speakers, each name a line of its own that ends in a period.

A name that may be another's short form in the window, and speeches of several at once, are never asked for.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass

from ..records import Document
from .passages import Passage, draft, passages
from .windows import Draft, Window


_NAME = re.compile(r"(?m)^(?:(?<=\n\n)|(?<=\n\r\n)|\A)([A-Z][\w’']*\.?(?: [A-Z][\w’']*){0,2})\.[ \t]*\r?\n(?=[^\s])")
_NO_NAME = re.compile(r"(?i)\b(?:act|scene|all|both|others|the end|finis|song|chorus|prologue|epilogue|exeunt|exit)\b")
_ENTRY = re.compile(r"(?i)[\[(]_?(?:re-?)?enter ([a-z][a-z’']+(?: [a-z][a-z’']+)?)\.?_?[\])]")
_ANY_ENTRY = re.compile(r"(?im)^[ \t]*(?:re-?)?enter\b|[\[(][^\])]*\benters?\b")
_SCENE = re.compile(r"(?im)^[ \t]*(?:act|scene)\b.*$")
_FORM = "Answer with the name as it stands before the speech."


@dataclass(frozen=True)
class Speech:
    name: str
    start: int  # of its words
    end: int


def is_play(document: Document) -> bool:
    """Whether a document has many speeches, of speakers who speak again."""
    names = Counter(_NAME.findall(document.text)) if document.kind == "text" else Counter()
    return names.total() >= 20 and sum(number > 1 for number in names.values()) >= 3


def speeches(window: Window) -> list[Speech]:
    """The speeches of a window, in order; a scene's heading ends the one before it."""
    names = list(_NAME.finditer(window.text))
    scenes = [match.start() for match in _SCENE.finditer(window.text)]
    ends = [*(match.start() for match in names[1:]), len(window.text)]
    return [
        Speech(m[1], m.end(), min([end, *(s for s in scenes if m.end() <= s < end)]))
        for m, end in zip(names, ends, strict=False)
    ]


def _uncertain(found: list[Speech]) -> set[str]:
    """Names that may be taken for another's, and those that are none."""
    names = {speech.name for speech in found}
    uncertain = {name for name in names if _NO_NAME.search(name) or " and " in name.casefold()}
    # A short line such as "Good Night." looks like a name in small letters
    counts = Counter(speech.name for speech in found)
    uncertain |= {name for name in names if counts[name] == 1 and not name.isupper()}
    for name in names:
        words = set(name.casefold().split())
        for other in names - {name}:
            a, b = name.casefold().rstrip("."), other.casefold().rstrip(".")
            if a.startswith(b) or b.startswith(a) or words <= set(other.casefold().split()):
                uncertain |= {name, other}
    return uncertain


def _at(found: list[Speech], passage: Passage) -> int | None:
    return next((i for i, s in enumerate(found) if s.start <= passage.start and passage.end <= s.end), None)


def _drawn(
    rng: random.Random, window: Window, found: list[Speech], first: int, stop: int
) -> tuple[int, Passage] | None:
    """One passage of the speeches from `first` to before `stop`, with the number of its speech."""
    if first >= stop:
        return None
    inside = [(_at(found, p), p) for p in passages(window, found[first].start, found[stop - 1].end)]
    # A blank line may lead to what no longer belongs to the speech
    inside = [
        (i, p) for i, p in inside if i is not None and "\n\n" not in window.text[found[i].start : p.start].strip()
    ]
    return rng.choice(inside) if inside else None  # type: ignore[return-value]


def ask_speaker(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """Who says these words?"""
    found = speeches(window)
    drawn = _drawn(rng, window, found, 0, len(found)) if len(found) >= 8 else None
    if drawn is None or found[drawn[0]].name in _uncertain(found):
        return None
    speech, passage = found[drawn[0]], drawn[1]
    question = f"Who says: “{passage.text}”? {_FORM}"
    return draft(window, [(speech.start - len(speech.name) - 2, passage.end)], question, speech.name)


def ask_reply(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """Who has spoken directly before?"""
    found = speeches(window)
    drawn = _drawn(rng, window, found, 1, len(found)) if len(found) >= 8 else None
    if drawn is None:
        return None
    (number, passage), before = drawn, found[drawn[0] - 1]
    is_same_scene = before.end + len(found[number].name) + 16 > found[number].start
    if before.name in _uncertain(found) or before.name == found[number].name or not is_same_scene:
        return None
    question = f"Directly after whose speech does somebody say: “{passage.text}”? {_FORM}"
    return draft(window, [(before.start - len(before.name) - 2, passage.end)], question, before.name)


def ask_entry(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """Who enters next after these words?"""
    found = speeches(window)
    drawn = _drawn(rng, window, found, 0, len(found)) if len(found) >= 8 else None
    event = _ANY_ENTRY.search(window.text, drawn[1].end) if drawn else None
    entry = _ENTRY.match(window.text, event.start()) if event else None
    if drawn is None or event is None or entry is None or event.start() - drawn[1].end > 6000:
        return None
    name = entry[1]
    if not all(word[0].isupper() for word in name.split()) or _SCENE.search(window.text, drawn[1].end, event.start()):
        return None
    if re.search(r"(?i)\b(?:and|with|the|others|attended|lord|king|sir)\b", name):
        return None
    question = f"Who is the first to enter after the words “{drawn[1].text}”? Answer with the name only."
    return draft(window, [(drawn[1].start, drawn[1].end), entry.span()], question, name)


def _range(rng: random.Random, window: Window) -> tuple[list[Speech], Passage, Passage] | None:
    """Six to thirty speeches of one another's certain names, and words of the first and the last of them."""
    found = speeches(window)
    if len(found) < 10:
        return None
    start = rng.randrange(len(found) - 7)
    first = _drawn(rng, window, found, start, min(start + 3, len(found)))
    last = _drawn(rng, window, found, start + 6, min(len(found), start + 30))
    if first is None or last is None:
        return None
    inside = found[first[0] : last[0] + 1]
    uncertain = _uncertain(found)
    return None if any(speech.name in uncertain for speech in inside) else (inside, first[1], last[1])


def ask_most(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """Who has the most speeches from one to another?"""
    drawn = _range(rng, window)
    if drawn is None:
        return None
    inside, first, last = drawn
    ranked = Counter(speech.name for speech in inside).most_common()
    if len(ranked) < 3 or ranked[0][1] == ranked[1][1]:
        return None
    question = (
        f"From the speech with the words “{first.text}” to the one with “{last.text}”, both included, who has the "
        f"most speeches? {_FORM}"
    )
    return draft(window, [(inside[0].start, inside[-1].end)], question, ranked[0][0])


def list_speakers(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """All who speak from one speech to another."""
    drawn = _range(rng, window)
    if drawn is None:
        return None
    inside, first, last = drawn
    names = list(dict.fromkeys(speech.name for speech in inside))
    everyone = {speech.name for speech in speeches(window)}
    if not 3 <= len(names) <= 10 or len(names) == len(everyone):
        return None
    question = (
        f"List all who speak from the speech with the words “{first.text}” to the one with “{last.text}”, both "
        "included. Answer with the names as they stand before the speeches, separated by commas."
    )
    return draft(window, [(inside[0].start - len(inside[0].name) - 2, inside[-1].end)], question, ", ".join(names))
