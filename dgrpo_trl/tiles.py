"""What is computed of one tile of logits, N tokens by V ids, in kernels that are fused on CUDA.

Suffixes of shapes as in `tiled_loss`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .fused import Fused


class Scaling(NamedTuple):
    """How the output of a projection becomes logits: `cap * tanh(scale * projected / cap) / temperature`."""

    scale: float
    cap: float | None
    temperature: float

    def logits(self, projected_NV: Tensor) -> Tensor:
        if self.cap is not None:
            return torch.tanh(projected_NV * (self.scale / self.cap)) * (self.cap / self.temperature)
        factor = self.scale / self.temperature
        return projected_NV if factor == 1 else projected_NV * factor

    def gradient(self, projected_NV: Tensor, grad_NV: Tensor) -> Tensor:
        """Gradient with respect to `projected_NV`, from that with respect to `logits(projected_NV)`."""
        factor = self.scale / self.temperature
        grad_NV = grad_NV if factor == 1 else grad_NV * factor
        if self.cap is None:
            return grad_NV
        tanh_NV = torch.tanh(projected_NV * (self.scale / self.cap))
        return grad_NV * (1 - tanh_NV * tanh_NV)


class Projected(NamedTuple):
    """One model's tile, before the scaling of its logits."""

    values_NV: Tensor
    scaling: Scaling

    def logits(self) -> Tensor:
        return self.scaling.logits(self.values_NV)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """`weights * values`, and 0 where the weight is: an id with a logit of -inf has no probability and no share."""
    return torch.where(weights == 0, 0.0, weights * values)


class OnlineSoftmax(NamedTuple):
    """Softmax statistics of N rows of logits, from the tiles of columns that were folded in."""

    max_N: Tensor
    sum_N: Tensor
    weighted_N: tuple[Tensor, ...]  # sums of quantities whose means under the softmax are wanted
    argmax_N: Tensor

    @classmethod
    def start(cls, like_N: Tensor, num_means: int) -> "OnlineSoftmax":
        means_N = tuple(torch.zeros_like(like_N) for _ in range(num_means))
        argmax_N = torch.zeros_like(like_N, dtype=torch.long)
        return cls(torch.full_like(like_N, -math.inf), torch.zeros_like(like_N), means_N, argmax_N)

    def fold(self, ids_V: Tensor, logits_NV: Tensor, *values_NV: Tensor) -> "OnlineSoftmax":
        """With one more tile; `values_NV` are the quantities, of which there may be fewer than before."""
        tile_max_N, tile_argmax_N = logits_NV.max(dim=-1)
        argmax_N = torch.where(tile_max_N > self.max_N, ids_V[tile_argmax_N], self.argmax_N)
        max_N = torch.maximum(self.max_N, tile_max_N)
        finite_max_N = torch.where(max_N == -math.inf, 0.0, max_N)  # -inf so far: every weight is 0
        rescale_N = torch.exp(self.max_N - finite_max_N)
        weights_NV = torch.exp(logits_NV - finite_max_N.unsqueeze(-1))
        sums_N = tuple(
            sum_N * rescale_N + weighted(weights_NV, value_NV).sum(-1)
            for sum_N, value_NV in zip(self.weighted_N, values_NV, strict=False)
        )
        sum_N = self.sum_N * rescale_N + weights_NV.sum(-1)
        return OnlineSoftmax(max_N, sum_N, sums_N + self.weighted_N[len(sums_N) :], argmax_N)

    def log_z(self) -> Tensor:
        return self.max_N + torch.log(self.sum_N)

    def mean(self, i: int) -> Tensor:
        return self.weighted_N[i] / self.sum_N


class Statistics(NamedTuple):
    """What the forward carries from tile to tile; the means are of the logits, and of the policy's lead in them."""

    target_logits_N: Tensor
    policy: OnlineSoftmax
    teacher: OnlineSoftmax

    @classmethod
    def start(cls, targets_N: Tensor, dtype: torch.dtype) -> "Statistics":
        zeros_N = torch.zeros_like(targets_N, dtype=dtype)
        return cls(zeros_N, OnlineSoftmax.start(zeros_N, num_means=2), OnlineSoftmax.start(zeros_N, num_means=2))


@Fused
def fold_tile(
    policy: Projected, teacher: Projected | None, ids_V: Tensor, targets_N: Tensor, statistics: Statistics
) -> Statistics:
    """The statistics with one more tile."""
    logits_NV = policy.logits()
    inside_N, local_N = _local_targets(targets_N, ids_V)
    at_target_N = logits_NV.gather(1, local_N.unsqueeze(1)).squeeze(1)
    target_logits_N = torch.where(inside_N, at_target_N, statistics.target_logits_N)
    if teacher is None:
        return Statistics(target_logits_N, statistics.policy.fold(ids_V, logits_NV, logits_NV), statistics.teacher)
    teacher_logits_NV = teacher.logits()
    lead_NV = logits_NV - teacher_logits_NV
    return Statistics(
        target_logits_N,
        statistics.policy.fold(ids_V, logits_NV, logits_NV, lead_NV),
        statistics.teacher.fold(ids_V, teacher_logits_NV, teacher_logits_NV, lead_NV),
    )


@Fused
def tile_log_probs(
    policy: Projected, teacher: Projected, log_z_N: Tensor, teacher_log_z_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Both models' log-probabilities, from the logarithms of their normalizers."""
    return policy.logits() - log_z_N.unsqueeze(1), teacher.logits() - teacher_log_z_N.unsqueeze(1)


class Saved(NamedTuple):
    """What the backward needs of the forward, beside its inputs; the last is the divergence's own."""

    entropies_N: Tensor
    log_z_N: Tensor
    shared_log_z_N: Tensor
    teacher_log_z_N: Tensor
    divergence_N: Tensor

    def of(self, rows: slice) -> "Saved":
        return Saved(*(statistic_N[rows] for statistic_N in self))


class Grads(NamedTuple):
    """Gradients with respect to the outputs that have one."""

    logps_N: Tensor | None
    entropies_N: Tensor | None
    divergences_N: Tensor | None

    def of(self, rows: slice) -> "Grads":
        return Grads(*(None if grad_N is None else grad_N[rows] for grad_N in self))


@Fused
def tile_gradient(
    policy: Projected,
    teacher: Projected | None,
    ids_V: Tensor,
    targets_N: Tensor,
    saved_N: Saved,
    grads_N: Grads,
    divergence_gradient: Callable[..., Tensor] | None,
    w: float,
    dtype: torch.dtype,
    sums_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradient with respect to the output of the policy's projection, rounded to `dtype`, and, if asked, its bias."""
    saved_N1 = Saved(*(statistic_N.unsqueeze(1) for statistic_N in saved_N))
    grads_N1 = Grads(*(None if grad_N is None else grad_N.unsqueeze(1) for grad_N in grads_N))
    logits_NV = policy.logits()
    log_p_NV = logits_NV - saved_N1.log_z_N
    p_NV = log_p_NV.exp()
    grad_NV = torch.zeros_like(p_NV)
    if grads_N1.logps_N is not None:
        grad_NV.addcmul_(p_NV, grads_N1.logps_N, value=-1)
        _add_at_targets(grad_NV, ids_V, targets_N, grads_N1.logps_N)
    if grads_N1.entropies_N is not None:
        surprise_NV = weighted(p_NV, log_p_NV + saved_N1.entropies_N)
        grad_NV.addcmul_(surprise_NV, grads_N1.entropies_N, value=-1)
    if teacher is not None and divergence_gradient is not None and grads_N1.divergences_N is not None:
        log_p_NV = logits_NV - saved_N1.shared_log_z_N
        log_t_NV = teacher.logits() - saved_N1.teacher_log_z_N
        grad_NV.addcmul_(divergence_gradient(log_p_NV, log_t_NV, saved_N1.divergence_N, w), grads_N1.divergences_N)
    grad_NV = policy.scaling.gradient(policy.values_NV, grad_NV)
    return grad_NV.to(dtype), grad_NV.sum(0) if sums_bias else None


def _local_targets(targets_N: Tensor, ids_V: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each target lies in the tile, and its column there (0 where it does not)."""
    local_N = targets_N - ids_V[0]
    inside_N = (local_N >= 0) & (local_N < ids_V.size(0))
    return inside_N, torch.where(inside_N, local_N, 0)


def _add_at_targets(tile_NV: Tensor, ids_V: Tensor, targets_N: Tensor, values_N1: Tensor) -> None:
    if torch.compiler.is_compiling():  # where a scatter would be a kernel of its own, and cut the others in two
        tile_NV += torch.where(ids_V == targets_N.unsqueeze(1), values_N1, 0.0)
    else:
        inside_N, local_N = _local_targets(targets_N, ids_V)
        tile_NV.scatter_add_(1, local_N.unsqueeze(1), torch.where(inside_N.unsqueeze(1), values_N1, 0.0))
