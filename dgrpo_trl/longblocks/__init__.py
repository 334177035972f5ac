"""The LongBlocks data set: read it, build it, mix it. Nothing here imports the trainer."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..data_loading import DropCounts as DropCounts
    from .builder.builder import Builder as Builder
    from .builder.config import STAGES as STAGES
    from .builder.config import BuildConfig as BuildConfig
    from .builder.config import load_config as load_config
    from .questions.blocks import Block as Block
    from .questions.blocks import split_blocks as split_blocks
    from .questions.rule_engine import TASKS as TASKS
    from .read.books import BookCache as BookCache
    from .read.conversations import load_conversations as load_conversations
    from .read.mixing import mix_short_and_long as mix_short_and_long
    from .read.mixing import split_by_id as split_by_id
    from .read.questions import load_longblocks as load_longblocks
    from .sources.corpora import CORPORA as CORPORA

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
    "split_by_id": "read.mixing",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: what only reads data does not wait for what builds it."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
