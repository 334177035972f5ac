"""Attention over a packed row by each kernel, against the definition."""

import time
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import current_flash_attention_impl
from torch.profiler import ProfilerActivity, profile

from dgrpo_trl.shared_prefix import BACKENDS, Group, Kernel, MathKernel, PrefixLayout, choose_kernel, packed_attention

from . import Figures, Skipped, require


# Queries' and keys' heads, and their dimensions
HEADS = {"cuda": {"Qwen3-1.7B": (16, 8, 128), "Qwen3-32B": (64, 8, 128)}, "cpu": {"small": (4, 2, 16)}}
LAYOUTS = {
    "cuda": PrefixLayout((Group(0, 8192, (700, 1, 300)), Group(9193, 500, (2000,)))),
    "cpu": PrefixLayout((Group(0, 200, (70, 1, 30)), Group(301, 50, (40,)))),
}
WINDOWS = {"cuda": 1024, "cpu": 64}
TOLERANCE = 0.02  # of the norm, for values of bfloat16: rounding alone gives 0.003 to 0.005


def check_attention(backend: str, device: str) -> Figures:
    """Output and gradients of one of `BACKENDS`, in bfloat16, at Qwen3's heads, with a window and without.

    The figures are the largest relative error, seconds of a forward and backward, and the kernel that took longest.
    """
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    figures: Figures = {"error": 0.0}
    for model, (*heads, head_dim) in HEADS[device].items():
        kernel = _kernel(backend, place, head_dim)
        for window in (None, WINDOWS[device]):
            qkv = _random_row(LAYOUTS[device].num_tokens, heads, head_dim, place)
            expected = _run(MathKernel(), [x.float() for x in qkv], LAYOUTS[device], window)
            found = _run(kernel, qkv, LAYOUTS[device], window)
            for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
                error = ((a.float() - b).norm() / b.norm()).item()
                require(error < TOLERANCE, f"{model}, window {window}: its {name} is off by {error:.3g} of its norm")
                figures["error"] = max(figures["error"], error)
            name = f"{model}, {'no window' if window is None else f'window {window}'}"
            figures[name] = _timed(kernel, qkv, LAYOUTS[device], window)
    return figures


def _kernel(backend: str, device: torch.device, head_dim: int) -> Kernel:
    if not BACKENDS[backend].fits(device):
        raise Skipped(f"it is for {BACKENDS[backend].runs_on}")
    try:
        BACKENDS[backend].make(device, torch.bfloat16, head_dim)
    except ImportError as error:
        raise Skipped(str(error)) from error
    kernel = choose_kernel(backend, device, torch.bfloat16, head_dim)
    with kernel.active():
        active, wanted = current_flash_attention_impl(), getattr(kernel, "implementation", None)
        require(active == wanted, f"PyTorch's switch stands at {active}, not at {wanted}")
    return kernel


def _random_row(num_tokens: int, heads: list[int], head_dim: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(num_tokens, n, head_dim) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) for shape in shapes]


def _run(kernel: Kernel, qkv: list[Tensor], layout: PrefixLayout, window: int | None) -> tuple[Tensor, ...]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = packed_attention(*leaves, layout, leaves[0].size(-1) ** -0.5, window, kernel)
    return (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))


def _timed(kernel: Kernel, qkv: list[Tensor], layout: PrefixLayout, window: int | None) -> dict[str, Any]:
    is_cuda = qkv[0].is_cuda
    start = time.perf_counter()
    _run(kernel, qkv, layout, window)
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiled:
        _run(kernel, qkv, layout, window)
    events = profiled.key_averages()
    if is_cuda:
        longest = max((e for e in events if e.device_type == DeviceType.CUDA), key=lambda e: e.self_device_time_total)
    else:
        longest = max((e for e in events if e.key.startswith("aten::")), key=lambda e: e.self_cpu_time_total)
    return {"seconds": seconds, "kernel": longest.key}
