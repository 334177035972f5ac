"""Runs against each other: `statistics` and `training` compute it, `page` writes it. Needs the extra `demo`."""

from ..results import Run, read_run
from .page import to_markdown, write_comparison
from .statistics import compare_runs
from .training import compare_training
