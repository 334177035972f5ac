"""The finished set: Parquet files as LongBlocks has them, a folder of `save_to_disk`, and the Hub."""

import fnmatch
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from ...strict_model import StrictModel
from ..records import Document, Drop, Row
from .store import CHECKS_TYPE, EVIDENCE_TYPE, in_chunks


logger = logging.getLogger(__name__)

# What is uploaded; a copy made by `save_to_disk` and unfinished files are not
_PUBLISHED_FILES = ("README.md", "assets/*", "data/*.parquet")
# Row groups are read whole: documents are long, so that they must be small for readers and for us
_ROWS_PER_GROUP = 256
_CHARS_PER_GROUP = 32 * 2**20


class PublishConfig(StrictModel):
    """What is written, and where it would be uploaded. Nothing is uploaded unless the command line says `--push`."""

    save_to_disk: bool = Field(False, description="Also write the folder `saved`, for `load_from_disk`; not uploaded.")
    max_shard_bytes: int = Field(500_000_000, gt=0, description="Bytes of text at which a new Parquet file begins.")
    repo_id: str | None = Field(default=None, description="Data set on the Hub, as `owner/name`.")
    private: bool = Field(default=True, description="Whether only its owners see it. False publishes it to everyone.")
    revision: str | None = Field(default=None, description="Branch to upload to; created if it does not exist.")
    create_pr: bool = Field(default=False, description="Open a pull request instead of changing the branch.")
    commit_message: str = Field(default="Upload LongBlocks", description="First line of the commit.")

    @model_validator(mode="after")
    def _check(self) -> "PublishConfig":
        if self.create_pr and self.revision is not None:
            raise ValueError(
                f"`create_pr` is set and `revision` is {self.revision!r}. The Hub opens pull requests against the "
                "main branch. Leave one of them out."
            )
        return self


def response_column(model: str) -> str:
    """Column with the responses of a model, named as in the published set: `response_Qwen3.5-27B`."""
    return f"response_{model.rstrip('/').rsplit('/', 1)[-1]}"


def published_schema(models: Sequence[str] = ()) -> pa.Schema:
    """Columns of the set: those of the published one, in its order and all text, then ours.

    Raises:
        ValueError: If two models would share a column.
    """
    responses = [response_column(model) for model in models]
    shared = sorted({name for name in responses if responses.count(name) > 1})
    if shared:
        raise ValueError(
            f"Several models would write column {shared}. A column is named after the last part of a model's name. "
            f"Use only one of {list(models)}."
        )
    text = ["id", "document", "source", "language", "question", "answer", *responses, "task"]
    return pa.schema(
        [
            *((name, pa.string()) for name in text),
            ("evidence", EVIDENCE_TYPE),
            ("document_id", pa.string()),
            ("document_start", pa.int64()),
            ("document_end", pa.int64()),
            ("document_sha256", pa.string()),
            ("checks", CHECKS_TYPE),
        ]
    )


def published_record(
    row: Row, document: Document, models: Sequence[str] = (), *, may_redistribute: bool = True
) -> dict[str, Any] | Drop:
    """A row as it is published: the columns of [`published_schema`], or why it may not be.

    Where the source does not let its text be passed on, `document` is `None` and `id` is the id in the source, as in
    the published set; `document_sha256` tells whether a document joined again is right.
    """
    if not may_redistribute and row.document is not None:
        return Drop("publish", row.source, row.id, "cannot_be_rejoined", "the document is not the source's text")
    text = document.text if row.document is None else row.document
    return {
        "id": row.id if may_redistribute else document.source_id,
        "document": text if may_redistribute else None,
        "source": row.source,
        "language": row.language,
        "question": row.question,
        "answer": row.answer,
        **{response_column(model): row.responses.get(model) for model in models},
        "task": row.task,
        "evidence": [vars(evidence) for evidence in row.evidence],
        "document_id": row.document_id,
        "document_start": row.start if row.document is not None else 0,
        "document_end": row.end if row.document is not None else len(document.text),
        "document_sha256": document.sha256 if row.document is None else hashlib.sha256(text.encode()).hexdigest(),
        "checks": [vars(check) for check in row.checks],
    }


def write_parquet(
    rows: Iterable[Mapping[str, Any]],
    folder: Path,
    models: Sequence[str] = (),
    *,
    max_shard_bytes: int = 500_000_000,
) -> list[Path]:
    """Writes `data/train-00000-of-00004.parquet` and so on; in memory is one row group at a time.

    The files of an earlier run are replaced when all new ones are written. The same rows give the same bytes, so that
    the Hub need not be sent a file twice. A new file begins at `max_shard_bytes`, before compression.

    Raises:
        ValueError: If there is no row, or two models would share a column.
    """
    schema = published_schema(models)
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    with _unfinished(folder / ".unfinished-data") as unfinished:
        shards = _write_shards(_row_groups(rows, schema), schema, unfinished, max_shard_bytes)
        if not shards:
            raise ValueError(
                f"There are no rows to write to {str(data)!r}. A data set without any cannot be read. Look up in the "
                "summary of the build what was dropped, and why."
            )
        for path in data.glob("train-*-of-*.parquet"):
            path.unlink()
        paths = [data / f"train-{index:05d}-of-{len(shards):05d}.parquet" for index in range(len(shards))]
        for shard, path in zip(shards, paths, strict=True):
            os.replace(shard, path)
    return paths


def _row_groups(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows as tables of limited size."""

    def num_chars(row: Mapping[str, Any]) -> int:
        return sum(len(value) for value in row.values() if isinstance(value, str))

    for group in in_chunks(rows, num_chars, _ROWS_PER_GROUP, _CHARS_PER_GROUP):
        yield pa.Table.from_pylist(group, schema)


def _write_shards(tables: Iterable[pa.Table], schema: pa.Schema, folder: Path, max_shard_bytes: int) -> list[Path]:
    paths: list[Path] = []
    writer, num_bytes = None, 0
    try:
        for table in tables:
            if writer is not None and num_bytes + table.nbytes > max_shard_bytes:
                writer.close()
                writer = None
            if writer is None:
                paths.append(folder / f"{len(paths):05d}.parquet")
                writer, num_bytes = pq.ParquetWriter(paths[-1], schema, compression="zstd"), 0
            writer.write_table(table)
            num_bytes += table.nbytes
    finally:
        if writer is not None:
            writer.close()
    return paths


def save_to_disk(files: Sequence[Path], folder: Path, max_shard_bytes: int = 500_000_000) -> None:
    """Writes the rows of Parquet files as `datasets.load_from_disk` reads them, replacing the folder."""
    from datasets import Dataset

    with _unfinished(folder.parent / f".unfinished-{folder.name}") as unfinished:
        rows = Dataset.from_parquet([str(path) for path in files], cache_dir=str(unfinished / "cache"))
        rows.save_to_disk(unfinished / "rows", max_shard_size=max_shard_bytes)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished / "rows", folder)


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """An empty folder for files that are not complete, gone at the end; also what a killed run left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class PushPlan:
    """What an upload sends, and where."""

    config: PublishConfig
    files: dict[str, int]  # size in bytes, by the path in the repository
    url: str | None = None  # of the commit; `None` if nothing was uploaded

    def summary(self) -> str:
        """The plan as lines of text."""
        config = self.config
        verb = "Would upload" if self.url is None else "Uploaded"
        visibility = "private" if config.private else "PUBLIC"
        where = f"{config.repo_id or '(no `repo_id` given)'} ({visibility}), branch {config.revision or 'main'}"
        lines = [f"{verb} {len(self.files)} files, {sum(self.files.values()):,} bytes, to {where}"]
        if config.create_pr:
            lines[0] += ", as a pull request"
        lines += [f"  {size:>15,}  {name}" for name, size in self.files.items()]
        return "\n".join(lines + ([] if self.url is None else [f"  {self.url}"]))


def push(folder: Path, config: PublishConfig, dry_run: bool = True) -> PushPlan:
    """Uploads the card, its figures and the Parquet files of a folder to the Hub; a `dry_run` only says what it would.

    What the Hub already holds is not sent again, so that running it again completes an interrupted upload. Parquet
    files there that are no longer part of the set are deleted. A large set may take several commits. Name, token and
    files are checked before anything is changed.

    Raises:
        ValueError: If a file is missing, the name is not one of the Hub, there is no token or it may only read, or the
            set is to be private and a public one of this name exists.
        RuntimeError: If the Hub does not accept the token.
    """
    files = _published_files(folder)
    plan = PushPlan(config, files)
    if dry_run:
        logger.info(plan.summary())
        return plan

    api = _checked_api(config)
    api.create_repo(config.repo_id, repo_type="dataset", private=config.private, exist_ok=True)
    if config.revision is not None:
        api.create_branch(config.repo_id, branch=config.revision, repo_type="dataset", exist_ok=True)
    commit = api.upload_folder(
        repo_id=config.repo_id,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=list(_PUBLISHED_FILES),
        delete_patterns=["data/*.parquet"],
        commit_message=config.commit_message,
        revision=config.revision,
        create_pr=config.create_pr,
    )
    plan = replace(plan, url=str(commit.commit_url))
    logger.info(plan.summary())
    return plan


def _published_files(folder: Path) -> dict[str, int]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    sizes = {n: size for n, size in sizes.items() if any(fnmatch.fnmatchcase(n, p) for p in _PUBLISHED_FILES)}
    for needed, stage in (("README.md", "card"), ("data/*.parquet", "publish")):
        if not fnmatch.filter(sizes, needed):
            raise ValueError(
                f"{str(folder)!r} has no {needed}. A set is published with its card and its rows. Run the stage "
                f"`{stage}` first."
            )
    return sizes


def _checked_api(config: PublishConfig) -> Any:
    """A client of the Hub that may upload, as far as that can be known before it does."""
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    if config.repo_id is None or "/" not in config.repo_id:
        raise ValueError(f"`repo_id` is {config.repo_id!r}. An upload needs a name. Set it to `owner/name`.")
    try:
        validate_repo_id(config.repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` {config.repo_id!r} is no name on the Hub: {error} Choose another.") from error
    if is_offline_mode():
        raise ValueError("HF_HUB_OFFLINE is set. Nothing can be uploaded offline. Unset it.")
    if get_token() is None:
        raise ValueError(
            "There is no token of the Hub. An upload needs an account. Run `hf auth login`, or set HF_TOKEN "
            "to one that may write."
        )
    api = HfApi()
    try:
        token = api.whoami().get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise ValueError("The token of the Hub may only read. An upload writes. Give one that may write.")
        is_private = api.repo_info(config.repo_id, repo_type="dataset").private
    except RepositoryNotFoundError:
        return api
    except HfHubHTTPError as error:
        raise RuntimeError(
            f"The Hub refuses: {error} Nothing was uploaded. Check the token of `hf auth whoami` and its rights."
        ) from error
    if config.private and not is_private:
        raise ValueError(
            f"`private` is set, but {config.repo_id!r} exists and is public. Rows uploaded to it would be seen by "
            "everyone. Choose another `repo_id`, make that one private, or set `private: false`."
        )
    return api
