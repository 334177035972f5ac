"""The dGRPO objective as functions of tensors: per-token terms from hidden states, and their aggregation.

arXiv 2605.12227 adds to the GRPO objective, at every token `t` that the policy sampled itself,

    distill_coef * KL(policy(. | prompt, completion_<t) || teacher(. | prompt, completion_<t))

over the whole vocabulary. Neither model's logits are ever held as a whole: `tiled_loss` says how.
"""

import math
from dataclasses import dataclass

from torch import Tensor, logaddexp, zeros_like

from .fused import Fused
from .tiled_loss import (
    TILE_TOKENS,
    Divergence,
    LMHead,
    LogProbs,
    SharedStatistics,
    TeacherSide,
    TokenTerms,
    tile_bytes,
    tiled_token_terms,
)
from .tiles import weighted


__all__ = [
    "DIVERGENCES",
    "LOSS_TYPES",
    "TILE_TOKENS",
    "Distillation",
    "Divergence",
    "LMHead",
    "TokenTerms",
    "aggregate",
    "tile_bytes",
    "token_terms",
]

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")


# --- Divergences between the policy p and the teacher t at one token, over the ids v that both heads have. With logits
# z and u, log p_v = z_v - log Z_p and log t_v = u_v - log Z_t; 0 log 0 is 0, hence [`weighted`].
# Suffixes of shapes: N tokens, V ids of one tile. To add one, write its value and its gradient as [`Divergence`] has
# them, and add its line to the table.


def _reverse_kl(s: SharedStatistics, log_probs: LogProbs, w: float) -> tuple[Tensor, Tensor]:
    """KL(p || t) = sum_v p_v (log p_v - log t_v), the paper's divergence."""
    # sum_v p_v (z_v - log Z_p - u_v + log Z_t), and sum_v p_v = 1
    kl_N = s.policy_lead_N - s.policy_log_z_N + s.teacher_log_z_N
    return kl_N, kl_N


def _reverse_kl_gradient(log_p_NV: Tensor, log_t_NV: Tensor, kl_N1: Tensor, w: float) -> Tensor:
    """d KL(p || t) / dz_v = p_v (log p_v - log t_v - KL(p || t))."""
    return weighted(log_p_NV.exp(), log_p_NV - log_t_NV - kl_N1)


def _forward_kl(s: SharedStatistics, log_probs: LogProbs, w: float) -> tuple[Tensor, Tensor]:
    """KL(t || p) = sum_v t_v (log t_v - log p_v)."""
    # sum_v t_v (u_v - log Z_t - z_v + log Z_p), and sum_v t_v = 1
    kl_N = s.policy_log_z_N - s.teacher_log_z_N - s.teacher_lead_N
    return kl_N, kl_N


def _forward_kl_gradient(log_p_NV: Tensor, log_t_NV: Tensor, kl_N1: Tensor, w: float) -> Tensor:
    """d KL(t || p) / dz_v = p_v - t_v."""
    return log_p_NV.exp() - log_t_NV.exp()


def _jsd(s: SharedStatistics, log_probs: LogProbs, w: float) -> tuple[Tensor, Tensor]:
    """Generalized Jensen-Shannon: w KL(t || m) + (1 - w) KL(p || m) with m = w t + (1 - w) p."""
    # No identity here: the mixture needs both normalizers at every id, which takes the second pass
    jsd_N, policy_kl_N = zeros_like(s.policy_log_z_N), zeros_like(s.policy_log_z_N)
    for log_p_NV, log_t_NV in log_probs:
        policy_term_N, teacher_term_N = _terms_of_jsd(log_p_NV, log_t_NV, w)
        policy_kl_N = policy_kl_N + policy_term_N
        jsd_N = jsd_N + (1 - w) * policy_term_N + w * teacher_term_N
    return jsd_N, policy_kl_N


@Fused
def _terms_of_jsd(log_p_NV: Tensor, log_t_NV: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """What one tile adds to KL(p || m) and KL(t || m)."""
    log_m_NV = _log_mixture(log_p_NV, log_t_NV, w)
    policy_term_N = weighted(log_p_NV.exp(), log_p_NV - log_m_NV).sum(-1)
    return policy_term_N, weighted(log_t_NV.exp(), log_t_NV - log_m_NV).sum(-1)


def _jsd_gradient(log_p_NV: Tensor, log_t_NV: Tensor, policy_kl_N1: Tensor, w: float) -> Tensor:
    """d JSD / dz_v = (1 - w) p_v (log p_v - log m_v - KL(p || m)): what m itself moves cancels."""
    return weighted((1 - w) * log_p_NV.exp(), log_p_NV - _log_mixture(log_p_NV, log_t_NV, w) - policy_kl_N1)


def _log_mixture(log_p_NV: Tensor, log_t_NV: Tensor, w: float) -> Tensor:
    return logaddexp(log_p_NV + math.log(1 - w), log_t_NV + math.log(w))


DIVERGENCES = {
    "reverse_kl": Divergence(_reverse_kl, _reverse_kl_gradient),
    "forward_kl": Divergence(_forward_kl, _forward_kl_gradient),
    "jsd": Divergence(_jsd, _jsd_gradient),
}


# --- The terms of the loss, per token


@dataclass(frozen=True)
class Distillation:
    """What the policy is compared with, at N tokens, and how.

    Both distributions are restricted to the ids that they are compared on, and renormalized: those of the smaller head
    without `unshared_ids`.

    Args:
        hidden_states (`torch.Tensor` of shape `(N, H_teacher)`):
            The teacher's last hidden states at the positions that predict the N tokens. No gradient flows to them.
        head (`LMHead`):
            The teacher's head.
        divergence (`str`, *optional*, defaults to `"reverse_kl"`):
            One of `DIVERGENCES`: `"reverse_kl"` is KL(policy || teacher), `"forward_kl"` is KL(teacher || policy), and
            `"jsd"` the generalized Jensen-Shannon divergence.
        jsd_mixture (`float`, *optional*, defaults to `0.5`):
            The weight of the teacher in the mixture of `"jsd"`, in (0, 1).
        unshared_ids (`tuple[int, ...]`, *optional*):
            Ids that mean nothing to one of the models.

    Raises:
        ValueError: If the divergence is unknown, or the weight is out of range.
    """

    hidden_states: Tensor
    head: LMHead
    divergence: str = "reverse_kl"
    jsd_mixture: float = 0.5
    unshared_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"Unknown divergence {self.divergence!r}. Choose one of {', '.join(DIVERGENCES)}.")
        if not 0 < self.jsd_mixture < 1:
            raise ValueError(f"`jsd_mixture` must lie strictly between 0 and 1, got {self.jsd_mixture}.")


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
    teacher = None
    if distillation is not None:
        divergence = DIVERGENCES[distillation.divergence]
        teacher = TeacherSide(
            distillation.hidden_states,
            distillation.head,
            divergence,
            distillation.jsd_mixture,
            distillation.unshared_ids,
        )
    return tiled_token_terms(hidden_states, head, targets, temperature, teacher, fp32_projection)


# --- From tokens to one number


def aggregate(
    per_token_loss: Tensor,
    mask: Tensor,
    loss_type: str,
    max_completion_length: int,
    token_normalizer: Tensor | float,
    accumulation_steps: int = 1,
) -> Tensor:
    """Scalar loss of one micro-batch, normalized as TRL 1.16's `GRPOTrainer` normalizes its own term.

    | `loss_type` | normalizer |
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
            Tokens of one optimizer step, over all ranks, divided by the number of ranks.
        accumulation_steps (`int`, *optional*, defaults to `1`):
            Micro-batches in one optimizer step.

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
