"""Evaluation; the report, which needs matplotlib, is in `report`. Nothing here imports the trainer."""

from .accuracy import generate_completions, summarize_accuracy, wilson_interval


__all__ = ["generate_completions", "summarize_accuracy", "wilson_interval"]
