"""The dry run of a training script: what a run would refuse, its batches, lengths, memory and hours."""

from dataclasses import dataclass, field

from .dry_run import Preflight, preflight
from .engine import GPUS, Engine, Gpu, read_engine
from .estimates import Estimates, Rows, micro_batch_bytes
from .report import Report
from .shape import Shape


__all__ = [
    "Engine",
    "Estimates",
    "GPUS",
    "Gpu",
    "Preflight",
    "PreflightArguments",
    "Report",
    "Rows",
    "Shape",
    "micro_batch_bytes",
    "preflight",
    "read_engine",
    "without_gpu",
]


@dataclass
class PreflightArguments:
    """The dry run of a training script."""

    dry_run: bool = field(
        default=False,
        metadata={"help": "Only look: lengths, positions, batches, memory and hours, without weights or a GPU."},
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "Configuration that the run will be launched with, for `dry_run`."}
    )
    gpu: str = field(
        default="h100-80gb", metadata={"help": "GPU to estimate for, for `dry_run`.", "choices": sorted(GPUS)}
    )
    mfu: float = field(
        default=0.4, metadata={"help": "Share of the GPU's peak that training reaches, for `dry_run`; in (0, 1]."}
    )

    def __post_init__(self):
        if self.gpu not in GPUS:
            raise ValueError(f"`gpu` is {self.gpu!r}, which is not known. Choose one of {', '.join(sorted(GPUS))}.")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"`mfu` is {self.mfu}. It is a share of the peak. Choose one in (0, 1], such as 0.4.")


def without_gpu(arguments: list[str]) -> list[str]:
    """The command line of a dry run, made fit for a machine without a GPU, where transformers refuses `bf16`."""
    return [*arguments, "--use_cpu", "true"] if "--dry_run" in arguments else arguments
