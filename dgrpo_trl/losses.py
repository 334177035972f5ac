"""The dGRPO objective as functions of tensors: per-token terms from hidden states, and their aggregation.

arXiv 2605.12227 adds to the GRPO objective, at every token `t` that the policy sampled itself,

    distill_coef * KL(policy(. | prompt, completion_<t) || teacher(. | prompt, completion_<t))

over the whole vocabulary. Neither model's logits are ever held: the hidden states of the completion tokens are
projected on tiles of `TILE_TOKENS` tokens and `TILE_VOCAB` ids, each tile is folded into running softmax statistics,
and the backward recomputes the tiles. Statistics and gradients are accumulated in float32 (float64 for float64
inputs).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from trl.trainer.utils import maybe_gather_lm_head_ctx


DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")

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

    def logits(self, projected: Tensor, temperature: float) -> Tensor:
        """Temperature-scaled logits of the same shape as `projected`, the output of the projection."""
        cap = self.final_logit_softcapping
        if cap is not None:
            return torch.tanh(projected * (self.logit_scale / cap)) * (cap / temperature)
        factor = self.logit_scale / temperature
        return projected if factor == 1 else projected * factor

    def logits_grad(self, projected: Tensor, grad: Tensor, temperature: float) -> Tensor:
        """Gradient with respect to `projected`, from the gradient with respect to `logits(projected)`."""
        factor = self.logit_scale / temperature
        grad = grad if factor == 1 else grad * factor
        if self.final_logit_softcapping is None:
            return grad
        tanh = torch.tanh(projected * (self.logit_scale / self.final_logit_softcapping))
        return grad * (1 - tanh * tanh)


@dataclass(frozen=True)
class Distillation:
    """What the policy is compared with, at N tokens, and how.

    Args:
        hidden_states (`torch.Tensor` of shape `(N, H_teacher)`):
            The teacher's last hidden states at the positions that predict the N tokens. No gradient flows to them.
        head (`LMHead`):
            The teacher's head.
        divergence (`str`, *optional*, defaults to `"reverse_kl"`):
            `"reverse_kl"` is KL(policy || teacher), `"forward_kl"` is KL(teacher || policy), and `"jsd"` is the
            generalised Jensen-Shannon divergence `w KL(teacher || m) + (1 - w) KL(policy || m)` with
            `m = w teacher + (1 - w) policy`.
        jsd_mixture (`float`, *optional*, defaults to `0.5`):
            The weight `w` of the teacher in the mixture, in (0, 1).

    Where the heads differ in size, both distributions are restricted to the ids of the smaller one and renormalised.
    """

    hidden_states: Tensor
    head: LMHead
    divergence: str = "reverse_kl"
    jsd_mixture: float = 0.5


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


def token_terms(
    hidden_states: Tensor,
    head: LMHead,
    targets: Tensor,
    temperature: float = 1.0,
    distillation: Distillation | None = None,
    fp32_projection: bool = False,
) -> TokenTerms:
    """Everything the loss needs of N tokens, in one pass over the vocabulary, without holding `(N, V)` logits.

    The gradient flows to `hidden_states`, `head.weight` and `head.bias`. With N = 0 the outputs are empty and still
    connected to the graph, so that a rank whose micro-batch is fully masked runs the same collectives as the others.

    Args:
        hidden_states (`torch.Tensor` of shape `(N, H)`):
            The policy's last hidden states at the positions that predict `targets`.
        head (`LMHead`):
            The policy's head.
        targets (`torch.Tensor` of shape `(N,)`):
            Sampled token ids.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; both models' logits are divided by it.
        distillation (`Distillation`, *optional*):
            The teacher's side. `None` gives log-probabilities and entropies only.
        fp32_projection (`bool`, *optional*, defaults to `False`):
            Project in float32, ignoring autocast (TRL's `cast_lm_head_to_fp32`).

    Returns:
        [`TokenTerms`]
    """
    if distillation is not None and not 0 < distillation.jsd_mixture < 1:
        raise ValueError(f"`jsd_mixture` must lie strictly between 0 and 1, got {distillation.jsd_mixture}.")
    sweep = _Sweep.create(hidden_states, head, temperature, distillation, fp32_projection)
    outputs = _TokenTermsFunction.apply(hidden_states, head.weight, head.bias, targets, sweep)
    return TokenTerms(*outputs)


def aggregate(
    per_token_loss: Tensor,
    mask: Tensor,
    loss_type: str,
    max_completion_length: int,
    token_normalizer: Tensor | float,
    accumulation_steps: int = 1,
) -> Tensor:
    """Scalar loss of one micro-batch, normalised as TRL 1.16's `GRPOTrainer` normalises its own term.

    | `loss_type` | normaliser |
    | --- | --- |
    | `grpo`, `sapo` | mean over each completion's tokens, then over completions, then over the accumulation steps |
    | `bnpo` | mean over the micro-batch's tokens, then over the accumulation steps |
    | `dr_grpo` | completions x `max_completion_length` x accumulation steps |
    | `luspo` | sum over each completion's tokens; mean over completions, then over the accumulation steps |
    | `dapo`, `cispo`, `vespo` | `token_normalizer`, which already spans the accumulation steps |

    Args:
        per_token_loss (`torch.Tensor` of shape `(B, T)`):
            Values; whatever stands where `mask` is 0 is ignored.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 at the tokens that count. A completion, or a batch, without any gives 0 and a connected graph.
        loss_type (`str`):
            One of `LOSS_TYPES`.
        max_completion_length (`int`):
            In tokens.
        token_normalizer (`torch.Tensor` or `float`):
            Tokens of one optimiser step, over all ranks, divided by the number of ranks.
        accumulation_steps (`int`, *optional*, defaults to `1`):
            Micro-batches in one optimiser step.

    Returns:
        `torch.Tensor`: scalar.

    Raises:
        ValueError: If `loss_type` is unknown.
    """
    per_token_loss = per_token_loss.masked_fill(mask == 0, 0.0)  # 0 * nan is nan
    if loss_type in ("dapo", "cispo", "vespo"):
        return per_token_loss.sum() / token_normalizer
    if loss_type in ("grpo", "sapo"):
        loss = (per_token_loss.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    elif loss_type == "bnpo":
        loss = per_token_loss.sum() / mask.sum().clamp(min=1.0)
    elif loss_type == "dr_grpo":
        loss = per_token_loss.sum() / (per_token_loss.size(0) * max_completion_length)
    elif loss_type == "luspo":
        loss = per_token_loss.sum(-1).mean()
    else:
        raise ValueError(f"Unknown `loss_type` {loss_type!r}. Choose one of {', '.join(LOSS_TYPES)}.")
    return loss / accumulation_steps


class _OnlineSoftmax:
    """Softmax statistics of N rows of logits, folded in one tile of columns at a time."""

    def __init__(self, rows: int, device: torch.device, dtype: torch.dtype, num_means: int):
        self.max = torch.full((rows,), -math.inf, device=device, dtype=dtype)
        self.sum = torch.zeros(rows, device=device, dtype=dtype)
        self.weighted = [torch.zeros(rows, device=device, dtype=dtype) for _ in range(num_means)]
        self.argmax = torch.zeros(rows, device=device, dtype=torch.long)

    def fold(self, start: int, logits: Tensor, *values: Tensor) -> None:
        """Fold in columns `start..`; `values` are `(rows, columns)` quantities whose softmax mean is wanted."""
        tile_max, tile_argmax = logits.max(dim=-1)
        self.argmax = torch.where(tile_max > self.max, tile_argmax + start, self.argmax)
        new_max = torch.maximum(self.max, tile_max)
        rescale = torch.exp(self.max - new_max)
        weights = torch.exp(logits - new_max.unsqueeze(-1))
        self.sum = self.sum * rescale + weights.sum(-1)
        for i, value in enumerate(values):
            self.weighted[i] = self.weighted[i] * rescale + (weights * value).sum(-1)
        self.max = new_max

    @property
    def log_z(self) -> Tensor:
        return self.max + torch.log(self.sum)

    def mean(self, i: int) -> Tensor:
        return self.weighted[i] / self.sum


@dataclass(frozen=True)
class _Projection:
    """One model's head: `input_dtype` is that of the matmul's inputs, `dtype` that of its output."""

    head: LMHead
    temperature: float
    input_dtype: torch.dtype
    dtype: torch.dtype

    def tile(self, hidden_states: Tensor, columns: slice) -> Tensor:
        hidden, weight = hidden_states.to(self.input_dtype), self.head.weight[columns].to(self.input_dtype)
        if hidden.is_cuda and self.input_dtype in (torch.bfloat16, torch.float16):
            tile = torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # logits rounded to bf16 would bias the KL
        else:
            tile = hidden.to(self.dtype) @ weight.to(self.dtype).t()
        return tile if self.head.bias is None else tile + self.head.bias[columns].to(self.dtype)

    def logits(self, hidden_states: Tensor, columns: slice) -> Tensor:
        return self.head.logits(self.tile(hidden_states, columns), self.temperature)


@dataclass(frozen=True)
class _Sweep:
    """What the forward and the backward over the tiles have in common."""

    policy: _Projection
    teacher: _Projection | None
    distillation: Distillation | None

    @classmethod
    def create(cls, hidden_states, head, temperature, distillation, fp32_projection) -> "_Sweep":
        dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        device_type = hidden_states.device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None

        def projection(head: LMHead, states: Tensor) -> _Projection:
            return _Projection(head, temperature, dtype if fp32_projection else autocast or states.dtype, dtype)

        policy = projection(head, hidden_states)
        if distillation is None:
            return cls(policy, None, None)
        return cls(policy, projection(distillation.head, distillation.hidden_states), distillation)

    @contextmanager
    def gathered(self, device_type: str):
        """Gathers ZeRO-3 partitions once around all the tiles, and keeps autocast from rounding the tiles."""
        heads = [side.head for side in (self.policy, self.teacher) if side is not None]
        parameters = [parameter for head in heads for parameter in (head.weight, head.bias)]
        with maybe_gather_lm_head_ctx(*parameters), torch.autocast(device_type, enabled=False):
            yield

    def column_tiles(self) -> Iterator[tuple[slice, bool]]:
        """Tiles of the policy's vocabulary; the flag tells whether the teacher is compared on this one."""
        size, shared = self.policy.head.weight.size(0), 0
        if self.teacher is not None:
            shared = min(size, self.teacher.head.weight.size(0))
        for start, stop, is_shared in ((0, shared, True), (shared, size, False)):
            for first in range(start, stop, TILE_VOCAB):
                yield slice(first, min(first + TILE_VOCAB, stop)), is_shared


def _row_tiles(hidden_states: Tensor) -> list[slice]:
    size = TILE_TOKENS["cpu" if hidden_states.device.type == "cpu" else "accelerator"]
    num_rows = hidden_states.size(0)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


class _TokenTermsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, sweep: _Sweep):
        ctx.set_materialize_grads(False)  # the entropy is often logged only; its zero gradient is not worth a pass
        teacher_states = None if sweep.teacher is None else sweep.distillation.hidden_states
        with sweep.gathered(hidden_states.device.type):
            tiles = [
                _forward_rows(
                    sweep, hidden_states[rows], targets[rows], None if teacher_states is None else teacher_states[rows]
                )
                for rows in _row_tiles(hidden_states)
            ]
        # Without a row there is no tile either: every output is then empty
        columns = zip(*tiles, strict=True) if tiles else [[hidden_states.new_zeros(0, dtype=sweep.policy.dtype)]] * 9
        *outputs, log_z, shared_log_z, teacher_log_z, backward_mean = (torch.cat(column) for column in columns)
        if sweep.teacher is None:
            outputs = outputs[:2]
        # The head is kept as it is: what activation checkpointing hands back has lost its ties to ZeRO-3's partitions
        ctx.sweep = sweep
        ctx.save_for_backward(hidden_states, targets, outputs[1], log_z, shared_log_z, teacher_log_z, backward_mean)
        ctx.mark_non_differentiable(*outputs[3:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_logps, grad_entropies, grad_divergences=None, *_):
        hidden_states, targets, *statistics = ctx.saved_tensors
        sweep = ctx.sweep
        inputs = (hidden_states, sweep.policy.head.weight, sweep.policy.head.bias)
        grads = (grad_logps, grad_entropies, grad_divergences)
        with sweep.gathered(hidden_states.device.type):
            totals = [
                torch.zeros(x.shape, device=x.device, dtype=sweep.policy.dtype) if needed else None
                for x, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
            ]
            for rows in _row_tiles(hidden_states):
                _backward_rows(
                    sweep,
                    rows,
                    hidden_states[rows],
                    targets[rows],
                    [None if grad is None else grad[rows].to(sweep.policy.dtype) for grad in grads],
                    [statistic[rows] for statistic in statistics],
                    totals,
                )
        grad_inputs = [None if total is None else total.to(x.dtype) for total, x in zip(totals, inputs, strict=True)]
        return *grad_inputs, None, None


def _forward_rows(sweep: _Sweep, hidden_states: Tensor, targets: Tensor, teacher_states: Tensor | None):
    """The five terms and the four statistics that the backward needs, each `(rows,)`, of one tile of rows."""
    policy, teacher = sweep.policy, sweep.teacher
    rows, device = targets.size(0), hidden_states.device
    softmax = _OnlineSoftmax(rows, device, policy.dtype, num_means=2)  # means of its logits and of their lead
    teacher_softmax = _OnlineSoftmax(rows, device, policy.dtype, num_means=2)
    shared_log_z, shared_lead, shared_argmax = softmax.log_z, softmax.sum, softmax.argmax
    target_logits = torch.zeros(rows, device=device, dtype=policy.dtype)
    for columns, is_shared in sweep.column_tiles():
        logits = policy.logits(hidden_states, columns)
        inside, local = _local_targets(targets, columns)
        target_logits = torch.where(inside, logits.gather(1, local.unsqueeze(1)).squeeze(1), target_logits)
        if is_shared:
            teacher_logits = teacher.logits(teacher_states, columns)
            lead = logits - teacher_logits
            softmax.fold(columns.start, logits, logits, lead)
            teacher_softmax.fold(columns.start, teacher_logits, teacher_logits, lead)
            shared_log_z, shared_lead, shared_argmax = softmax.log_z, softmax.mean(1), softmax.argmax
        else:
            softmax.fold(columns.start, logits, logits)
    log_z = softmax.log_z
    logps, entropies = target_logits - log_z, log_z - softmax.mean(0)
    if teacher is None:
        nothing = torch.zeros_like(log_z)
        return (logps, entropies, *[nothing] * 3, log_z, *[nothing] * 3)
    teacher_log_z = teacher_softmax.log_z
    if sweep.distillation.divergence == "reverse_kl":
        divergences = backward_mean = shared_lead - shared_log_z + teacher_log_z
    elif sweep.distillation.divergence == "forward_kl":
        divergences = backward_mean = shared_log_z - teacher_log_z - teacher_softmax.mean(1)
    else:
        divergences, backward_mean = _jsd_rows(sweep, hidden_states, teacher_states, shared_log_z, teacher_log_z)
    teacher_entropies = teacher_log_z - teacher_softmax.mean(0)
    top1_agreement = (shared_argmax == teacher_softmax.argmax).to(policy.dtype)
    terms = (logps, entropies, divergences, teacher_entropies, top1_agreement)
    return *terms, log_z, shared_log_z, teacher_log_z, backward_mean


def _jsd_rows(sweep: _Sweep, hidden_states: Tensor, teacher_states: Tensor, log_z: Tensor, teacher_log_z: Tensor):
    """Generalised JSD and KL(policy || mixture), each `(rows,)`: a second sweep, as both normalisers are needed."""
    w = sweep.distillation.jsd_mixture
    divergences, policy_kl = torch.zeros_like(log_z), torch.zeros_like(log_z)
    for columns, is_shared in sweep.column_tiles():
        if not is_shared:
            break
        log_p = sweep.policy.logits(hidden_states, columns) - log_z.unsqueeze(1)
        log_t = sweep.teacher.logits(teacher_states, columns) - teacher_log_z.unsqueeze(1)
        log_m = torch.logaddexp(log_p + math.log(1 - w), log_t + math.log(w))
        policy_term = (log_p.exp() * (log_p - log_m)).sum(-1)
        policy_kl = policy_kl + policy_term
        divergences = divergences + (1 - w) * policy_term + w * (log_t.exp() * (log_t - log_m)).sum(-1)
    return divergences, policy_kl


def _backward_rows(
    sweep: _Sweep,
    rows: slice,
    hidden_states: Tensor,
    targets: Tensor,
    grads: list[Tensor | None],
    statistics: list[Tensor],
    totals: list[Tensor | None],
) -> None:
    """Adds one tile of rows to the gradients `totals` of the hidden states, the weight and the bias."""
    policy = sweep.policy
    grad_logps, grad_entropies, grad_divergences = grads
    entropies, log_z, *shared_statistics = (statistic.unsqueeze(1) for statistic in statistics)
    total_hidden, total_weight, total_bias = totals
    for columns, is_shared in sweep.column_tiles():
        projected = policy.tile(hidden_states, columns)
        logits = policy.head.logits(projected, policy.temperature)
        log_p = logits - log_z
        p = log_p.exp()
        grad = torch.zeros_like(p)
        if grad_logps is not None:
            inside, local = _local_targets(targets, columns)
            grad.addcmul_(p, grad_logps.unsqueeze(1), value=-1)
            grad.scatter_add_(1, local.unsqueeze(1), torch.where(inside, grad_logps, 0.0).unsqueeze(1))
        if grad_entropies is not None:
            grad.addcmul_(p * (log_p + entropies), grad_entropies.unsqueeze(1), value=-1)
        if is_shared and grad_divergences is not None:
            teacher_logits = sweep.teacher.logits(sweep.distillation.hidden_states[rows], columns)
            logits_grad = _divergence_grad(sweep.distillation, logits, teacher_logits, *shared_statistics)
            grad.addcmul_(logits_grad, grad_divergences.unsqueeze(1))
        grad = policy.head.logits_grad(projected, grad, policy.temperature)
        _accumulate(total_hidden, rows, grad, policy.head.weight[columns], policy.input_dtype)
        _accumulate(total_weight, columns, grad.t(), hidden_states, policy.input_dtype)
        if total_bias is not None:
            total_bias[columns] += grad.sum(0)


def _divergence_grad(
    distillation: Distillation,
    logits: Tensor,
    teacher_logits: Tensor,
    log_z: Tensor,
    teacher_log_z: Tensor,
    mean: Tensor,
) -> Tensor:
    """Gradient of the divergence with respect to the policy's `logits` of one tile; `mean` keeps it tangent."""
    log_p, log_t = logits - log_z, teacher_logits - teacher_log_z
    if distillation.divergence == "forward_kl":
        return log_p.exp() - log_t.exp()
    if distillation.divergence == "reverse_kl":
        return log_p.exp() * (log_p - log_t - mean)
    w = distillation.jsd_mixture
    log_m = torch.logaddexp(log_p + math.log(1 - w), log_t + math.log(w))
    return (1 - w) * log_p.exp() * (log_p - log_m - mean)


def _local_targets(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether each target lies in the tile, and its column there (0 where it does not)."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, torch.where(inside, targets - columns.start, 0)


def _accumulate(total: Tensor | None, index: slice, a: Tensor, b: Tensor, input_dtype: torch.dtype) -> None:
    """`total[index] += a @ b`, with the inputs rounded to `input_dtype` and the product never rounded."""
    if total is None:
        return
    a, b = a.to(input_dtype), b.to(input_dtype)
    if a.is_cuda and input_dtype in (torch.bfloat16, torch.float16):
        total[index] += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total[index].addmm_(a.to(total.dtype), b.to(total.dtype))
