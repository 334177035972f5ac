"""What answers without reading: a constant, a word of the question, the line of the document nearest to it."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from .agreement import words_of


_MAX_ANSWERS = 5000  # different ones that are counted of a task; then those that came once are forgotten
_LINE_END = re.compile(r"\n|(?<=[.!?])\s+")
_WORD = re.compile(r"\w+")


@dataclass
class Baselines:
    """Counts by task what three solvers without reading get right; its size does not grow with the rows."""

    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, task: str, question: str, answer: str, document: str | None) -> None:
        """Counts a row; one without a document is not searched."""
        answers = self.answers[task]
        answers[answer[:200].casefold()] += 1
        if len(answers) > _MAX_ANSWERS:
            self.answers[task] = Counter({text: number for text, number in answers.items() if number > 1})
        found = {"rows": 1, "closed book": holds(question, answer)}
        if document is not None:
            found |= {"searched": 1, "grep": holds(nearest_line(document, question), answer)}
        self.counts[task].update(found)

    def shares(self) -> list[tuple[str, int, str, str, str]]:
        """Task, rows, and the shares that the three get, by name of the task."""
        return [
            (
                task,
                count["rows"],
                f"{max(self.answers[task].values(), default=0) / count['rows']:.0%}",
                f"{count['closed book'] / count['rows']:.0%}",
                f"{count['grep'] / count['searched']:.0%}" if count["searched"] else "not searched",
            )
            for task, count in sorted(self.counts.items())
        ]


def nearest_line(document: str, question: str) -> str:
    """The line or sentence of a document with the most words of the question; of equals, the first."""
    wanted = {word for word in _WORD.findall(question.casefold()) if len(word) > 2}
    lines = _LINE_END.split(document)
    return max(lines, key=lambda line: len(wanted.intersection(_WORD.findall(line.casefold()))))


def holds(text: str, answer: str) -> bool:
    """Whether a text holds the answer as whole words: more than a solver gets who must also pick it out."""
    return f" {' '.join(words_of(answer))} " in f" {' '.join(words_of(text))} "
