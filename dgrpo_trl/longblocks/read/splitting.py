"""Splits that hold on every machine: a hash of a row's id decides, not its place."""

from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from ...text import hash_share


def split_by_id(
    dataset: Dataset | IterableDataset, test_share: float, seed: int = 0, column: str = "id"
) -> DatasetDict | IterableDatasetDict:
    """Splits by a hash: a row falls on the same side on every machine, whatever other rows there are.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows.
        test_share (`float`), seed (`int`, *optional*, defaults to `0`):
            Expected share of `"test"`, between 0 and 1; another seed gives another split.
        column (`str`, *optional*, defaults to `"id"`):
            Column to hash. With `"document_sha256"`, no document has questions on both sides.

    Raises:
        ValueError: If the share is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"`test_share` is {test_share}. Both sides are to have rows. Choose between 0 and 1.")

    def is_test(value: Any) -> bool:
        return hash_share(str(value), seed) < test_share

    if isinstance(dataset, IterableDataset):
        sides = {
            "train": dataset.filter(lambda row: not is_test(row[column])),
            "test": dataset.filter(lambda row: is_test(row[column])),
        }
        return IterableDatasetDict(sides)
    sides = {"train": [], "test": []}
    for index, value in enumerate(dataset[column]):
        sides["test" if is_test(value) else "train"].append(index)
    return DatasetDict({name: dataset.select(indices) for name, indices in sides.items()})
