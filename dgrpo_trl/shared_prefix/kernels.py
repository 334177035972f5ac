"""Attention kernels that return the log-sum-exp and take it back for the gradient."""

import functools
import importlib.util
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations import hub_kernels
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK
from transformers.utils import is_kernels_available


logger = logging.getLogger(__name__)

BACKENDS = ("auto", "flash_attention_3", "flash_attention_2", "torch", "math")

# A score matrix of this many elements at most is held at a time by the backend "math"
MAX_SCORES = 2**24


class Kernel(Protocol):
    """Attention of N sequences that lie one after the other, with its log-sum-exp, and its gradient.

    `q` is of shape `(Tq, Hq, D)`, `k` and `v` of shape `(Tk, Hkv, D)` with `Hq` a multiple of `Hkv`; `q_lengths` and
    `k_lengths` cut them into sequences. Positions are aligned at the end: query i of n stands at key i + m - n of m.
    It sees the keys up to that place if `causal`, and none that lie more than `left` before it, unless `left` is
    `None`. Every query sees a key.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_lengths: tuple[int, ...],
        k_lengths: tuple[int, ...],
        scale: float,
        causal: bool,
        left: int | None,
    ) -> tuple[Tensor, Tensor]:
        """The output, of shape `(Tq, Hq, D)`, and the log-sum-exp, of shape `(Hq, Tq)`, float32 or float64."""
        ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        q_lengths: tuple[int, ...],
        k_lengths: tuple[int, ...],
        scale: float,
        causal: bool,
        left: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `q`, `k` and `v`. `out` and `lse` may be those of more keys than `k`: then it is their part."""
        ...


def _band(i: int, j: int, first: int, last: int, offset: int, causal: bool, left: int | None, device) -> Tensor | None:
    """Which of the keys `first` to `last` the queries i to j see, of shape `(j - i, last - first)`; `None` for all."""
    if not causal and left is None:
        return None
    place = torch.arange(i + offset, j + offset, device=device).unsqueeze(1)
    keys = torch.arange(first, last, device=device)
    seen = keys <= place if causal else torch.ones_like(keys <= place)
    return seen if left is None else seen & (keys >= place - left)


@dataclass(frozen=True)
class _Tile:
    """Queries and the keys that any of them sees, as slices of the row, and which see which."""

    queries: slice
    keys: slice
    seen: Tensor | None


def _tiles(q_lengths, k_lengths, causal: bool, left: int | None, device, tile: int | None) -> Iterator[_Tile]:
    """Cuts sequences into tiles of at most `tile` queries; `None` leaves them whole, and plain causal masks out."""
    q_start = k_start = 0
    for n, m in zip(q_lengths, k_lengths, strict=True):
        step = n if tile is None else tile
        for i in range(0, n, step):
            j, offset = min(i + step, n), m - n
            first = 0 if left is None else max(0, i + offset - left)
            last = min(m, j + offset) if causal else m
            seen = None if tile is None else _band(i, j, first, last, offset, causal, left, device)
            yield _Tile(slice(q_start + i, q_start + j), slice(k_start + first, k_start + last), seen)
        q_start, k_start = q_start + n, k_start + m


class MathKernel:
    """The definition, in tiles of queries, by plain matrix products in float32 or better: slow, but for any device."""

    def _scores(self, q: Tensor, k: Tensor, tile: _Tile, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(Hkv, R, n, D)` and keys `(Hkv, 1, m, D)` of a tile, and its scores `(Hkv, R, n, m)`."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        keys = k[tile.keys].transpose(0, 1).unsqueeze(1).to(dtype)
        queries = q[tile.queries].unflatten(1, (keys.size(0), -1)).permute(1, 2, 0, 3).to(dtype)
        scores = queries @ keys.mT * scale
        if tile.seen is not None:
            scores = scores.masked_fill(~tile.seen, float("-inf"))
        return queries, keys, scores

    def _tiles(self, q, q_lengths, k_lengths, causal, left):
        tile = max(16, min(1024, MAX_SCORES // (q.size(1) * max(k_lengths))))
        return _tiles(q_lengths, k_lengths, causal, left, q.device, tile)

    def forward(self, q, k, v, q_lengths, k_lengths, scale, causal, left):
        out = torch.empty_like(q)
        lse = q.new_empty(q.size(1), q.size(0), dtype=torch.promote_types(q.dtype, torch.float32))
        for tile in self._tiles(q, q_lengths, k_lengths, causal, left):
            _, _, scores = self._scores(q, k, tile, scale)
            total = scores.logsumexp(-1)
            values = v[tile.keys].transpose(0, 1).unsqueeze(1).to(scores.dtype)
            attended = (scores - total.unsqueeze(-1)).exp() @ values
            out[tile.queries] = attended.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
            lse[:, tile.queries] = total.flatten(0, 1)
        return out, lse

    def backward(self, grad, q, k, v, out, lse, q_lengths, k_lengths, scale, causal, left):
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(t, dtype=lse.dtype) for t in (k, v))
        for tile in self._tiles(q, q_lengths, k_lengths, causal, left):
            queries, keys, scores = self._scores(q, k, tile, scale)
            heads = scores.shape[:2]
            weights = (scores - lse[:, tile.queries].unflatten(0, heads).unsqueeze(-1)).exp()
            dout, attended = (
                t[tile.queries].unflatten(1, heads).permute(1, 2, 0, 3).to(scores.dtype) for t in (grad, out)
            )
            values = v[tile.keys].transpose(0, 1).unsqueeze(1).to(scores.dtype)
            dscores = weights * (dout @ values.mT - (dout * attended).sum(-1, keepdim=True)) * scale
            dq[tile.queries] = (dscores @ keys).permute(2, 0, 1, 3).flatten(1, 2).to(dq.dtype)
            dk[tile.keys] += (dscores.mT @ queries).sum(1).transpose(0, 1)
            dv[tile.keys] += (weights.mT @ dout).sum(1).transpose(0, 1)
        return dq, dk.to(k.dtype), dv.to(v.dtype)


class TorchCPUKernel:
    """PyTorch's FlashAttention for CPUs, by its own operators, which also return and take the log-sum-exp."""

    def _tiles(self, q, q_lengths, k_lengths, causal, left):
        """Whole sequences where no window cuts them, else tiles of queries as wide as the window."""
        is_cut = left is not None and any(
            (m if causal else left + n + 1) > left + 1 for n, m in zip(q_lengths, k_lengths, strict=True)
        )
        tile = max(64, min(left + 1, 1024)) if is_cut else None
        return _tiles(q_lengths, k_lengths, causal, left if is_cut else None, q.device, tile)

    @staticmethod
    def _arguments(q: Tensor, tile: _Tile, causal: bool, scale: float) -> dict:
        if tile.seen is None:
            return {"is_causal": causal, "scale": scale}
        bias = torch.zeros(tile.seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~tile.seen, float("-inf"))
        return {"is_causal": False, "attn_mask": bias[None, None], "scale": scale}

    def forward(self, q, k, v, q_lengths, k_lengths, scale, causal, left):
        out = torch.empty_like(q)
        lse = q.new_empty(q.size(1), q.size(0), dtype=torch.promote_types(q.dtype, torch.float32))
        for tile in self._tiles(q, q_lengths, k_lengths, causal, left):
            part, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _as_batch(q[tile.queries]),
                _as_batch(k[tile.keys]),
                _as_batch(v[tile.keys]),
                0.0,
                **self._arguments(q, tile, causal, scale),
            )
            out[tile.queries], lse[:, tile.queries] = part[0].transpose(0, 1), total[0]
        return out, lse

    def backward(self, grad, q, k, v, out, lse, q_lengths, k_lengths, scale, causal, left):
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(t, dtype=lse.dtype) for t in (k, v))
        for tile in self._tiles(q, q_lengths, k_lengths, causal, left):
            arguments = self._arguments(q, tile, causal, scale)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _as_batch(grad[tile.queries]),
                _as_batch(q[tile.queries]),
                _as_batch(k[tile.keys]),
                _as_batch(v[tile.keys]),
                _as_batch(out[tile.queries]),
                lse[None, :, tile.queries],
                0.0,
                arguments.pop("is_causal"),
                **arguments,
            )
            part_q, part_k, part_v = (part[0].transpose(0, 1) for part in parts)
            dq[tile.queries] = part_q
            dk[tile.keys] += part_k
            dv[tile.keys] += part_v
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _as_batch(tensor: Tensor) -> Tensor:
    """`(T, H, D)` as `(1, H, T, D)`, without a copy."""
    return tensor.transpose(0, 1).unsqueeze(0)


class _VarlenKernel:
    """What FlashAttention's variable-length kernels have in common: offsets on the device, windows as two numbers."""

    def forward(self, q, k, v, q_lengths, k_lengths, scale, causal, left):
        head_dim = q.size(-1)
        q, k, v = (_pad_heads(t) for t in (q, k, v))
        out, lse = self._forward(q, k, v, scale, *_varlen(q_lengths, k_lengths, causal, left, q.device))
        return out[..., :head_dim], lse

    def backward(self, grad, q, k, v, out, lse, q_lengths, k_lengths, scale, causal, left):
        head_dim = q.size(-1)
        grad, q, k, v, out = (_pad_heads(t) for t in (grad, q, k, v, out))
        varlen = _varlen(q_lengths, k_lengths, causal, left, q.device)
        gradients = self._backward(grad, q, k, v, out, lse.contiguous(), scale, *varlen)
        return tuple(gradient[..., :head_dim] for gradient in gradients)


def _pad_heads(tensor: Tensor) -> Tensor:
    """Zeros up to a multiple of 8 dimensions a head, as the kernels need; they change no score and no output."""
    missing = -tensor.size(-1) % 8
    return F.pad(tensor, (0, missing)) if missing else tensor


@functools.lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    # Cached: every layer asks for the same ones
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _varlen(q_lengths, k_lengths, causal: bool, left: int | None, device) -> tuple:
    """Offsets and largest lengths of queries and keys, whether the mask is causal alone, and the window."""
    window = (-1 if left is None else left, 0 if causal else -1)
    return (
        _offsets(q_lengths, device),
        _offsets(k_lengths, device),
        max(q_lengths),
        max(k_lengths),
        causal and left is None,
        window if left is not None else (-1, -1),
    )


class TorchFlashKernel(_VarlenKernel):
    """The FlashAttention that PyTorch is built with for CUDA: what `torch.nn.attention.varlen` runs."""

    def _forward(self, q, k, v, scale, q_offsets, k_offsets, max_q, max_k, is_causal, window):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(q, k, v, q_offsets, k_offsets, max_q, max_k, 0.0, is_causal, False),
            scale=scale,
            window_size_left=window[0],
            window_size_right=window[1],
        )
        return out, lse

    def _backward(self, grad, q, k, v, out, lse, scale, q_offsets, k_offsets, max_q, max_k, is_causal, window):
        no_random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # there is no dropout
        return torch.ops.aten._flash_attention_backward(
            *(grad.contiguous(), q, k, v, out, lse, q_offsets, k_offsets, max_q, max_k, 0.0, is_causal),
            *(no_random_state, torch.empty(0, device=q.device)),
            scale=scale,
            window_size_left=window[0],
            window_size_right=window[1],
        )


class FlashAttention2Kernel(_VarlenKernel):
    """The package `flash-attn`, or the same code through the package `kernels`."""

    def __init__(self, module: ModuleType):
        self.module = module

    def _forward(self, q, k, v, scale, q_offsets, k_offsets, max_q, max_k, is_causal, window):
        out, lse, *_ = self.module._flash_attn_varlen_forward(
            *(q, k, v, q_offsets, k_offsets, max_q, max_k, 0.0, scale, is_causal, *window)
        )
        return out, lse

    def _backward(self, grad, q, k, v, out, lse, scale, q_offsets, k_offsets, max_q, max_k, is_causal, window):
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        no_softcap, no_slopes, is_deterministic = 0.0, None, torch.are_deterministic_algorithms_enabled()
        self.module._flash_attn_varlen_backward(
            *(grad, q, k, v, out, lse, *gradients, q_offsets, k_offsets, max_q, max_k, 0.0, scale, is_causal, *window),
            *(no_softcap, no_slopes, is_deterministic),
        )
        return gradients


class FlashAttention3Kernel(_VarlenKernel):
    """The package `flash-attn-3` for Hopper, or the same code through the package `kernels`."""

    def __init__(self, module: ModuleType):
        self.module = module

    def _forward(self, q, k, v, scale, q_offsets, k_offsets, max_q, max_k, is_causal, window):
        out, lse, *_ = self.module._flash_attn_forward(
            *(q, k, v),
            cu_seqlens_q=q_offsets,
            cu_seqlens_k=k_offsets,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=scale,
            causal=is_causal,
            window_size_left=window[0],
            window_size_right=window[1],
        )
        return out, lse

    def _backward(self, grad, q, k, v, out, lse, scale, q_offsets, k_offsets, max_q, max_k, is_causal, window):
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self.module._flash_attn_backward(
            *(grad, q, k, v, out, lse, q_offsets, k_offsets, None, None, max_q, max_k, *gradients),
            softmax_scale=scale,
            is_causal=is_causal,
            window_size_left=window[0],
            window_size_right=window[1],
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return gradients


# The modules that hold the raw kernels
_FLASH_PACKAGES = {
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_2": "flash_attn.flash_attn_interface",
}


def _flash_module(backend: str) -> ModuleType:
    """The module that holds a flash package's raw kernels.

    Raises:
        ImportError: If neither the package nor the kernel's repository is at hand.
    """
    try:
        return importlib.import_module(_FLASH_PACKAGES[backend])
    except ImportError:
        if not is_kernels_available():
            raise
    repo_id = FLASH_ATTN_KERNEL_FALLBACK[backend]
    kernel = hub_kernels.get_kernel(repo_id, version=hub_kernels.get_attn_kernel_version(repo_id))
    return sys.modules[kernel.flash_attn_varlen_func.__module__]


def _is_at_hand(backend: str) -> bool:
    """Whether a flash package is installed, or its code lies in the cache of `kernels`: nothing is downloaded here."""
    if importlib.util.find_spec(_FLASH_PACKAGES[backend].split(".")[0]):
        return True
    if not is_kernels_available():
        return False
    from kernels import install_kernel  # of its releases, only those that transformers accepts are known to have it

    repo_id = FLASH_ATTN_KERNEL_FALLBACK[backend]
    try:
        install_kernel(repo_id, version=hub_kernels.get_attn_kernel_version(repo_id), local_files_only=True)
    except (FileNotFoundError, ValueError):  # no build of it for this system, or no such version, in the cache
        return False
    return True


def _make_kernel(backend: str, device_type: str) -> Kernel:
    if backend == "flash_attention_3":
        return FlashAttention3Kernel(_flash_module(backend))
    if backend == "flash_attention_2":
        return FlashAttention2Kernel(_flash_module(backend))
    if backend == "torch":
        return TorchCPUKernel() if device_type == "cpu" else TorchFlashKernel()
    return MathKernel()


def _candidates(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Backends that "auto" tries, best first; "math" always works."""
    if device.type == "cpu":
        return ["torch", "math"]
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_dim > 256:
        return ["math"]
    is_hopper = torch.cuda.get_device_capability(device)[0] == 9
    flash = ["flash_attention_3", "flash_attention_2"] if is_hopper else ["flash_attention_2"]
    return [*filter(_is_at_hand, flash), "torch", "math"]


@torch.no_grad()
def check_kernel(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Compares `kernel` with the definition on two short sequences: output, log-sum-exp and all gradients.

    Raises:
        RuntimeError: If they differ, or whatever the kernel raises.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(40, heads, head_dim, generator=generator).to(device, dtype) for heads in (4, 2, 2, 4))
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
    # Causal sequences, a window, and queries that see keys which are not theirs: the three ways it is called
    for q_lengths, k_lengths, causal, left in (
        ((33, 7), (33, 7), True, None),
        ((33, 7), (33, 7), True, 8),
        ((7,), (33,), False, None),
        ((7,), (33,), False, 20),
    ):
        rows, keys = sum(q_lengths), sum(k_lengths)
        arguments = (q[:rows], k[:keys], v[:keys])
        rest = (q_lengths, k_lengths, head_dim**-0.5, causal, left)
        results = []
        for candidate in (MathKernel(), kernel):
            out, lse = candidate.forward(*arguments, *rest)
            results.append([out, lse, *candidate.backward(grad[:rows], *arguments, out, lse, *rest)])
        for name, expected, got in zip(("output", "lse", "dq", "dk", "dv"), *results, strict=True):
            error = (expected.float() - got.float()).abs().max() / expected.float().abs().max().clamp(min=1)
            if not error <= tolerance:
                raise RuntimeError(f"its {name} is off by {error.item():.2g}")


@functools.lru_cache(maxsize=64)
def choose_kernel(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel for tensors of this kind. Each is compared with the definition on a few tokens before its first use.

    Args:
        backend (`str`):
            `"flash_attention_3"` and `"flash_attention_2"` are the packages, `"torch"` what PyTorch is built with, on
            CUDA and on the CPU, `"math"` plain matrix products in tiles, for any device and dtype. `"auto"` takes the
            first of them that is installed, fits and passes, and logs which.
        device (`torch.device`), dtype (`torch.dtype`), head_dim (`int`):
            Those of the queries.

    Returns:
        `Kernel`

    Raises:
        ValueError: If a backend that was named cannot be used.
    """
    reasons = []
    for name in _candidates(device, dtype, head_dim) if backend == "auto" else [backend]:
        try:
            kernel = _make_kernel(name, device.type)
            check_kernel(kernel, device, dtype, head_dim)
        except Exception as error:  # whatever a package of another version raises: the next candidate will do
            reasons.append(f"{name}: {type(error).__name__}: {error}")
            continue
        skipped = f" (not {'; not '.join(reasons)})" if reasons else ""
        log = logger.warning if reasons else logger.info
        log(f"Shared prefix: attention by {type(kernel).__name__} for {dtype} on {device.type}{skipped}")
        return kernel
    raise ValueError(
        f"`shared_prefix_backend` is {backend!r}, which cannot be used for {dtype} on {device.type} with heads of "
        f"{head_dim}: {'; '.join(reasons)}. Set it to 'auto', or install what it needs."
    )
