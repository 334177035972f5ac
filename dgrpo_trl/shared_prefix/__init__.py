"""The shared prefix: a prompt runs once for all its completions, in training and in the prefill of generation."""

from .attention import packed_attention, register, shared_prefix_attention
from .kernels import (
    BACKEND_CHOICES,
    BACKENDS,
    Backend,
    Kernel,
    MathKernel,
    Sequences,
    check_backend,
    check_kernel,
    choose_kernel,
)
from .packing import (
    Group,
    PackedRollouts,
    PrefixLayout,
    group_rows,
    no_mask,
    pack,
    prompt_keys,
    split_by_tokens,
    unpadded,
)
from .regrouping import num_regrouped, regroup
from .sharing import ExactnessCheck, PrefixSharing, share_prefill
from .support import SUPPORTED_LAYERS, unsupported_reason


__all__ = [
    "BACKENDS",
    "BACKEND_CHOICES",
    "Backend",
    "ExactnessCheck",
    "Group",
    "Kernel",
    "MathKernel",
    "PackedRollouts",
    "PrefixLayout",
    "PrefixSharing",
    "SUPPORTED_LAYERS",
    "Sequences",
    "check_backend",
    "check_kernel",
    "choose_kernel",
    "group_rows",
    "no_mask",
    "num_regrouped",
    "pack",
    "packed_attention",
    "prompt_keys",
    "register",
    "regroup",
    "share_prefill",
    "shared_prefix_attention",
    "split_by_tokens",
    "unpadded",
    "unsupported_reason",
]
