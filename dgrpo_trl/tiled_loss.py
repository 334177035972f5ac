"""Log-probabilities, entropies and a divergence of N tokens, without the logits of tokens x vocabulary.

The hidden states are projected on tiles of `TILE_TOKENS` tokens and `TILE_VOCAB` ids, each tile is folded into running
softmax statistics, and the backward computes the tiles again. Statistics and gradients are accumulated in float32
(float64 for float64 inputs).

Suffixes of shapes:

    N: tokens; in a function on rows, those of one tile
    H: hidden size
    V: ids of one tile of the vocabulary
    1: an axis to broadcast over
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .trl_compat import maybe_gather_lm_head_ctx


# About six tiles are alive at once, whatever the batch, the length and the vocabulary: 32 MiB each in float32 on an
# accelerator. A CPU is as fast with small ones, and a micro-batch that fits in memory must not grow by its LM head.
TILE_TOKENS = {"cpu": 128, "accelerator": 1024}
TILE_VOCAB = 8192


@dataclass(frozen=True)
class LMHead:
    """How one model turns a hidden state into next-token logits: `softcap(scale * (hidden @ weight.T + bias))`.

    Args:
        weight (`torch.Tensor` of shape `(V, H)`):
            Projection. May be the input embedding (tied heads), or partitioned by ZeRO-3, in which case it is gathered
            for the duration of each pass: a collective call.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Added after the projection.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits, before the soft-capping.
        final_logit_softcapping (`float`, *optional*):
            If set, logits `z` become `cap * tanh(z / cap)`.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    final_logit_softcapping: float | None = None

    def logits(self, projected_NV: Tensor, temperature: float) -> Tensor:
        """Temperature-scaled logits of the same shape as the output of the projection."""
        cap = self.final_logit_softcapping
        if cap is not None:
            return torch.tanh(projected_NV * (self.logit_scale / cap)) * (cap / temperature)
        factor = self.logit_scale / temperature
        return projected_NV if factor == 1 else projected_NV * factor

    def logits_grad(self, projected_NV: Tensor, grad_NV: Tensor, temperature: float) -> Tensor:
        """Gradient with respect to `projected_NV`, from that with respect to `logits(projected_NV)`."""
        factor = self.logit_scale / temperature
        grad_NV = grad_NV if factor == 1 else grad_NV * factor
        if self.final_logit_softcapping is None:
            return grad_NV
        tanh_NV = torch.tanh(projected_NV * (self.logit_scale / self.final_logit_softcapping))
        return grad_NV * (1 - tanh_NV * tanh_NV)


class TokenTerms(NamedTuple):
    """Per-token quantities, each a tensor of shape `(N,)` in nats; the last three are `None` without a teacher.

    Args:
        logps: Log-probability of the target under the policy, over its whole head. Has a gradient.
        entropies: Entropy of the policy, over its whole head. Has a gradient.
        divergences: Divergence between policy and teacher, over the shared ids. Has a gradient.
        teacher_entropies: Entropy of the teacher, over the shared ids. No gradient.
        top1_agreement: 1.0 where both models' most likely shared id is the same, else 0.0. No gradient, no unit.
    """

    logps: Tensor
    entropies: Tensor
    divergences: Tensor | None = None
    teacher_entropies: Tensor | None = None
    top1_agreement: Tensor | None = None


class SharedStatistics(NamedTuple):
    """What one pass over the ids that both heads have leaves of N tokens, with logits z (policy) and u (teacher).

    Args:
        policy_log_z_N: log Z_p, the log of the sum of exp(z).
        teacher_log_z_N: log Z_t, the log of the sum of exp(u).
        policy_lead_N: The mean of z - u under the policy.
        teacher_lead_N: The mean of z - u under the teacher.
    """

    policy_log_z_N: Tensor
    teacher_log_z_N: Tensor
    policy_lead_N: Tensor
    teacher_lead_N: Tensor


LogProbs = Iterable[tuple[Tensor, Tensor]]  # log_p_NV of the policy and log_t_NV of the teacher, tile by tile


class Divergence(NamedTuple):
    """A divergence between policy and teacher at one token, as the tiles compute it.

    Args:
        value (`Callable`):
            From the statistics of N tokens, the log-probabilities of each tile, which cost a second pass over the
            vocabulary if they are read, and the weight `w` of the teacher in a mixture: the divergence `(N,)` in nats,
            and whatever else `(N,)` its gradient needs.
        gradient (`Callable`):
            From `log_p_NV`, `log_t_NV`, that quantity `(N, 1)` and `w`: the gradient with respect to the policy's
            logits of the tile, `(N, V)`.
    """

    value: Callable[[SharedStatistics, LogProbs, float], tuple[Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, float], Tensor]


class TeacherSide(NamedTuple):
    """What the policy is compared with, on ids that are not `unshared_ids`; `w` weighs the teacher in a mixture."""

    hidden_NH: Tensor
    head: LMHead
    divergence: Divergence
    w: float
    unshared_ids: tuple[int, ...] = ()


def tiled_token_terms(
    hidden_NH: Tensor,
    head: LMHead,
    targets_N: Tensor,
    temperature: float,
    teacher: TeacherSide | None,
    fp32_projection: bool,
) -> TokenTerms:
    """See [`~losses.token_terms`]."""
    dtype = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    device_type = hidden_NH.device.type
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None

    def projection(head: LMHead, hidden: Tensor) -> _Projection:
        return _Projection(head, temperature, dtype if fp32_projection else autocast or hidden.dtype, dtype)

    teacher_tiles = None if teacher is None else _Teacher(teacher, projection(teacher.head, teacher.hidden_NH))
    sweep = _Sweep(projection(head, hidden_NH), teacher_tiles)
    return TokenTerms(*_TokenTermsFunction.apply(hidden_NH, head.weight, head.bias, targets_N, sweep))


# --- What is folded and projected


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """`weights * values`, and 0 where the weight is: an id with a logit of -inf has no probability and no share."""
    return torch.where(weights == 0, 0.0, weights * values)


class _OnlineSoftmax:
    """Softmax statistics of N rows of logits, folded in one tile of columns at a time."""

    def __init__(self, num_rows: int, device: torch.device, dtype: torch.dtype, num_means: int):
        self.max_N = torch.full((num_rows,), -math.inf, device=device, dtype=dtype)
        self.sum_N = torch.zeros(num_rows, device=device, dtype=dtype)
        self.weighted_N = [torch.zeros(num_rows, device=device, dtype=dtype) for _ in range(num_means)]
        self.argmax_N = torch.zeros(num_rows, device=device, dtype=torch.long)

    def fold(self, columns: slice, logits_NV: Tensor, *values_NV: Tensor) -> None:
        """Folds in one tile; `values_NV` are the quantities whose means under the softmax are wanted."""
        tile_max_N, tile_argmax_N = logits_NV.max(dim=-1)
        self.argmax_N = torch.where(tile_max_N > self.max_N, tile_argmax_N + columns.start, self.argmax_N)
        new_max_N = torch.maximum(self.max_N, tile_max_N)
        finite_max_N = torch.where(new_max_N == -math.inf, 0.0, new_max_N)  # -inf so far: every weight is 0
        rescale_N = torch.exp(self.max_N - finite_max_N)
        weights_NV = torch.exp(logits_NV - finite_max_N.unsqueeze(-1))
        self.sum_N = self.sum_N * rescale_N + weights_NV.sum(-1)
        for i, value_NV in enumerate(values_NV):
            self.weighted_N[i] = self.weighted_N[i] * rescale_N + weighted(weights_NV, value_NV).sum(-1)
        self.max_N = new_max_N

    @property
    def log_z_N(self) -> Tensor:
        return self.max_N + torch.log(self.sum_N)

    def mean_N(self, i: int) -> Tensor:
        return self.weighted_N[i] / self.sum_N


@dataclass(frozen=True)
class _Projection:
    """One model's head: `input_dtype` is that of the matmul's inputs, `dtype` that of its output."""

    head: LMHead
    temperature: float
    input_dtype: torch.dtype
    dtype: torch.dtype

    def tile(self, hidden_NH: Tensor, columns: slice) -> Tensor:
        hidden_NH, weight_VH = hidden_NH.to(self.input_dtype), self.head.weight[columns].to(self.input_dtype)
        if hidden_NH.is_cuda and self.input_dtype in (torch.bfloat16, torch.float16):
            tile_NV = torch.mm(hidden_NH, weight_VH.t(), out_dtype=torch.float32)  # in bf16 they would bias the KL
        else:
            tile_NV = hidden_NH.to(self.dtype) @ weight_VH.to(self.dtype).t()
        return tile_NV if self.head.bias is None else tile_NV + self.head.bias[columns].to(self.dtype)

    def logits(self, hidden_NH: Tensor, columns: slice) -> Tensor:
        return self.head.logits(self.tile(hidden_NH, columns), self.temperature)


@dataclass(frozen=True)
class _Teacher:
    """The teacher's side, and its head on tiles."""

    side: TeacherSide
    projection: _Projection

    def logits(self, rows: slice, columns: slice) -> Tensor:
        return self.projection.logits(self.side.hidden_NH[rows], columns)


@dataclass(frozen=True)
class _Sweep:
    """What the forward and the backward over the tiles have in common."""

    policy: _Projection
    teacher: _Teacher | None

    @contextmanager
    def gathered(self, device_type: str) -> Iterator[None]:
        """Gathers ZeRO-3 partitions once around all the tiles, and keeps autocast from rounding the tiles."""
        heads = [self.policy.head] if self.teacher is None else [self.policy.head, self.teacher.projection.head]
        parameters = [parameter for head in heads for parameter in (head.weight, head.bias)]
        with maybe_gather_lm_head_ctx(*parameters), torch.autocast(device_type, enabled=False):
            yield

    def row_tiles(self, hidden_NH: Tensor) -> list[slice]:
        size = TILE_TOKENS["cpu" if hidden_NH.device.type == "cpu" else "accelerator"]
        return _slices(0, hidden_NH.size(0), size) or [slice(0, 0)]  # without a row, outputs are empty, not missing

    def column_tiles(self) -> Iterator[tuple[slice, _Teacher | None]]:
        """Tiles of the policy's vocabulary, each with the teacher if it is compared on this one: these come first."""
        size = self.policy.head.weight.size(0)
        num_shared = 0 if self.teacher is None else min(size, self.teacher.projection.head.weight.size(0))
        shared, others = _parted(num_shared, () if self.teacher is None else self.teacher.side.unshared_ids)
        others.append((num_shared, size))
        for parts, teacher in ((shared, self.teacher), (others, None)):
            for start, stop in parts:
                for columns in _slices(start, stop, TILE_VOCAB):
                    yield columns, teacher


def _parted(stop: int, left_out: Iterable[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Runs of the ids below `stop` that are not in `left_out`, and of those that are."""
    kept: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    start = 0
    for i in sorted(i for i in left_out if i < stop):
        if i > start:
            kept.append((start, i))
        if others and others[-1][1] == i:
            others[-1] = (others[-1][0], i + 1)
        else:
            others.append((i, i + 1))
        start = i + 1
    return [*kept, (start, stop)], others


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


# --- The sweeps


class _Saved(NamedTuple):
    """What the backward needs of the forward, beside its inputs; the last is the divergence's own."""

    entropies_N: Tensor
    log_z_N: Tensor
    shared_log_z_N: Tensor
    teacher_log_z_N: Tensor
    divergence_N: Tensor


class _TokenTermsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, targets_N: Tensor, sweep: _Sweep
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # the entropy is often logged only; its zero gradient is not worth a pass
        with sweep.gathered(hidden_NH.device.type):
            tiles = [
                _forward_rows(sweep, rows, hidden_NH[rows], targets_N[rows]) for rows in sweep.row_tiles(hidden_NH)
            ]
        columns = [torch.cat(column) for column in zip(*tiles, strict=True)]
        outputs, saved = columns[: -len(_Saved._fields)], columns[-len(_Saved._fields) :]
        # The head is kept as it is: what activation checkpointing hands back has lost its ties to ZeRO-3's partitions
        ctx.sweep = sweep
        ctx.save_for_backward(hidden_NH, targets_N, *saved)
        ctx.mark_non_differentiable(*outputs[3:])
        return tuple(outputs)

    @staticmethod
    def backward(
        ctx: Any,
        grad_logps_N: Tensor | None,
        grad_entropies_N: Tensor | None,
        grad_divergences_N: Tensor | None = None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        hidden_NH, targets_N, *saved = ctx.saved_tensors
        sweep: _Sweep = ctx.sweep
        inputs = (hidden_NH, sweep.policy.head.weight, sweep.policy.head.bias)
        grads = (grad_logps_N, grad_entropies_N, grad_divergences_N)
        with sweep.gathered(hidden_NH.device.type):
            totals = [
                torch.zeros(x.shape, device=x.device, dtype=sweep.policy.dtype) if needed else None
                for x, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
            ]
            for rows in sweep.row_tiles(hidden_NH):
                _backward_rows(
                    sweep,
                    rows,
                    hidden_NH[rows],
                    targets_N[rows],
                    [None if grad is None else grad[rows].to(sweep.policy.dtype) for grad in grads],
                    _Saved(*(statistic[rows] for statistic in saved)),
                    totals,
                )
        grad_inputs = [None if total is None else total.to(x.dtype) for total, x in zip(totals, inputs, strict=True)]
        return *grad_inputs, None, None


def _forward_rows(sweep: _Sweep, rows: slice, hidden_NH: Tensor, targets_N: Tensor) -> tuple[Tensor, ...]:
    """The fields of `TokenTerms`, of which there are two without a teacher, and those of `_Saved`."""
    policy = sweep.policy
    num_rows, device = targets_N.size(0), hidden_NH.device
    softmax = _OnlineSoftmax(num_rows, device, policy.dtype, num_means=2)  # means of its logits and of their lead
    teacher_softmax = _OnlineSoftmax(num_rows, device, policy.dtype, num_means=2)
    shared_log_z_N, lead_N, shared_argmax_N = softmax.log_z_N, softmax.sum_N, softmax.argmax_N
    target_logits_N = torch.zeros(num_rows, device=device, dtype=policy.dtype)
    for columns, teacher in sweep.column_tiles():
        logits_NV = policy.logits(hidden_NH, columns)
        inside_N, local_N = _local_targets(targets_N, columns)
        target_logits_N = torch.where(inside_N, logits_NV.gather(1, local_N.unsqueeze(1)).squeeze(1), target_logits_N)
        if teacher is None:
            softmax.fold(columns, logits_NV, logits_NV)
            continue
        teacher_logits_NV = teacher.logits(rows, columns)
        lead_NV = logits_NV - teacher_logits_NV
        softmax.fold(columns, logits_NV, logits_NV, lead_NV)
        teacher_softmax.fold(columns, teacher_logits_NV, teacher_logits_NV, lead_NV)
        shared_log_z_N, lead_N, shared_argmax_N = softmax.log_z_N, softmax.mean_N(1), softmax.argmax_N
    log_z_N = softmax.log_z_N
    logps_N, entropies_N = target_logits_N - log_z_N, log_z_N - softmax.mean_N(0)
    if sweep.teacher is None:
        return logps_N, entropies_N, *_Saved(entropies_N, log_z_N, *[torch.zeros_like(log_z_N)] * 3)
    teacher_log_z_N = teacher_softmax.log_z_N
    statistics = SharedStatistics(shared_log_z_N, teacher_log_z_N, lead_N, teacher_softmax.mean_N(1))
    log_probs = _log_probs(sweep, rows, hidden_NH, statistics)
    divergences_N, divergence_saved_N = sweep.teacher.side.divergence.value(
        statistics, log_probs, sweep.teacher.side.w
    )
    teacher_entropies_N = teacher_log_z_N - teacher_softmax.mean_N(0)
    top1_agreement_N = (shared_argmax_N == teacher_softmax.argmax_N).to(policy.dtype)
    terms = (logps_N, entropies_N, divergences_N, teacher_entropies_N, top1_agreement_N)
    return *terms, *_Saved(entropies_N, log_z_N, shared_log_z_N, teacher_log_z_N, divergence_saved_N)


def _log_probs(
    sweep: _Sweep, rows: slice, hidden_NH: Tensor, statistics: SharedStatistics
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both models' log-probabilities over the shared ids, tile by tile: a second sweep."""
    for columns, teacher in sweep.column_tiles():
        if teacher is None:
            return
        log_p_NV = sweep.policy.logits(hidden_NH, columns) - statistics.policy_log_z_N.unsqueeze(1)
        yield log_p_NV, teacher.logits(rows, columns) - statistics.teacher_log_z_N.unsqueeze(1)


def _backward_rows(
    sweep: _Sweep,
    rows: slice,
    hidden_NH: Tensor,
    targets_N: Tensor,
    grads_N: list[Tensor | None],
    saved_N: _Saved,
    totals: list[Tensor | None],
) -> None:
    """Adds one tile of rows to the gradients `totals` of the hidden states, the weight and the bias."""
    policy = sweep.policy
    grad_logps_N, grad_entropies_N, grad_divergences_N = grads_N
    saved_N1 = _Saved(*(statistic.unsqueeze(1) for statistic in saved_N))
    total_hidden, total_weight, total_bias = totals
    for columns, teacher in sweep.column_tiles():
        projected_NV = policy.tile(hidden_NH, columns)
        logits_NV = policy.head.logits(projected_NV, policy.temperature)
        log_p_NV = logits_NV - saved_N1.log_z_N
        p_NV = log_p_NV.exp()
        grad_NV = torch.zeros_like(p_NV)
        if grad_logps_N is not None:
            inside_N, local_N = _local_targets(targets_N, columns)
            grad_NV.addcmul_(p_NV, grad_logps_N.unsqueeze(1), value=-1)
            grad_NV.scatter_add_(1, local_N.unsqueeze(1), torch.where(inside_N, grad_logps_N, 0.0).unsqueeze(1))
        if grad_entropies_N is not None:
            surprise_NV = weighted(p_NV, log_p_NV + saved_N1.entropies_N)
            grad_NV.addcmul_(surprise_NV, grad_entropies_N.unsqueeze(1), value=-1)
        if teacher is not None and grad_divergences_N is not None:
            log_p_NV = logits_NV - saved_N1.shared_log_z_N
            log_t_NV = teacher.logits(rows, columns) - saved_N1.teacher_log_z_N
            gradient_NV = teacher.side.divergence.gradient(log_p_NV, log_t_NV, saved_N1.divergence_N, teacher.side.w)
            grad_NV.addcmul_(gradient_NV, grad_divergences_N.unsqueeze(1))
        grad_NV = policy.head.logits_grad(projected_NV, grad_NV, policy.temperature)
        _accumulate(total_hidden, rows, grad_NV, policy.head.weight[columns], policy.input_dtype)
        _accumulate(total_weight, columns, grad_NV.t(), hidden_NH, policy.input_dtype)
        if total_bias is not None:
            total_bias[columns] += grad_NV.sum(0)


def _local_targets(targets_N: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether each target lies in the tile, and its column there (0 where it does not)."""
    inside_N = (targets_N >= columns.start) & (targets_N < columns.stop)
    return inside_N, torch.where(inside_N, targets_N - columns.start, 0)


def _accumulate(total: Tensor | None, index: slice, a: Tensor, b: Tensor, input_dtype: torch.dtype) -> None:
    """`total[index] += a @ b`, with the inputs rounded to `input_dtype` and the product never rounded."""
    if total is None:
        return
    a, b = a.to(input_dtype), b.to(input_dtype)
    if a.is_cuda and input_dtype in (torch.bfloat16, torch.float16):
        total[index] += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total[index].addmm_(a.to(total.dtype), b.to(total.dtype))
