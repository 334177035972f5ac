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

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused import Fused
from .tiles import Grads, Projected, Saved, Scaling, Statistics, fold_tile, tile_gradient, tile_log_probs
from .trl_compat import maybe_gather_lm_head_ctx


# In float32, 128 MiB on CUDA, where larger tiles read the head less often, and few are alive at once, because what is
# done with them is compiled. A CPU is as fast with small ones, and a micro-batch that fits in its memory must not grow
# by its LM head.
TILE_TOKENS = {"cpu": 128, "accelerator": 1024, "cuda": 4096}
TILE_VOCAB = 8192


def tile_tokens(device_type: str) -> int:
    kind = "accelerator" if device_type == "cuda" and not Fused.is_possible else device_type
    return TILE_TOKENS.get(kind, TILE_TOKENS["accelerator"])


def tile_bytes(device_type: str, num_tokens: int, vocab_size: int, hidden_size: int, has_teacher: bool) -> int:
    """What is alive at once of tiles in float32, at most, and the sum of the gradient of one tile of the weight."""
    if device_type == "cuda":
        num_tiles = 4 if has_teacher else 2
    else:
        num_tiles = 17 if has_teacher else 11
    return 4 * min(vocab_size, TILE_VOCAB) * (num_tiles * min(num_tokens, tile_tokens(device_type)) + hidden_size)


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
        scaling = Scaling(head.logit_scale, head.final_logit_softcapping, temperature)
        return _Projection(head, scaling, dtype if fp32_projection else autocast or hidden.dtype, dtype)

    teacher_projection = None if teacher is None else projection(teacher.head, teacher.hidden_NH)
    sweep = _Sweep(projection(head, hidden_NH), teacher, teacher_projection)
    return TokenTerms(*_TokenTermsFunction.apply(hidden_NH, head.weight, head.bias, targets_N, sweep))


# --- Matrix products


@dataclass(frozen=True)
class _Projection:
    """One model's head: `input_dtype` is that of the matmuls' inputs, `dtype` that of their outputs and sums."""

    head: LMHead
    scaling: Scaling
    input_dtype: torch.dtype
    dtype: torch.dtype

    def operand(self, x: Tensor) -> Tensor:
        """`x` rounded to `input_dtype`. Only CUDA multiplies in it without rounding the product too."""
        x = x.to(self.input_dtype)
        return x if x.is_cuda and self.input_dtype in (torch.bfloat16, torch.float16) else x.to(self.dtype)

    def project(self, hidden_NH: Tensor, weight_VH: Tensor, columns: slice) -> Projected:
        """From operands."""
        if hidden_NH.dtype == self.dtype:
            tile_NV = hidden_NH @ weight_VH.t()
        else:
            tile_NV = torch.mm(hidden_NH, weight_VH.t(), out_dtype=self.dtype)  # in bf16 they would bias the KL
        if self.head.bias is not None:
            tile_NV = tile_NV + self.head.bias[columns].to(self.dtype)
        return Projected(tile_NV, self.scaling)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, with operands that may be narrower than `total`, and the product never rounded."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


class _Pair(NamedTuple):
    """Operands of both models: hidden states `(N, H)` of one tile of tokens, or a tile `(V, H)` of the weights."""

    policy: Tensor
    teacher: Tensor | None


@dataclass(frozen=True)
class _Sweep:
    """What the forward and the backward over the tiles have in common."""

    policy: _Projection
    side: TeacherSide | None
    teacher: _Projection | None

    @contextmanager
    def gathered(self, device_type: str) -> Iterator[None]:
        """Gathers ZeRO-3 partitions once around all the tiles, and keeps autocast from rounding the tiles."""
        heads = [projection.head for projection in (self.policy, self.teacher) if projection is not None]
        parameters = [parameter for head in heads for parameter in (head.weight, head.bias)]
        with maybe_gather_lm_head_ctx(*parameters), torch.autocast(device_type, enabled=False):
            yield

    def row_tiles(self, hidden_NH: Tensor) -> list[slice]:
        size = tile_tokens(hidden_NH.device.type)
        return _slices(0, hidden_NH.size(0), size) or [slice(0, 0)]  # without a row, outputs are empty, not missing

    def column_tiles(self) -> Iterator[tuple[slice, bool]]:
        """Tiles of the policy's vocabulary, and whether the teacher is compared on this one: these come first."""
        size = self.policy.head.weight.size(0)
        num_shared = 0 if self.teacher is None else min(size, self.teacher.head.weight.size(0))
        shared, others = _parted(num_shared, () if self.side is None else self.side.unshared_ids)
        others.append((num_shared, size))
        for parts, is_shared in ((shared, True), (others, False)):
            for start, stop in parts:
                for columns in _slices(start, stop, TILE_VOCAB):
                    yield columns, is_shared

    def ids(self, device: torch.device) -> Tensor:
        return torch.arange(self.policy.head.weight.size(0), device=device)

    def states(self, hidden_NH: Tensor, rows: slice) -> _Pair:
        policy = self.policy.operand(hidden_NH[rows])
        if self.side is None or self.teacher is None:
            return _Pair(policy, None)
        return _Pair(policy, self.teacher.operand(self.side.hidden_NH[rows]))

    def weights(self, columns: slice, with_teacher: bool) -> _Pair:
        policy = self.policy.operand(self.policy.head.weight[columns])
        if self.teacher is None or not with_teacher:
            return _Pair(policy, None)
        return _Pair(policy, self.teacher.operand(self.teacher.head.weight[columns]))

    def project(self, states: _Pair, weights: _Pair, columns: slice) -> tuple[Projected, Projected | None]:
        policy = self.policy.project(states.policy, weights.policy, columns)
        if self.teacher is None or states.teacher is None or weights.teacher is None:
            return policy, None
        return policy, self.teacher.project(states.teacher, weights.teacher, columns)


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


class _TokenTermsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, targets_N: Tensor, sweep: _Sweep
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # the entropy is often logged only; its zero gradient is not worth a pass
        with sweep.gathered(hidden_NH.device.type):
            tiles = [
                _forward_rows(sweep, sweep.states(hidden_NH, rows), targets_N[rows])
                for rows in sweep.row_tiles(hidden_NH)
            ]
        columns = [torch.cat(column) for column in zip(*tiles, strict=True)]
        outputs, saved = columns[: -len(Saved._fields)], columns[-len(Saved._fields) :]
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
        given = (grad_logps_N, grad_entropies_N, grad_divergences_N)
        grads = Grads(*(None if grad_N is None else grad_N.to(sweep.policy.dtype) for grad_N in given))
        with sweep.gathered(hidden_NH.device.type):
            return *_backward(sweep, hidden_NH, ctx.needs_input_grad, targets_N, grads, Saved(*saved)), None, None


def _forward_rows(sweep: _Sweep, states: _Pair, targets_N: Tensor) -> tuple[Tensor, ...]:
    """The fields of `TokenTerms`, of which there are two without a teacher, and those of `Saved`."""
    ids = sweep.ids(targets_N.device)
    statistics = Statistics.start(targets_N, sweep.policy.dtype)
    shared = statistics.policy
    for columns, is_shared in sweep.column_tiles():
        weights = sweep.weights(columns, is_shared)
        statistics = fold_tile(*sweep.project(states, weights, columns), ids[columns], targets_N, statistics)
        shared = statistics.policy if is_shared else shared
    log_z_N = statistics.policy.log_z()
    logps_N, entropies_N = statistics.target_logits_N - log_z_N, log_z_N - statistics.policy.mean(0)
    if sweep.side is None:
        return logps_N, entropies_N, *Saved(entropies_N, log_z_N, *[torch.zeros_like(log_z_N)] * 3)
    teacher, teacher_log_z_N = statistics.teacher, statistics.teacher.log_z()
    means = SharedStatistics(shared.log_z(), teacher_log_z_N, shared.mean(1), teacher.mean(1))
    log_probs = _log_probs(sweep, states, means)
    divergences_N, divergence_saved_N = sweep.side.divergence.value(means, log_probs, sweep.side.w)
    teacher_entropies_N = teacher_log_z_N - teacher.mean(0)
    top1_agreement_N = (shared.argmax_N == teacher.argmax_N).to(sweep.policy.dtype)
    terms = (logps_N, entropies_N, divergences_N, teacher_entropies_N, top1_agreement_N)
    return *terms, *Saved(entropies_N, log_z_N, means.policy_log_z_N, teacher_log_z_N, divergence_saved_N)


def _log_probs(sweep: _Sweep, states: _Pair, statistics: SharedStatistics) -> Iterator[tuple[Tensor, Tensor]]:
    """Both models' log-probabilities over the shared ids, tile by tile: a second sweep."""
    for columns, is_shared in sweep.column_tiles():
        if not is_shared:
            return
        policy, teacher = sweep.project(states, sweep.weights(columns, is_shared), columns)
        if teacher is not None:
            yield tile_log_probs(policy, teacher, statistics.policy_log_z_N, statistics.teacher_log_z_N)


class _RowTile(NamedTuple):
    """What the backward needs of one tile of tokens."""

    rows: slice
    states: _Pair
    targets_N: Tensor
    saved_N: Saved
    grads_N: Grads


def _backward(
    sweep: _Sweep, hidden_NH: Tensor, needed: Sequence[bool], targets_N: Tensor, grads_N: Grads, saved_N: Saved
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to the hidden states, the weight and the bias, where they are needed.

    The outer loop is over the vocabulary: so the gradient of the weight is summed in float32 one tile at a time.
    """
    policy, ids = sweep.policy, sweep.ids(hidden_NH.device)
    inputs = (hidden_NH, policy.head.weight, policy.head.bias)
    grad_hidden, grad_weight, grad_bias = (
        torch.zeros(x.shape, device=x.device, dtype=x.dtype if x is policy.head.weight else policy.dtype)
        if x is not None and is_needed
        else None
        for x, is_needed in zip(inputs, needed[:3], strict=True)
    )
    tiles = [
        _RowTile(rows, sweep.states(hidden_NH, rows), targets_N[rows], saved_N.of(rows), grads_N.of(rows))
        for rows in sweep.row_tiles(hidden_NH)
    ]
    for columns, is_shared in sweep.column_tiles():
        weights = sweep.weights(columns, is_shared and grads_N.divergences_N is not None)
        total_VH = None if grad_weight is None else torch.zeros_like(weights.policy, dtype=policy.dtype)
        for tile in tiles:
            total_NH = None if grad_hidden is None else grad_hidden[tile.rows]
            total_V = None if grad_bias is None else grad_bias[columns]
            _add_gradients(sweep, tile, weights, columns, ids[columns], (total_NH, total_VH, total_V))
        if grad_weight is not None and total_VH is not None:
            grad_weight[columns] = total_VH
    grads = (grad_hidden, grad_weight, grad_bias)
    return tuple(
        None if x is None or grad is None else grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)
    )


def _add_gradients(
    sweep: _Sweep,
    tile: _RowTile,
    weights: _Pair,
    columns: slice,
    ids_V: Tensor,
    totals: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Adds what one tile gives to the gradients of its hidden states, its part of the weight and that of the bias."""
    total_NH, total_VH, total_V = totals
    policy, teacher = sweep.project(tile.states, weights, columns)
    gradient, w = (None, 0.0) if sweep.side is None else (sweep.side.divergence.gradient, sweep.side.w)
    arguments = (ids_V, tile.targets_N, tile.saved_N, tile.grads_N, gradient, w)
    grad_NV, grad_V = tile_gradient(policy, teacher, *arguments, sweep.policy.input_dtype, total_V is not None)
    grad_NV = sweep.policy.operand(grad_NV)
    if total_NH is not None:
        _accumulate(total_NH, grad_NV, weights.policy)
    if total_VH is not None:
        _accumulate(total_VH, grad_NV.t(), tile.states.policy)
    if total_V is not None and grad_V is not None:
        total_V += grad_V
