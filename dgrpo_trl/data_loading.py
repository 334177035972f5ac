"""Reading data sets: files, folders and the Hub; and counting what is left out of them."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset, IterableDataset, ReadInstruction, load_dataset, load_from_disk
from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns
from datasets.exceptions import DatasetGenerationError


AnyDataset: TypeAlias = Dataset | IterableDataset

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class MissingSplitError(ValueError):
    """A data set lacks the split that was asked for; it has those of `available`."""

    def __init__(self, name: str, split: str, available: Iterable[str]):
        self.available = sorted(map(str, available))
        super().__init__(f"{name!r} has no split {split!r}; it has {self.available}. Name one of these.")


def load_rows(
    name_or_path: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    needs_split: bool = False,
) -> AnyDataset:
    """Reads a JSONL or Parquet file, a folder of them or of `Dataset.save_to_disk`, or a data set of the Hub.

    Args:
        name_or_path (`str`):
            Path, or Hub id.
        config (`str`, *optional*):
            Configuration of a data set of the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split, or a part of one such as `"train[:90%]"`, which a stream of local files does not have.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed.
        needs_split (`bool`, *optional*, defaults to `False`):
            Whether a file, and a saved `Dataset`, has no other split than `"train"`. Otherwise it is read whatever
            `split` is.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        ValueError: If it cannot be read.
        MissingSplitError: If it lacks the split.
    """
    path = Path(name_or_path)
    try:
        parts = _local_parts(path, streaming) if path.is_file() or (path.is_dir() and config is None) else None
        if parts is None:
            return load_dataset(name_or_path, name=config, split=split, streaming=streaming)
        name, has_slice, _ = split.strip().partition("[")
        if name not in parts and (needs_split or not _is_single(path)):
            raise MissingSplitError(name_or_path, name, parts)
        rows = parts[name if name in parts else "train"]()
        return _slice(rows, split, name) if has_slice else rows
    except MissingSplitError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The data set {name_or_path!r} cannot be read: {error} Give a {', '.join(_FILE_FORMATS)} file, a folder "
            "saved with `save_to_disk`, or the id of a data set of the Hub that this machine can reach."
        ) from error


def _is_single(path: Path) -> bool:
    """Whether there is nothing that would name a split."""
    return path.is_file() or (path / "state.json").exists()


def _local_parts(path: Path, streaming: bool) -> dict[str, Callable[[], AnyDataset]]:
    """What reads each split of a file or a folder."""
    if path.is_file():
        return {"train": partial(_load_files, [str(path)], streaming)}
    if (path / "state.json").exists():
        return {"train": partial(load_from_disk, str(path))}
    if (path / "dataset_dict.json").exists():
        splits = load_from_disk(str(path))
        return {str(name): partial(splits.__getitem__, name) for name in splits}
    return _folder_parts(path, streaming)


def _slice(rows: AnyDataset, split: str, name: str) -> AnyDataset:
    """The rows of `split`, a part of the split called `name`, of which `rows` are all."""
    if not isinstance(rows, Dataset):
        raise ValueError(f"{split!r} is a part of a stream, whose length is not known.")
    (part,) = ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    return rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))


def _load_files(files: list[str], streaming: bool) -> AnyDataset:
    """Rows of files of one format.

    Raises:
        ValueError: If they are of none that is known, hold no row, or one of them is broken.
    """
    file_format = _FILE_FORMATS.get(Path(files[0]).suffix)
    if file_format is None:
        raise ValueError(f"it is a {Path(files[0]).suffix or 'nameless'} file.")
    if not any(Path(file).stat().st_size for file in files):
        raise ValueError("it is empty.")
    try:
        return load_dataset(file_format, data_files=files, split="train", streaming=streaming)
    except (DatasetGenerationError, ValueError) as error:
        faults = [fault for file in files if (fault := _json_fault(Path(file))) is not None]
        if not faults and "corresponds to no data" in str(error):
            faults = ["it holds no row."]
        raise ValueError(faults[0] if faults else str(error.__cause__ or error)) from error


def _json_fault(path: Path) -> str | None:
    """The first line of a JSON file that is broken, or `None` if none is, or it is of another format."""
    if _FILE_FORMATS[path.suffix] != "json":
        return None
    if path.suffix == ".json":  # one document in several lines, or an object per line
        try:
            document = json.loads(path.read_bytes())
        except ValueError as error:
            if "Extra data" not in str(error):
                return _line_fault(path, getattr(error, "lineno", 1), error)
        else:
            return "it holds no row." if document == [] else None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() and not isinstance(json.loads(line.strip()), dict):
                    return f"line {number} of {path.name} is no JSON object: {line[:80]!r}."
            except ValueError as error:
                return _line_fault(path, number, error)
    return None


def _line_fault(path: Path, number: int, error: ValueError) -> str:
    reason = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return f"line {number} of {path.name} is no JSON: {reason}."


def _folder_parts(folder: Path, streaming: bool) -> dict[str, Callable[[], AnyDataset]]:
    """The files of each split, as `datasets` finds them by their names and folders.

    They are named one by one: for a folder with a card that names its files, the cache of `datasets` (5.2) knows the
    folder's name and not what is in it, and gives the rows of another build.

    Raises:
        ValueError: If the folder has no file.
    """
    try:
        patterns = get_data_patterns(str(folder.resolve()))
    except EmptyDatasetError as error:
        raise ValueError(f"it has no data files ({error}).") from error
    return {str(split): partial(_load_matching, folder, names, streaming) for split, names in patterns.items()}


def _load_matching(folder: Path, patterns: list[str], streaming: bool) -> AnyDataset:
    found = DataFilesList.from_patterns(patterns, base_path=str(folder.resolve()))
    for suffix in reversed(_FILE_FORMATS):
        if files := sorted({file for file in found if file.endswith(suffix)}):
            return _load_files(files, streaming)
    raise ValueError(f"its files are no {', '.join(_FILE_FORMATS)}.")


def column_problems(columns: Collection[str], needed: Iterable[str], name: str, why: str, fix: str) -> list[str]:
    """A problem if `needed` columns are missing.

    Args:
        columns (`Collection[str]`):
            Those that the data set has.
        needed (`Iterable[str]`):
            Those that it must have.
        name (`str`):
            What the message calls the data set.
        why (`str`), fix (`str`):
            Sentences that say what the columns are for, and what to do.
    """
    missing = sorted(set(needed) - set(columns))
    if not missing:
        return []
    return [f"{name} has no column {', '.join(map(repr, missing))}; its columns are {sorted(columns)}. {why} {fix}"]


def require_columns(columns: Collection[str], needed: Iterable[str], name: str, why: str, fix: str) -> None:
    """Raises [`ValueError`] for [`column_problems`]."""
    for problem in column_problems(columns, needed, name, why, fix):
        raise ValueError(problem)


@dataclass
class DropCounts:
    """How many rows were read, and how many left for which reason.

    The rows of a stream are counted as they flow, in the process that reads them: again in each epoch, and not at all
    in this object where a `DataLoader` reads in processes of its own.
    """

    num_rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def num_kept(self) -> int:
        return self.num_rows - self.reasons.total()

    def add(self, reason: str | None) -> None:
        """Counts one row; `None` keeps it."""
        self.num_rows += 1
        if reason is not None:
            self.reasons[reason] += 1

    def table(self) -> str:
        """The counts as lines of text."""
        lines = [("rows", self.num_rows), *self.reasons.most_common(), ("kept", self.num_kept)]
        return "\n".join(f"{name:<18} {count:>10,} {count / max(self.num_rows, 1):>7.1%}" for name, count in lines)
