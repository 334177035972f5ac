"""dGRPO for TRL: GRPO on the student's own rollouts plus the exact KL to a teacher at every token."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import DGRPOConfig
    from .trainer import DGRPOTrainer


__version__ = "0.1.0"

__all__ = ["DGRPOConfig", "DGRPOTrainer", "__version__"]

_MODULES = {"DGRPOConfig": "config", "DGRPOTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    """Imports the trainer when it is asked for: reading and building data needs neither TRL nor its seconds."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
