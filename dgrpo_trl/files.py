"""Files that are written whole, and known by their hash."""

import hashlib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import yaml


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that no reader sees half of it, and processes that share a folder do not disturb each other."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def write_text(path: Path, text: str) -> None:
    """[`write_bytes`] of text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """[`write_text`] of JSON, with all characters as they are."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


def read_table(package: str, name: str) -> Any:
    """A YAML file beside the modules of a package."""
    return yaml.safe_load(resources.files(package).joinpath(name).read_text(encoding="utf-8"))


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_sha256(path: Path, sha256: str) -> Path:
    """`path`, whose content is what it has to be.

    Raises:
        ValueError: If it is not.
    """
    found = sha256_of(path)
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}, not {sha256}. It is another file. Delete it and run again.")
    return path
