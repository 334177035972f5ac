"""Passages: words of a window that stand in it once, by which a question points at a place."""

import random
import re
from dataclasses import dataclass

from .windows import Draft, Window


_SENTENCE = re.compile(r"(?<![^\s.!?;:])[A-Z][^.!?\[\]{}_|*=<>\"“”]{28,140}[.!?;](?=\s|$)")
_MAX_SENTENCES = 200  # of a stretch, evenly apart: each is looked for in the whole window
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class Passage:
    """A sentence of a window that occurs in it once, its white space joined; `start` and `end` are offsets in it."""

    text: str
    start: int
    end: int


def passages(window: Window, start: int = 0, end: int | None = None) -> list[Passage]:
    """The sentences of a stretch of a window that stand in the whole window once, whatever their case and spaces."""
    whole = _joined(window.text)
    found = []
    matches = list(_SENTENCE.finditer(window.text, start, len(window.text) if end is None else end))
    for match in matches[:: 1 + len(matches) // _MAX_SENTENCES]:
        text = _SPACES.sub(" ", match[0])
        if re.search(r"\b[A-Z]{3,}\b", text):  # a speaker's name or a heading, which ends no sentence
            continue
        if "\n\n" not in match[0] and len(text.split()) >= 6 and whole.count(_joined(text)) == 1:
            found.append(Passage(text, *match.span()))
    return found


def draft(window: Window, spans: list[tuple[int, int]], question: str, answer: str) -> Draft:
    """A question on a window as it is; its evidence is the blocks that the spans lie in."""
    evidence, position = set(), 0
    for number, (space, text) in enumerate(zip(window.between, window.texts, strict=True)):
        position += len(space)
        if any(start < position + len(text) and position < end for start, end in spans):
            evidence.add(number)
        position += len(text)
    return Draft(window.texts, window.between, evidence, question, answer)


def order_passages(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """In which order do four sentences stand?"""
    found = passages(window)
    if len(found) < 8:
        return None
    chosen = sorted(rng.sample(found, 4), key=lambda passage: passage.start)
    shuffled = rng.sample(chosen, 4)
    if shuffled == chosen:  # the answer "A, B, C, D" would be the first guess
        return None
    letters = {passage: letter for letter, passage in zip("ABCD", shuffled, strict=True)}
    options = "\n".join(f"{letters[passage]}: {passage.text}" for passage in shuffled)
    question = (
        "In which order do these passages stand in the text? Answer with their letters, separated by commas.\n\n"
        f"{options}"
    )
    return draft(window, [(p.start, p.end) for p in chosen], question, ", ".join(letters[p] for p in chosen))


def _joined(text: str) -> str:
    return _SPACES.sub(" ", text).casefold()
