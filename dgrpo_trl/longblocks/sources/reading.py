"""Sources: where the builder's documents come from.

Every source turns each of its raw items (a row, a line, a file, a folder) into one [`Document`] or one [`Drop`], in an
order that is the same in every run, and never holds more than a few of them. A new type of source is a class with its
settings and how it is read, often as a [`RowSource`] or a [`FileSource`], and a name in `SourceConfig`.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..records import Document, Drop
from .corpora import CORPORA, two_letter
from .rows import HubSource, JsonlSource, ParquetSource
from .source import Source
from .texts import ArchiveSource, CodeSource, FolderSource, StdlibSource, TextSource


class CorpusSource(Source):
    """A corpus of the table [`CORPORA`], read as the table says."""

    type: Literal["corpus"]
    corpus: str = Field(description="Name in the table.")
    language: str | None = Field(None, description="Which of its languages to read, where it is divided by language.")
    dataset: str | None = Field(None, description="Where it is, if not at its Hub id: a copy, or a local folder.")
    config: str | None = Field(None, description="Another configuration than the table's, such as a sample.")
    revision: str | None = Field(None, description="Commit or branch. Only a commit is the same set in every run.")
    join_pages: str = Field("\n\n", description="What goes between the pages of a book.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """What follows from the corpus, where it is known; the other checks say what is wrong with the rest."""
        if not isinstance(values, dict) or values.get("corpus") not in list(CORPORA):
            return values
        corpus = CORPORA[values["corpus"]]
        language = values.get("language")
        name = f"{corpus.title}-{language}" if corpus.needs_language and language else corpus.title
        return {"name": name, "may_redistribute": corpus.may_redistribute, **values}

    @model_validator(mode="after")
    def _check_corpus(self) -> "CorpusSource":
        corpus = CORPORA.get(self.corpus)
        if corpus is None:
            raise ValueError(f"There is no corpus {self.corpus!r}. Known are {', '.join(CORPORA)}. Name one of these.")
        if self.may_redistribute and not corpus.may_redistribute:
            raise ValueError(f"The terms of {self.corpus!r} forbid to share its texts. Remove `may_redistribute`.")
        if corpus.needs_language and corpus.languages is not None and self.language not in corpus.languages:
            raise ValueError(
                f"The corpus {self.corpus!r} is divided by language, and `language` is {self.language!r}. Give one of "
                f"{', '.join(corpus.languages)}."
            )
        if corpus.needs_language and self.language is None:
            raise ValueError(f"The corpus {self.corpus!r} is divided by language. Give one as `language`.")
        if not corpus.needs_language and self.language not in (None, corpus.language):
            what = f"is in {corpus.language!r}" if corpus.language else "mixes languages without marking them"
            raise ValueError(
                f"`language` is {self.language!r}, but the corpus {self.corpus!r} {what}. Remove `language`."
            )
        return self

    def as_hub_source(self) -> HubSource:
        """The same, as a data set of the Hub."""
        corpus = CORPORA[self.corpus]
        part = corpus.languages[self.language] if corpus.languages and self.language else self.language
        config = None if corpus.config is None else corpus.config.format(language=part)
        if corpus.language_column is not None:
            language = None
        else:
            language = two_letter(self.language) if corpus.needs_language else corpus.language
        own = ("name", "max_documents", "max_document_bytes", "may_redistribute", "join_pages", "revision")
        columns = ("text_column", "id_column", "language_column", "license_column", "url_column")
        return HubSource(
            type="hub",
            **{name: getattr(self, name) for name in own},
            **{name: getattr(corpus, name) for name in (*columns, "book_pages", "license", "kind")},
            language=language,
            dataset=self.dataset or corpus.dataset,
            config=self.config or config,
            split=corpus.split.format(language=part),
        )

    def read_from(self, skip: int) -> Iterator[Document | Drop]:
        return self.as_hub_source().read_from(skip)

    def check(self) -> None:
        self.as_hub_source().check()


SourceConfig = Annotated[
    HubSource
    | ParquetSource
    | JsonlSource
    | TextSource
    | FolderSource
    | CodeSource
    | StdlibSource
    | ArchiveSource
    | CorpusSource,
    Field(discriminator="type"),
]
