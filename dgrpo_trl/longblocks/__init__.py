"""The LongBlocks data set: read it, build it, mix it. Nothing here imports the trainer."""

from .blocks import Block, split_blocks
from .rules import TASKS, Passage, RuleBuilder, split_passages


__all__ = ["TASKS", "Block", "Passage", "RuleBuilder", "split_blocks", "split_passages"]
