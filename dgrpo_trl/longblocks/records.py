"""What travels through the builder: documents, rows, the checks on them, and what was left out and why."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal


Kind = Literal["text", "markdown", "code"]
# The task of questions that the document does not answer
UNANSWERABLE = "unanswerable"


@dataclass(frozen=True)
class Document:
    """A long text of a source."""

    text: str  # offsets of blocks and evidence count its characters
    source: str  # for the column `source`
    source_id: str  # in the source: a title, a path, a bar code
    language: str | None = None  # two-letter code; `None` while it is unknown
    license: str | None = None  # as the source states it
    url: str | None = None  # where it can be read
    kind: Kind = "text"  # where its natural borders are
    num_tokens: int | None = None  # of the configured tokenizer; `None` while they have not been counted

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def id(self) -> str:
        """Names the document by its content."""
        return self.sha256[:16]


@dataclass(frozen=True)
class Evidence:
    """A block that an answer rests on: `document[start:end]` is its text."""

    block: str  # its id
    start: int
    end: int


@dataclass(frozen=True)
class Check:
    """What one check found out about a row."""

    name: str
    passed: bool
    score: float  # its measure, whose meaning the check documents; higher is better
    reason: str  # in a few words


@dataclass(frozen=True)
class Row:
    """A question on a document, with its answer and what the answer rests on."""

    document_id: str  # of the [`Document`] that it was made from
    source: str
    language: str  # of question and answer too
    question: str
    answer: str
    task: str  # kind of question
    evidence: tuple[Evidence, ...]  # offsets count in `document`, or in the source document's text
    document: str | None = None  # the text to read, where it is not that of the source document as it is
    start: int | None = None  # of that text in the source document, before anything was written into it
    end: int | None = None
    checks: tuple[Check, ...] = ()
    responses: dict[str, str] = field(default_factory=dict)  # of teachers, by the name of the model

    @cached_property
    def id(self) -> str:
        """Names the row by its content, so that it is the same in every run: 16 hex digits."""
        text = None if self.document is None else hashlib.sha256(self.document.encode()).hexdigest()
        content = json.dumps([self.document_id, text, self.task, self.question, self.answer])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Drop:
    """Something that was left out."""

    stage: str  # of the builder
    source: str
    item: str  # id of the row or of the document; the id in the source where it is a document not yet read in full
    reason: str  # counted in the summary, see [`reasons`]
    detail: str = ""  # for a person: the length, the check's reason, the rejected question
