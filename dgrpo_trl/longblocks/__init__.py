"""The LongBlocks data set: read it, build it, mix it. Nothing here imports the trainer."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..data_loading import DropCounts
    from .builder.builder import Builder
    from .builder.config import STAGES, BuildConfig, load_config
    from .questions.blocks import Block, split_blocks
    from .questions.rule_engine import TASKS
    from .read.books import BookCache
    from .read.conversations import load_conversations
    from .read.mixing import mix_short_and_long
    from .read.questions import load_longblocks
    from .read.splitting import split_by_id
    from .sources.corpora import CORPORA

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

_MODULES = {
    "CORPORA": "sources.corpora",
    "STAGES": "builder.config",
    "TASKS": "questions.rule_engine",
    "Block": "questions.blocks",
    "BookCache": "read.books",
    "BuildConfig": "builder.config",
    "Builder": "builder.builder",
    "DropCounts": ".data_loading",
    "load_config": "builder.config",
    "load_conversations": "read.conversations",
    "load_longblocks": "read.questions",
    "mix_short_and_long": "read.mixing",
    "split_blocks": "questions.blocks",
    "split_by_id": "read.splitting",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: what only reads data does not wait for what builds it."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
