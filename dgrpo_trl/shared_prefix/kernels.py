"""Attention kernels that return their log-sum-exp and, for the gradient, take that of more keys than they were given.

FlashAttention 2, 3 and 4 are called by the same two operators of PyTorch, `aten::_flash_attention_forward` and
`_backward`: what PyTorch is built with, and what `torch.nn.attention.activate_flash_attention_impl` puts in its place.
The switch is in PyTorch from 2.11 on. What it carries, by the sources of PyTorch 2.11 to 2.13 and of the packages:

| needed here | FA2, built in | FA3 | FA4 |
| --- | --- | --- | --- |
| GPUs, by compute capability | 8.0 and later | 9.0 (Hopper) | 9.0 and 10.0 (Blackwell) |
| variable lengths, log-sum-exp `(H, T)` in float32 | yes | yes | yes |
| backward from a given output and log-sum-exp | yes | yes | yes |
| window | yes | yes | yes; in 2.11 not in the backward, so 2.12 is asked for |
| dimensions of a head, a multiple of 8 | to 256 | to 256 | to 256 on 9.0; to 128, or 256, on 10.0 |
| `torch.use_deterministic_algorithms` | yes | yes, heads under 256 | yes |
| dtypes with a gradient | float16, bfloat16 | float16, bfloat16 | float16, bfloat16 |
| package (module) | none | flash-attn-3 (`flash_attn_interface`) | flash-attn-4 (`flash_attn.cute`) |

Where a package is of another version than its table, [`check_kernel`] finds out before the first use.
"""

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sequences:
    """N sequences that lie one after the other in queries and in keys, and which keys a query sees.

    Positions are aligned at the end: query i of n stands at key i + m - n of m. It sees the keys up to that place if
    `causal`, and none that lie more than `left` before it, unless `left` is `None`. Every query sees a key.
    """

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    causal: bool
    left: int | None = None


class Kernel(ABC):
    """Attention, its log-sum-exp and its gradient.

    `q` is of shape `(Tq, Hq, D)`, `k` and `v` of shape `(Tk, Hkv, D)` with `Hq` a multiple of `Hkv`.
    """

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """The output, of shape `(Tq, Hq, D)`, and the log-sum-exp, of shape `(Hq, Tq)`, float32 or float64."""

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        sequences: Sequences,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `q`, `k` and `v`. `out` and `lse` may be those of more keys than `k`: then it is their part."""

    def active(self) -> AbstractContextManager[None]:
        """What its forwards and backwards are called in."""
        return nullcontext()


def _band(queries: range, keys: range, offset: int, sequences: Sequences, device: torch.device) -> Tensor | None:
    """Which keys each query sees, of shape `(len(queries), len(keys))`; `None` for all."""
    if not sequences.causal and sequences.left is None:
        return None
    places = torch.arange(queries.start + offset, queries.stop + offset, device=device).unsqueeze(1)
    columns = torch.arange(keys.start, keys.stop, device=device)
    seen = columns <= places if sequences.causal else torch.ones_like(columns <= places)
    return seen if sequences.left is None else seen & (columns >= places - sequences.left)


@dataclass(frozen=True)
class _Tile:
    """Queries and the keys that any of them sees, as slices of the row, and which see which."""

    queries: slice
    keys: slice
    seen: Tensor | None


def _tiles(sequences: Sequences, device: torch.device, size: int | None) -> Iterator[_Tile]:
    """Cuts sequences into tiles of at most `size` queries; `None` leaves them whole, and plain causal masks out."""
    q_start = k_start = 0
    for n, m in zip(sequences.q_lengths, sequences.k_lengths, strict=True):
        step = n if size is None else size
        for i in range(0, n, step):
            j, offset = min(i + step, n), m - n
            first = 0 if sequences.left is None else max(0, i + offset - sequences.left)
            last = min(m, j + offset) if sequences.causal else m
            seen = None if size is None else _band(range(i, j), range(first, last), offset, sequences, device)
            yield _Tile(slice(q_start + i, q_start + j), slice(k_start + first, k_start + last), seen)
        q_start, k_start = q_start + n, k_start + m


class MathKernel(Kernel):
    """The definition, in tiles of queries, by plain matrix products in float32 or better: slow, but for any device.

    Args:
        max_scores (`int`, *optional*):
            Elements of the largest score matrix that is held at a time.
    """

    def __init__(self, max_scores: int = 2**24):
        self.max_scores = max_scores

    def _scores(self, q: Tensor, k: Tensor, tile: _Tile, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(Hkv, R, n, D)` and keys `(Hkv, 1, m, D)` of a tile, and its scores `(Hkv, R, n, m)`."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        keys = k[tile.keys].transpose(0, 1).unsqueeze(1).to(dtype)
        queries = q[tile.queries].unflatten(1, (keys.size(0), -1)).permute(1, 2, 0, 3).to(dtype)
        scores = queries @ keys.mT * scale
        if tile.seen is not None:
            scores = scores.masked_fill(~tile.seen, float("-inf"))
        return queries, keys, scores

    def _tiles(self, q: Tensor, sequences: Sequences) -> Iterator[_Tile]:
        size = max(16, min(1024, self.max_scores // (q.size(1) * max(sequences.k_lengths))))
        return _tiles(sequences, q.device, size)

    def forward(self, q, k, v, scale, sequences):
        out = torch.empty_like(q)
        lse = q.new_empty(q.size(1), q.size(0), dtype=torch.promote_types(q.dtype, torch.float32))
        for tile in self._tiles(q, sequences):
            _, _, scores = self._scores(q, k, tile, scale)
            total = scores.logsumexp(-1)
            values = v[tile.keys].transpose(0, 1).unsqueeze(1).to(scores.dtype)
            attended = (scores - total.unsqueeze(-1)).exp() @ values
            out[tile.queries] = attended.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
            lse[:, tile.queries] = total.flatten(0, 1)
        return out, lse

    def backward(self, grad, q, k, v, out, lse, scale, sequences):
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(t, dtype=lse.dtype) for t in (k, v))
        for tile in self._tiles(q, sequences):
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


class TorchCPUKernel(Kernel):
    """PyTorch's FlashAttention for CPUs, by its own operators, which also return and take the log-sum-exp."""

    def _tiles(self, q: Tensor, sequences: Sequences) -> Iterator[_Tile]:
        """Whole sequences where no window cuts them, else tiles of queries as wide as the window."""
        left = sequences.left
        lengths = zip(sequences.q_lengths, sequences.k_lengths, strict=True)
        if left is not None and any((m if sequences.causal else left + n + 1) > left + 1 for n, m in lengths):
            return _tiles(sequences, q.device, max(64, min(left + 1, 1024)))
        return _tiles(replace(sequences, left=None), q.device, None)

    @staticmethod
    def _arguments(q: Tensor, tile: _Tile, scale: float, sequences: Sequences) -> dict[str, Any]:
        if tile.seen is None:
            return {"is_causal": sequences.causal, "scale": scale}
        bias = torch.zeros(tile.seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~tile.seen, float("-inf"))
        return {"is_causal": False, "attn_mask": bias[None, None], "scale": scale}

    def forward(self, q, k, v, scale, sequences):
        out = torch.empty_like(q)
        lse = q.new_empty(q.size(1), q.size(0), dtype=torch.promote_types(q.dtype, torch.float32))
        for tile in self._tiles(q, sequences):
            part, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _as_batch(q[tile.queries]),
                _as_batch(k[tile.keys]),
                _as_batch(v[tile.keys]),
                0.0,
                **self._arguments(q, tile, scale, sequences),
            )
            out[tile.queries], lse[:, tile.queries] = part[0].transpose(0, 1), total[0]
        return out, lse

    def backward(self, grad, q, k, v, out, lse, scale, sequences):
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(t, dtype=lse.dtype) for t in (k, v))
        for tile in self._tiles(q, sequences):
            arguments = self._arguments(q, tile, scale, sequences)
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


class TorchFlashKernel(Kernel):
    """PyTorch's operators of FlashAttention for CUDA: what `torch.nn.attention.varlen` runs.

    Args:
        implementation (`str`, *optional*):
            A name for `activate_flash_attention_impl`. `None` takes what is active: FlashAttention 2, unless the
            process has switched.
    """

    def __init__(self, implementation: str | None = None):
        self.implementation = implementation

    @contextmanager
    def active(self):
        """Switches, and switches back: PyTorch's switch is for the whole process.

        Left on, it would also run ordinary attention, and raise there on dropout and on older GPUs. Once for each
        layer's forward and backward, it takes a fraction of a millisecond.
        """
        previous = current_flash_attention_impl()
        if self.implementation in (None, previous):
            yield
            return
        try:
            activate_flash_attention_impl(self.implementation)
            yield
        finally:
            if current_flash_attention_impl() is not None:
                restore_flash_attention_impl()
            if previous is not None:
                activate_flash_attention_impl(previous)

    def forward(self, q, k, v, scale, sequences):
        head_dim = q.size(-1)
        q, k, v = (_pad_heads(t) for t in (q, k, v))
        arguments, window = _varlen(sequences, q.device)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *arguments, False, scale=scale, **window)
        return out[..., :head_dim], lse

    def backward(self, grad, q, k, v, out, lse, scale, sequences):
        head_dim = q.size(-1)
        grad, q, k, v, out = (_pad_heads(t) for t in (grad, q, k, v, out))
        arguments, window = _varlen(sequences, q.device)
        no_random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # there is no dropout
        gradients = torch.ops.aten._flash_attention_backward(
            *(grad.contiguous(), q, k, v, out, lse.contiguous(), *arguments),
            *(no_random_state, torch.empty(0, device=q.device)),
            scale=scale,
            **window,
        )
        return tuple(gradient[..., :head_dim] for gradient in gradients)


def _pad_heads(tensor: Tensor) -> Tensor:
    """Zeros up to a multiple of 8 dimensions per head, as the kernels need; they change no score and no output."""
    missing = -tensor.size(-1) % 8
    return F.pad(tensor, (0, missing)) if missing else tensor


@functools.lru_cache(maxsize=4096)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    # Cached: every layer asks for the same ones, a few for each group, and a copy to a GPU waits for it
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _varlen(sequences: Sequences, device: torch.device) -> tuple[tuple[Any, ...], dict[str, int]]:
    """Both operators' arguments from the offsets to `is_causal`, and the window, if there is one."""
    q_lengths, k_lengths, left = sequences.q_lengths, sequences.k_lengths, sequences.left
    lengths = (_offsets(q_lengths, device), _offsets(k_lengths, device), max(q_lengths), max(k_lengths))
    if left is None:
        return (*lengths, 0.0, sequences.causal), {}
    return (*lengths, 0.0, False), {"window_size_left": left, "window_size_right": 0 if sequences.causal else -1}


# --- Backends


@dataclass(frozen=True)
class Backend:
    """A choice of `shared_prefix_backend`. To add one, add its line to `BACKENDS`.

    Args:
        runs_on (`str`):
            The devices that it is for, in words.
        fits (`Callable`):
            Whether a device is one of them; `"auto"` passes over the others without a word.
        make (`Callable`):
            From a device, a dtype and the dimensions of a head, the kernel. Raises `ImportError` or `ValueError` with
            what is missing.
    """

    runs_on: str
    fits: Callable[[torch.device], bool]
    make: Callable[[torch.device, torch.dtype, int], Kernel]


def _capability(device: torch.device) -> int:
    """Of a CUDA device the major compute capability, of any other 0."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _make_flash(implementation: str | None, package: str, dtype: torch.dtype, head_dim: int) -> Kernel:
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError("float16 or bfloat16 is needed: set `bf16: true`, or load the model in bfloat16")
    if head_dim > 256:
        raise ValueError("heads of at most 256 dimensions are needed")
    if implementation == "FA4" and torch.__version__ < "2.12":
        raise ValueError(f"PyTorch 2.12 or newer is needed: {torch.__version__} has no window in its backward")
    kernel = TorchFlashKernel(implementation)
    try:
        with kernel.active():
            return kernel
    except ImportError as error:
        raise ImportError(f"{package} is not installed ({error})") from error


# From the fastest to the slowest: the order in which "auto" tries them
BACKENDS = {
    "flash_attention_3": Backend(
        "GPUs of compute capability 9.0 (Hopper)",
        lambda device: _capability(device) == 9,
        lambda device, dtype, head_dim: _make_flash("FA3", "flash-attn-3", dtype, head_dim),
    ),
    "flash_attention_4": Backend(
        "GPUs of compute capability 9.0 (Hopper) and 10.0 (Blackwell)",
        lambda device: _capability(device) in (9, 10),
        lambda device, dtype, head_dim: _make_flash("FA4", "flash-attn-4", dtype, head_dim),
    ),
    "torch": Backend(
        "CPUs and CUDA GPUs",
        lambda device: device.type in ("cpu", "cuda"),
        lambda device, dtype, head_dim: (
            TorchCPUKernel() if device.type == "cpu" else _make_flash(None, "PyTorch", dtype, head_dim)
        ),
    ),
    "math": Backend("any device", lambda device: True, lambda device, dtype, head_dim: MathKernel()),
}
BACKEND_CHOICES = ("auto", *BACKENDS)


def check_backend(name: str) -> None:
    """Raises a `ValueError` if `name` is no choice of `shared_prefix_backend`."""
    if name not in ("auto", *BACKENDS):
        hint = "FlashAttention 2 is built into PyTorch: set 'torch'. " if name == "flash_attention_2" else ""
        raise ValueError(
            f"`shared_prefix_backend` is {name!r}, which is not known. {hint}Choose one of auto, "
            f"{', '.join(BACKENDS)}."
        )


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
    for sequences in (
        Sequences((33, 7), (33, 7), causal=True),
        Sequences((33, 7), (33, 7), causal=True, left=8),
        Sequences((7,), (33,), causal=False),
        Sequences((7,), (33,), causal=False, left=20),
    ):
        num_queries, num_keys = sum(sequences.q_lengths), sum(sequences.k_lengths)
        arguments = (q[:num_queries], k[:num_keys], v[:num_keys])
        results = []
        for candidate in (MathKernel(), kernel):
            with candidate.active():
                out, lse = candidate.forward(*arguments, head_dim**-0.5, sequences)
                gradients = candidate.backward(grad[:num_queries], *arguments, out, lse, head_dim**-0.5, sequences)
            results.append([out, lse, *gradients])
        for name, expected, got in zip(("output", "lse", "dq", "dk", "dv"), *results, strict=True):
            error = (expected.float() - got.float()).abs().max() / expected.float().abs().max().clamp(min=1)
            if not error <= tolerance:
                raise RuntimeError(f"its {name} is off by {error.item():.2g}")


@functools.lru_cache(maxsize=64)
def choose_kernel(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel for tensors of this kind. Each is compared with the definition on a few tokens before its first use.

    `"auto"` takes the first of `BACKENDS` that is made for the device, is installed, fits and passes. It logs which,
    and warns of any faster one that could not be used.

    Args:
        backend (`str`):
            One of `BACKEND_CHOICES`.
        device (`torch.device`), dtype (`torch.dtype`), head_dim (`int`):
            Those of the queries.

    Returns:
        `Kernel`

    Raises:
        ValueError: If a backend that was named cannot be used.
    """
    check_backend(backend)
    reasons: dict[str, list[str]] = {}
    for name in BACKENDS if backend == "auto" else [backend]:
        candidate = BACKENDS[name]
        try:
            if not candidate.fits(device):
                if backend == "auto":
                    continue
                raise ValueError(f"it is for {candidate.runs_on}")
            kernel = candidate.make(device, dtype, head_dim)
            check_kernel(kernel, device, dtype, head_dim)
        except Exception as error:  # whatever a package of another version raises: the next candidate will do
            is_ours = isinstance(error, (ImportError, ValueError))
            reasons.setdefault(str(error) if is_ours else f"{type(error).__name__}: {error}", []).append(name)
            continue
        passed_over = f". Faster, but not usable: {_joined(reasons)}" if reasons else ""
        log = logger.warning if reasons else logger.info
        log(f"Shared prefix: attention by the backend {name!r} for {dtype} on {device.type}{passed_over}")
        return kernel
    raise ValueError(
        f"`shared_prefix_backend` is {backend!r}, which cannot be used for {dtype} on {device.type} with heads of "
        f"{head_dim}: {_joined(reasons)}. Set it to 'auto', or install what it needs."
    )


def _joined(reasons: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
