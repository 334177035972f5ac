"""Runs against each other: `statistics` and `training` compute it, `page` writes it. Needs the extra `demo`."""

from ..results import Run, read_run
from .page import to_markdown, write_comparison
from .statistics import compare_runs
from .training import compare_training


__all__ = ["Run", "compare_runs", "compare_training", "read_run", "to_markdown", "write_comparison"]
