"""The dry run of a training command: what the run would refuse, its batches, lengths, memory and hours."""

from ..gpus import GPUS, Gpu
from .dry_run import Preflight, preflight
from .engine import Engine, read_engine
from .estimates import Estimates, Rows, micro_batch_bytes
from .report import Report
from .shape import Shape


def without_gpu(arguments: list[str]) -> list[str]:
    """The command line of a dry run, made fit for a machine without a GPU, where transformers refuses `bf16`."""
    return [*arguments, "--use_cpu", "true"] if "--dry_run" in arguments else arguments
