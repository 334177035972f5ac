"""What every source has, and what it can do: give its documents, and be checked before anything is built."""

from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice

from pydantic import Field, field_validator

from ...strict_model import StrictModel
from ..records import Document, Drop, Kind
from .corpora import two_letter
from .files import BadItem


STAGE = "sources"


class Source(StrictModel):
    """What every source has."""

    name: str = Field(pattern=r"^\w[\w.+ -]*$", description="In the column `source`: letters, digits, `.+-`, spaces.")
    max_documents: int | None = Field(None, ge=1, description="Items to read, drops included. Default: all.")
    max_document_bytes: int = Field(20_000_000, ge=1, description="Decompressed bytes above which an item is dropped.")
    may_redistribute: bool = Field(True, description="Whether texts may be published, not only the ids of documents.")

    def read(self, skip: int = 0) -> Iterator[Document | Drop]:
        """One document or one drop for each item but the first `skip`, up to `max_documents` items.

        Item `n` is the same in every run, as long as the source is.

        Raises:
            ValueError: If there is no such source.
            RuntimeError: If a stream of the Hub breaks off; reading can resume at the same item.
        """
        return islice(self.read_from(skip), None if self.max_documents is None else max(0, self.max_documents - skip))

    @abstractmethod
    def read_from(self, skip: int) -> Iterator[Document | Drop]:
        """[`read`], whatever `max_documents` is."""

    @abstractmethod
    def check(self) -> None:
        """Opens the source and reads its beginning, so that a mistake, a `ValueError`, shows before anything is built.

        A gated data set that cannot be read is no mistake: `read` says so and leaves it out.
        """

    def _drop(self, item: str, bad: BadItem) -> Drop:
        return Drop(STAGE, self.name, item, bad.reason, bad.detail)

    def _checked(self, text: str) -> str:
        """A text that can become a document; else raises why not."""
        if not text.strip():
            raise BadItem("no_text")
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as error:
            raise BadItem("undecodable", f"half a surrogate pair at character {error.start}") from error
        if num_bytes > self.max_document_bytes:
            raise BadItem("too_large", f"{num_bytes} bytes, more than {self.max_document_bytes}")
        return text


class LabelledSource(Source):
    """A source that no table describes: what all its documents have in common."""

    language: str | None = Field(None, description="Language of all documents. Default: found out later.")
    license: str | None = Field(None, description="License of all documents, where no column says it.")
    kind: Kind | None = Field(None, description="`text`, `markdown` or `code`. Default: by suffix; `text` for rows.")

    @field_validator("language")
    @classmethod
    def _check_language(cls, language: str | None) -> str | None:
        code = None if language is None else two_letter(language)
        if language is not None and code is None:
            raise ValueError(
                f"{language!r} has no two-letter code. Rows are published with one. Give one, such as 'en'."
            )
        return code
