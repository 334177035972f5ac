"""Reading data sets: files, folders and the Hub; and counting what is left out of them."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns


AnyDataset: TypeAlias = Dataset | IterableDataset

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_rows(
    name_or_path: str, config: str | None = None, split: str = "train", streaming: bool = False
) -> AnyDataset:
    """Reads a JSONL or Parquet file, a folder of them or of `Dataset.save_to_disk`, or a data set of the Hub.

    Args:
        name_or_path (`str`):
            Path, or Hub id.
        config (`str`, *optional*):
            Configuration of a data set of the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a data set of the Hub or of a saved `DatasetDict`; a file has only one.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        ValueError: If it cannot be read, or a saved `DatasetDict` lacks the split.
    """
    path = Path(name_or_path)
    if (path / "state.json").exists():
        return load_from_disk(name_or_path)
    if (path / "dataset_dict.json").exists():
        splits = load_from_disk(name_or_path)
        _require_split(split, splits, repr(name_or_path))
        return splits[split]
    try:
        if path.is_file() and path.suffix in _FILE_FORMATS:
            return load_dataset(
                _FILE_FORMATS[path.suffix], data_files=name_or_path, split="train", streaming=streaming
            )
        if path.is_dir() and config is None:
            return _load_folder(path, split, streaming)
        return load_dataset(name_or_path, name=config, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The data set {name_or_path!r} cannot be read: {error} Give a {', '.join(_FILE_FORMATS)} file, a folder "
            "saved with `save_to_disk`, or the id of a data set of the Hub that this machine can reach."
        ) from error


def _load_folder(folder: Path, split: str, streaming: bool) -> AnyDataset:
    """The files of a split, as `datasets` finds them by their names and folders.

    They are named one by one: for a folder with a card that names its files, the cache of `datasets` (5.2) knows the
    folder's name and not what is in it, and gives the rows of another build.

    Raises:
        ValueError: If the folder has no file of that split.
    """
    try:
        patterns = get_data_patterns(str(folder.resolve()))
    except EmptyDatasetError as error:
        raise ValueError(f"it has no data files ({error}).") from error
    _require_split(split, patterns, "it")
    found = DataFilesList.from_patterns(patterns[split], base_path=str(folder.resolve()))
    for suffix, file_format in reversed(_FILE_FORMATS.items()):
        if files := sorted({file for file in found if file.endswith(suffix)}):
            return load_dataset(file_format, data_files=files, split="train", streaming=streaming)
    raise ValueError(f"its files are no {', '.join(_FILE_FORMATS)}.")


def _require_split(split: str, available: Collection[str], name: str) -> None:
    if split not in available:
        raise ValueError(f"{name} has no split {split!r}; it has {sorted(map(str, available))}. Name one of these.")


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
