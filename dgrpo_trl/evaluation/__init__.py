"""Evaluation: `runs` is the way in, `compare` sets runs against each other. Nothing here imports the trainer."""

from .generation import generate_completions
from .scores import wilson_interval


__all__ = ["generate_completions", "wilson_interval"]
