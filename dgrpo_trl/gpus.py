"""The GPUs that a dry run knows. To add one, add its line to `GPUS`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What the estimates need of a GPU.

    Args:
        memory_gib (`float`):
            Its memory.
        tflops (`float`):
            Dense bfloat16 operations, 10^12 per second, as published.
        bandwidth (`float`):
            Of its memory, 10^9 bytes per second, as published.
    """

    memory_gib: float
    tflops: float
    bandwidth: float


GPUS = {
    "a100-40gb": Gpu(39.4, 312, 1555),
    "a100-80gb": Gpu(79.1, 312, 2039),
    "h100-80gb": Gpu(79.1, 989, 3350),
    "h200-141gb": Gpu(139.8, 989, 4800),
    "l40s-48gb": Gpu(44.4, 362, 864),
    "rtx4090-24gb": Gpu(23.5, 165, 1008),
}
