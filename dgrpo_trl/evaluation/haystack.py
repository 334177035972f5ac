"""What needles lie in: sentences of noise, of a text, or other needles."""

import hashlib
import itertools
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
    """What needles lie in: sentences, between which the needles go.

    Args:
        name (`str`):
            For the ids of samples.
        sentences (`tuple[str, ...]`):
            Taken in this order, from any one on, and again from the first when they are used up; the last one is cut
            after any word. None of them: distractors, needles with other keys and values, of which none is cut.
        separator (`str`, *optional*, defaults to `" "`):
            Stands between sentences and needles.
    """

    name: str
    sentences: tuple[str, ...]
    separator: str = " "

    @classmethod
    def from_text(cls, text: str) -> "Haystack":
        """A text of any language, such as the essays of RULER; white space in it is made even.

        Raises:
            ValueError: if it is empty.
        """
        text = " ".join(text.split())
        if not text:
            raise ValueError("`text` is empty. Needles are hidden in its sentences. Give a text, or take `NOISE`.")
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return cls(f"text_{digest}", tuple(sentence for sentence in _SENTENCE_END.split(text) if sentence))

    @classmethod
    def from_file(cls, path: str | Path) -> "Haystack":
        """The same of a text file in UTF-8.

        Raises:
            ValueError: if it cannot be read, or is empty.
        """
        try:
            return cls.from_text(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The haystack {str(path)!r} cannot be read: {error} Give a text file in UTF-8 that is not empty."
            ) from error

    @cached_property
    def _ends(self) -> list[list[int]]:
        """For each sentence, where its words end."""
        return [[match.end() for match in _UNIT.finditer(sentence)] for sentence in self.sentences]

    @cached_property
    def text(self) -> str:
        return self.separator.join(self.sentences)

    def first(self, num_units: int, start: int) -> list[str]:
        """So many words (characters, in scripts without spaces), from sentence number `start` on, as sentences."""
        taken = []
        for index in itertools.count(start):
            if num_units <= 0:
                return taken
            index %= len(self.sentences)
            ends = self._ends[index]
            taken.append(self.sentences[index][: ends[min(num_units, len(ends)) - 1]])
            num_units -= len(ends)


NOISE = Haystack("noise", (NOISE_LINE,), separator="\n")
NEEDLES = Haystack("needles", (), separator="\n")
