"""Packages of the extras, imported where they are needed."""

import importlib
from typing import Any


def import_extra(module: str, purpose: str, extra: str = "longblocks", otherwise: str = "") -> Any:
    """A module of an optional package; where that is missing, the error says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs `{module.partition('.')[0]}`. It is not installed. Run `pip install "
            f"'dgrpo-trl[{extra}]'`{otherwise}."
        ) from error
