"""Evaluation: `runs` is the way in; the report, in `report`, needs matplotlib. Nothing here imports the trainer."""

from .accuracy import summarize_accuracy, wilson_interval
from .generation import generate_completions


__all__ = ["generate_completions", "summarize_accuracy", "wilson_interval"]
