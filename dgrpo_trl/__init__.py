"""dGRPO for TRL: GRPO on the student's own rollouts plus the exact KL to a teacher at every token."""

from .config import DGRPOConfig
from .trainer import DGRPOTrainer


__version__ = "0.1.0"

__all__ = ["DGRPOConfig", "DGRPOTrainer", "__version__"]
