"""Short rows mixed into long ones, in exact proportion."""

import bisect
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any, Literal

from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets

from .rows import check_columns


logger = logging.getLogger(__name__)

_EMPTY_SIDE = "`{}` is empty. There is nothing to mix. Check what its filters dropped."


@dataclass(frozen=True)
class _Proportion:
    """Which rows of a mixture are short: of the first n, n times the share, rounded."""

    share: Fraction

    def num_short(self, num_rows: int) -> int:
        return (2 * num_rows * self.share.numerator + self.share.denominator) // (2 * self.share.denominator)

    def is_short(self, position: int) -> bool:
        return self.num_short(position + 1) > self.num_short(position)

    def num_rows(self, num_short: int, num_long: int, when_exhausted: str) -> int:
        """Longest mixture of so many rows: until one side ("stop") or both ("repeat") would have to begin again."""
        combine = any if when_exhausted == "stop" else all

        def is_too_long(num_rows: int) -> bool:
            short = self.num_short(num_rows)
            return combine((short > num_short, num_rows - short > num_long))

        bound = 2 + int(max((num_short + 1) / self.share, (num_long + 1) / (1 - self.share)))
        return bisect.bisect_left(range(bound + 1), True, key=is_too_long) - 1


def mix_short_and_long(
    short: Dataset | IterableDataset,
    long: Dataset | IterableDataset,
    short_share: float = 0.1,
    seed: int = 0,
    num_rows: int | None = None,
    when_exhausted: Literal["stop", "repeat"] = "stop",
    buffer_size: int | None = None,
) -> Dataset | IterableDataset:
    """Interleaves short and long rows in exact proportion: of any first n rows, n times the share are short, rounded.

    The paper trains on 10 % of short rows (arXiv 2605.12227), so that what the model does in short contexts is not
    lost. Columns that one side lacks are `None` in its rows. If either is a stream, the mixture is one, in a single
    shard.

    Args:
        short, long ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training rows, see [`load_conversations`] and [`load_longblocks`].
        short_share (`float`, *optional*, defaults to `0.1`):
            Share of short rows, between 0 and 1.
        seed (`int`, *optional*, defaults to `0`):
            Order of the rows of each side. Which positions are short does not depend on it.
        num_rows (`int`, *optional*):
            Rows of the mixture; as many as `when_exhausted` allows by default.
        when_exhausted (`str`, *optional*, defaults to `"stop"`):
            `"stop"`: the mixture ends where a side has no row left. `"repeat"`: that side begins again (in another
            order, unless it is a stream) until the other one is used up too.
        buffer_size (`int`, *optional*):
            Rows of each stream that are held in memory to shuffle it; `None` keeps its order.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        ValueError: If an argument is out of range, a side is empty or too small for `num_rows`, or the same column has
            two types.
    """
    if not 0 < short_share < 1:
        raise ValueError(f"`short_share` is {short_share}. A mixture has rows of both sides. Choose between 0 and 1.")
    if when_exhausted not in ("stop", "repeat"):
        raise ValueError(f"`when_exhausted` is {when_exhausted!r}. It must be 'stop' or 'repeat'.")
    for name, side in (("short", short), ("long", long)):
        if isinstance(side, Dataset) and len(side) == 0:
            raise ValueError(_EMPTY_SIDE.format(name))
    proportion = _Proportion(Fraction(str(short_share)))  # by way of its digits: 0.1 is not a tenth in binary
    if isinstance(short, Dataset) and isinstance(long, Dataset):
        return _mix_tables(short, long, proportion, seed, num_rows, when_exhausted)
    sides = [_shuffled_stream(side, seed, buffer_size) for side in (short, long)]
    return IterableDataset.from_generator(
        _mixed_rows,
        gen_kwargs={
            "short": sides[0],
            "long": sides[1],
            "proportion": proportion,
            "num_rows": num_rows,
            "when_exhausted": when_exhausted,
        },
        features=_common_features(short, long),
    )


def _mix_tables(
    short: Dataset, long: Dataset, proportion: _Proportion, seed: int, num_rows: int | None, when_exhausted: str
) -> Dataset:
    longest = proportion.num_rows(len(short), len(long), when_exhausted)
    if num_rows is None:
        num_rows = longest
    elif num_rows > longest and when_exhausted == "stop":
        raise ValueError(
            f"`num_rows` is {num_rows}, but {len(short)} short and {len(long)} long rows make {longest} at a share of "
            f"{float(proportion.share)}. Ask for fewer, or set `when_exhausted` to 'repeat'."
        )
    num_short = proportion.num_short(num_rows)
    short_indices = iter(_order(len(short), num_short, f"{seed}:short"))
    long_indices = iter(_order(len(long), num_rows - num_short, f"{seed}:long"))
    indices = [
        next(short_indices) if proportion.is_short(position) else len(short) + next(long_indices)
        for position in range(num_rows)
    ]
    _common_features(short, long)  # raises where `concatenate_datasets` would, with a way out
    return concatenate_datasets([short, long]).select(indices)


def _order(num_rows: int, num_wanted: int, seed: str) -> list[int]:
    """Indices of rows, all of them before any comes again."""
    indices = []
    for epoch in itertools.count():
        if len(indices) >= num_wanted:
            return indices[:num_wanted]
        indices += Random(f"{seed}:{epoch}").sample(range(num_rows), num_rows)


def _shuffled_stream(side: Dataset | IterableDataset, seed: int, buffer_size: int | None) -> IterableDataset:
    if isinstance(side, Dataset):
        return side.shuffle(seed=seed).to_iterable_dataset()
    return side if buffer_size is None else side.shuffle(seed=seed, buffer_size=buffer_size)


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
    short: IterableDataset,
    long: IterableDataset,
    proportion: _Proportion,
    num_rows: int | None,
    when_exhausted: str,
) -> Iterator[dict[str, Any]]:
    columns = list(_common_features(short, long))
    sides = {True: short, False: long}
    rows = {is_short: iter(side) for is_short, side in sides.items()}
    exhausted = set()
    for position in itertools.count() if num_rows is None else range(num_rows):
        is_short = proportion.is_short(position)
        row = next(rows[is_short], None)
        if row is None:
            exhausted.add(is_short)
            if when_exhausted == "stop" or (num_rows is None and len(exhausted) == 2):
                break
            rows[is_short] = iter(sides[is_short])
            row = next(rows[is_short], None)
            if row is None:
                raise ValueError(_EMPTY_SIDE.format("short" if is_short else "long"))
        yield {name: row.get(name) for name in columns}
    else:
        return
    if num_rows is not None:
        side = "short" if is_short else "long"
        logger.warning(f"The mixture ends after {position:,} of {num_rows:,} rows: `{side}` has no more.")
