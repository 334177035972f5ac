"""The LongBlocks data set: read it, build it, mix it. Nothing here imports the trainer."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..data_loading import DropCounts
    from .blocks import Block, split_blocks
    from .build import Builder
    from .config import STAGES, BuildConfig, load_config
    from .load import BookCache, load_conversations, load_longblocks, mix_short_and_long, split_by_id
    from .rule_engine import TASKS
    from .sources import CORPORA

__all__ = [
    "CORPORA",
    "STAGES",
    "TASKS",
    "Block",
    "BookCache",
    "BuildConfig",
    "Builder",
    "DropCounts",
    "load_config",
    "load_conversations",
    "load_longblocks",
    "mix_short_and_long",
    "split_blocks",
    "split_by_id",
]

_NAMES = {
    "blocks": ("Block", "split_blocks"),
    "build": ("Builder",),
    "config": ("STAGES", "BuildConfig", "load_config"),
    ".data_loading": ("DropCounts",),
    "load": (
        "BookCache",
        "load_conversations",
        "load_longblocks",
        "mix_short_and_long",
        "split_by_id",
    ),
    "rule_engine": ("TASKS",),
    "sources": ("CORPORA",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: what only reads data does not wait for what builds it."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
