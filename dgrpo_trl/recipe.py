"""A recipe: a YAML file, and keys of it that a command line overrides."""

import difflib
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml


class _UniqueKeyLoader(yaml.SafeLoader):
    """Rejects a key that is given twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {', '.join(map(repr, repeated))} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads a YAML file.

    Args:
        path (`str` or `Path`):
            The file.
        overrides (`Mapping[str, Any]`, *optional*):
            Values by key, as for [`override`].

    Raises:
        ValueError: If the file cannot be read, holds no mapping or gives a key twice, or an override has no place.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"The configuration {str(path)!r} cannot be read: {error}. Check the path and the YAML."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"The configuration {str(path)!r} holds no keys. See the folder `recipes` for examples.")
    for key, value in (overrides or {}).items():
        override(values, key, value)
    return values


def override(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets one value in nested mappings and lists.

    Args:
        values (`dict[str, Any]`):
            Changed in place. A mapping that is missing, or empty, is added.
        key (`str`):
            Names of the levels, joined by dots, such as `mixing.max_rows`; an item of a list is named by its number,
            as in `sources.0.path`.
        value (`Any`):
            The value.

    Raises:
        ValueError: If a level is neither a mapping nor a list, or a list has no such item.
    """
    *parents, last = key.split(".")
    place: Any = values
    try:
        for name in parents:
            if isinstance(place, dict) and place.get(name) is None:
                place[name] = {}
            place = place[int(name) if isinstance(place, list) else name]
        place[int(last) if isinstance(place, list) else last] = value
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"`{key}` names no value of the configuration: {error}. Write the levels as `section.key`, and an "
            "item of a list by its number, as `sources.0.path`."
        ) from error


def did_you_mean(name: str, known: Collection[str]) -> str:
    """`" Did you mean `x`?"` with the known name nearest to one that is unknown; empty where none is near."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean `{nearest[0]}`?" if nearest else ""
