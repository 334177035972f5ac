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
    """A long text of a source.

    Args:
        text (`str`):
            The text. Offsets of blocks and evidence count its characters.
        source (`str`):
            Name of the source, for the column `source`.
        source_id (`str`):
            Identifier in the source: a title, a path, a bar code.
        language (`str`, *optional*):
            Two-letter code; `None` while it is unknown.
        license (`str`, *optional*):
            Licence as the source states it.
        url (`str`, *optional*):
            Where the document can be read.
        kind (`str`, *optional*, defaults to `"text"`):
            `"text"`, `"markdown"` or `"code"`: where its natural borders are.
        num_tokens (`int`, *optional*):
            Length in tokens of the configured tokenizer; `None` while it has not been counted.
    """

    text: str
    source: str
    source_id: str
    language: str | None = None
    license: str | None = None
    url: str | None = None
    kind: Kind = "text"
    num_tokens: int | None = None

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
    """A block that an answer rests on: `document[start:end]` is its text.

    Args:
        block (`str`):
            Id of the block.
        start (`int`):
            Offset of its first character.
        end (`int`):
            Offset after its last character.
    """

    block: str
    start: int
    end: int


@dataclass(frozen=True)
class Check:
    """What one check found out about a row.

    Args:
        name (`str`):
            Name of the check.
        passed (`bool`):
            Whether the row may stay.
        score (`float`):
            Its measure, whose meaning the check documents; higher is better.
        reason (`str`):
            Why, in a few words.
    """

    name: str
    passed: bool
    score: float
    reason: str


@dataclass(frozen=True)
class Row:
    """A question on a document, with its answer and what the answer rests on.

    Args:
        document_id (`str`):
            Id of the [`Document`] that the row was made from.
        source, language (`str`):
            Of that document; the language is that of question and answer too.
        question, answer (`str`):
            The question, and its reference answer.
        task (`str`):
            Kind of question.
        evidence (`tuple[Evidence, ...]`):
            The blocks that the answer rests on; offsets count in `document`, or in the source document's text.
        document (`str`, *optional*):
            The text to read, where it is not that of the source document as it is.
        checks (`tuple[Check, ...]`, *optional*):
            What was checked so far.
        responses (`dict[str, str]`, *optional*):
            Answers of teacher models, by model name.
    """

    document_id: str
    source: str
    language: str
    question: str
    answer: str
    task: str
    evidence: tuple[Evidence, ...]
    document: str | None = None
    checks: tuple[Check, ...] = ()
    responses: dict[str, str] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """Names the row by its content, so that it is the same in every run: 16 hex digits."""
        text = None if self.document is None else hashlib.sha256(self.document.encode()).hexdigest()
        content = json.dumps([self.document_id, text, self.task, self.question, self.answer])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Drop:
    """Something that was left out.

    Args:
        stage (`str`):
            Stage of the builder that left it out.
        source (`str`):
            Name of the source.
        item (`str`):
            Id of the row or of the document; the id in the source where it is a document not yet read in full.
        reason (`str`):
            Short name, counted in the summary: `"too_short"`.
        detail (`str`, *optional*):
            For a person who wants to know more: the length, the check's reason, the rejected question.
    """

    stage: str
    source: str
    item: str
    reason: str
    detail: str = ""
