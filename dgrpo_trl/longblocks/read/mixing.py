"""Short rows mixed into long ones, in exact proportion; and splits that hold on every machine."""

import bisect
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value, concatenate_datasets

from ...text import hash_share
from .documents import COLUMNS, document_key
from .rows import ROWS_IN_MEMORY, check_columns


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Proportion:
    """Which rows of a mixture are short: of the first n, n times the share, rounded."""

    share: Fraction

    def num_short(self, num_rows: int) -> int:
        return (2 * num_rows * self.share.numerator + self.share.denominator) // (2 * self.share.denominator)

    def is_short(self, position: int) -> bool:
        return self.num_short(position + 1) > self.num_short(position)

    def num_rows(self, num_short: int, num_long: int) -> int:
        """Longest mixture of this many short and long rows, until one side is used up."""

        def is_too_long(num_rows: int) -> bool:
            short = self.num_short(num_rows)
            return short > num_short or num_rows - short > num_long

        bound = 2 + int(max((num_short + 1) / self.share, (num_long + 1) / (1 - self.share)))
        return bisect.bisect_left(range(bound + 1), True, key=is_too_long) - 1


def mix_short_and_long(
    short: Dataset | IterableDataset,
    long: Dataset | IterableDataset,
    short_share: float = 0.1,
    seed: int = 0,
    num_rows: int | None = None,
) -> Dataset | IterableDataset:
    """Interleaves short and long rows in exact proportion: of any first n rows, n times the share are short, rounded.

    The paper trains on 10 % of short rows (arXiv 2605.12227), so that what the model does in short contexts is not
    lost. The mixture ends where a side has no row left, or after `num_rows`. Columns that one side lacks are `None` in
    its rows. If either is a stream, the mixture is one, in a single shard, and the stream keeps its order.

    Args:
        short, long ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training rows, see [`load_conversations`] and [`load_longblocks`].
        short_share (`float`, *optional*, defaults to `0.1`):
            Share of short rows, between 0 and 1.
        seed (`int`, *optional*, defaults to `0`):
            Order of the rows of each side that is no stream. Which positions are short does not depend on it.

    Raises:
        ValueError: If the share is out of range, a side is empty or too small for `num_rows`, or the same column has
            two types.
    """
    if not 0 < short_share < 1:
        raise ValueError(f"`short_share` is {short_share}. A mixture has rows of both sides. Choose between 0 and 1.")
    for name, side in (("short", short), ("long", long)):
        if isinstance(side, Dataset) and len(side) == 0:
            raise ValueError(f"`{name}` is empty. There is nothing to mix. Check what its filters dropped.")
    proportion = _Proportion(Fraction(str(short_share)))  # by way of its digits: 0.1 is not a tenth in binary
    if isinstance(short, Dataset) and isinstance(long, Dataset):
        return _mix_tables(short, long, proportion, seed, num_rows)
    sides = {
        name: side.shuffle(seed=seed).to_iterable_dataset() if isinstance(side, Dataset) else side
        for name, side in (("short", short), ("long", long))
    }
    return IterableDataset.from_generator(
        _mixed_rows,
        gen_kwargs={**sides, "proportion": proportion, "num_rows": num_rows},
        features=_common_features(short, long),
    )


def _mix_tables(short: Dataset, long: Dataset, proportion: _Proportion, seed: int, num_rows: int | None) -> Dataset:
    longest = proportion.num_rows(len(short), len(long))
    if num_rows is None:
        num_rows = longest
    elif num_rows > longest:
        raise ValueError(
            f"`num_rows` is {num_rows}, but {len(short)} short and {len(long)} long rows make {longest} at a share of "
            f"{float(proportion.share)}. Ask for fewer."
        )
    short_indices, long_indices = (
        iter(Random(f"{seed}:{name}:0").sample(range(len(side)), len(side)))
        for name, side in (("short", short), ("long", long))
    )
    indices = [
        next(short_indices) if proportion.is_short(position) else len(short) + next(long_indices)
        for position in range(num_rows)
    ]
    _common_features(short, long)  # raises where `concatenate_datasets` would, with a way out
    return concatenate_datasets([short, long]).select(indices)


def _common_features(short: Dataset | IterableDataset, long: Dataset | IterableDataset) -> Features:
    """Columns of both sides; a column that holds nothing on one side has the type of the other."""
    for side in (short, long):
        check_columns(side, ())
    empty = Value("null")
    features = dict(long.features)
    for name, feature in short.features.items():
        other = features.get(name, empty)
        if empty not in (feature, other) and feature != other:
            raise ValueError(
                f"Column {name!r} is {feature} in `short` and {other} in `long`. A column has one type. Cast or "
                "remove it on one side."
            )
        features[name] = other if feature == empty else feature
    return Features(features)


def _mixed_rows(
    short: IterableDataset, long: IterableDataset, proportion: _Proportion, num_rows: int | None
) -> Iterator[dict[str, Any]]:
    columns = list(_common_features(short, long))
    rows = {"short": iter(short), "long": iter(long)}
    for position in itertools.count() if num_rows is None else range(num_rows):
        side = "short" if proportion.is_short(position) else "long"
        row = next(rows[side], None)
        if row is None:
            if num_rows is not None:
                logger.warning(f"The mixture ends after {position:,} of {num_rows:,} rows: `{side}` has no more.")
            return
        yield {name: row.get(name) for name in columns}


def split_by_id(
    dataset: Dataset | IterableDataset, test_share: float, seed: int = 0, column: str | None = None
) -> DatasetDict | IterableDatasetDict:
    """Splits by a hash: a row falls on the same side on every machine, whatever other rows there are.

    All rows of a document fall on one side. It is told by `document_id`, which sets that are built here and the rows
    of [`load_longblocks`] have; else by the text of `document`, but for case, white space and punctuation, as in the
    published set, whose rows have ids of their own; else by `document_sha256`, else by `id`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows.
        test_share (`float`), seed (`int`, *optional*, defaults to `0`):
            Expected share of the documents in `"test"`, between 0 and 1; another seed gives another split.
        column (`str`, *optional*):
            Column to hash instead. With `"id"`, rows of one document may stand on both sides.

    Raises:
        ValueError: If the share is not between 0 and 1, or there is no column to tell documents by.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"`test_share` is {test_share}. Both sides are to have rows. Choose between 0 and 1.")

    columns = [name for name in COLUMNS if name in (dataset.column_names or COLUMNS)]
    if column is None and not columns:
        raise ValueError(
            f"The rows have none of the columns {', '.join(COLUMNS)}. Rows of one document are held out together, by "
            "a hash of it. Add one, or name another `column`."
        )

    def key_of(row: dict[str, Any]) -> str:
        return document_key(row) if column is None else str(row[column])

    def is_test(row: dict[str, Any]) -> bool:
        return hash_share(key_of(row), seed) < test_share

    if isinstance(dataset, IterableDataset):
        sides = {
            "train": dataset.filter(lambda row: not is_test(row)),
            "test": dataset.filter(is_test),
        }
        return IterableDatasetDict(sides)
    keys = _keys(dataset, key_of, columns if column is None else [column])
    sides = {"train": [], "test": []}
    for index, key in enumerate(keys):
        sides["test" if hash_share(key, seed) < test_share else "train"].append(index)
    if column is None:
        _log_groups(Counter(keys), {keys[index] for index in sides["test"]})
    return DatasetDict({name: dataset.select(indices) for name, indices in sides.items()})


def _keys(dataset: Dataset, key_of: Callable[[dict[str, Any]], str], columns: list[str]) -> list[str]:
    """The keys of all rows, a few of which are in memory at a time."""
    batches = dataset.select_columns(columns).iter(batch_size=ROWS_IN_MEMORY)
    return [
        key_of(dict(zip(batch, values, strict=True)))
        for batch in batches
        for values in zip(*batch.values(), strict=True)
    ]


def _log_groups(num_rows: Counter[str], held_out: set[str]) -> None:
    merged = [number for number in num_rows.values() if number > 1]
    logger.info(
        f"{num_rows.total():,} rows are of {len(num_rows):,} documents: {sum(merged):,} rows were merged into "
        f"{len(merged):,} groups that share a document. {len(held_out):,} documents are held out, with "
        f"{sum(num_rows[key] for key in held_out):,} rows."
    )
