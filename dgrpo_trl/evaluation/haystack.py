"""What needles are hidden in: sentences of noise or of a text, or other needles."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..text import UNSPACED


NOISE_LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# A character of a script without spaces, or a word: what a text is cut by, white space before it included
_UNIT = re.compile(rf"\s*(?:[{UNSPACED}]|[^\s{UNSPACED}]+)")
# White space after what looks like the end of a sentence and not of an abbreviation, or what follows such a mark
_SENTENCE_END = re.compile(
    r"(?:(?<=\w{3}[.!?…؟।])|(?<=\w{3}[.!?…؟।][\"'”’)»]))\s+(?![a-z])|(?<=[。！？])(?![」』”’）])\s*"
)


@dataclass(frozen=True)
class Haystack:
    """What needles are hidden in: sentences, between which the needles go.

    They are taken in order, starting at any one and from the first again after the last; the last one taken is cut
    after any word. If there are none, distractors take their place: needles with other keys and values, uncut. `name`
    is for the ids of samples, and `separator` goes between sentences and needles.
    """

    name: str
    sentences: tuple[str, ...]
    separator: str = " "

    @classmethod
    def from_text(cls, text: str) -> "Haystack":
        """A text of any language, such as the essays of RULER; runs of white space become one space."""
        text = " ".join(text.split())
        if not text:
            raise ValueError("`text` is empty. Needles are hidden in its sentences. Give a text, or use `NOISE`.")
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return cls(f"text_{digest}", tuple(sentence for sentence in _SENTENCE_END.split(text) if sentence))

    @classmethod
    def from_file(cls, path: str | Path) -> "Haystack":
        """[`from_text`] of a text file in UTF-8. Raises a `ValueError` if it cannot be read, or is empty."""
        try:
            return cls.from_text(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The haystack {str(path)!r} cannot be read: {error} Give a text file in UTF-8 that is not empty."
            ) from error

    @cached_property
    def _ends(self) -> list[list[int]]:
        """For each sentence, the places where its words end."""
        return [[match.end() for match in _UNIT.finditer(sentence)] for sentence in self.sentences]

    @cached_property
    def text(self) -> str:
        """All sentences."""
        return self.separator.join(self.sentences)

    def first(self, num_units: int, start: int) -> list[str]:
        """`num_units` words (in scripts without spaces: characters) from sentence number `start` on, as sentences."""
        taken: list[str] = []
        index = start % len(self.sentences)
        while num_units > 0:
            ends = self._ends[index]
            taken.append(self.sentences[index][: ends[min(num_units, len(ends)) - 1]])
            num_units -= len(ends)
            index = (index + 1) % len(self.sentences)
        return taken


NOISE = Haystack("noise", (NOISE_LINE,), separator="\n")
NEEDLES = Haystack("needles", (), separator="\n")
