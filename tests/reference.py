"""Naive float64 versions of everything the loss is made of, written from the definitions and sharing nothing with the
package: full masks and logits, plain softmax, autograd."""

import torch
import torch.nn.functional as F


def logits(hidden, weight, bias=None, scale=1.0, softcap=None, temperature=1.0):
    z = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    return z / temperature


def divergence(policy_logits, teacher_logits, kind, mixture=0.5):
    """(..., V) logits -> (...,) divergence in nats."""
    p, t = F.softmax(policy_logits, -1), F.softmax(teacher_logits, -1)

    def kl(a, b):
        return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(-1)  # 0 log 0 is 0

    if kind == "reverse_kl":
        return kl(p, t)
    if kind == "forward_kl":
        return kl(t, p)
    if kind == "jsd":
        m = mixture * t + (1 - mixture) * p
        return mixture * kl(t, m) + (1 - mixture) * kl(p, m)
    raise ValueError(f"No definition of the divergence {kind!r} here.")


def grpo_per_token(logps, advantages, loss_type, config):
    """On-policy GRPO terms (old log-probabilities are the detached current ones), one per token, shape (B, T)."""
    advantages = advantages[:, None]
    ratio = (logps - logps.detach()).exp()
    if loss_type in ("grpo", "dapo", "dr_grpo", "bnpo", "luspo"):
        return -torch.minimum(ratio * advantages, ratio.clamp(1 - config.epsilon, 1 + config.epsilon) * advantages)
    if loss_type == "cispo":
        return -ratio.clamp(max=config.epsilon).detach() * advantages * logps
    if loss_type == "sapo":
        tau = torch.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    # vespo at sequence weight 1: phi = w^k * exp(lambda * (1 - w)) = 1
    return -advantages * logps


def normalize(values, mask, loss_type, max_completion_length, num_items, accumulation_steps):
    """(B, T) values -> scalar, by each loss type's published normalizer."""
    total = 0.0
    if loss_type in ("grpo", "sapo"):
        for v, m in zip(values, mask, strict=True):
            total = total + (v * m).sum() / max(m.sum().item(), 1)
        return total / len(values) / accumulation_steps
    total = (values * mask).sum()
    if loss_type == "bnpo":
        return total / max(mask.sum().item(), 1) / accumulation_steps
    if loss_type == "dr_grpo":
        return total / (len(values) * max_completion_length) / accumulation_steps
    if loss_type == "luspo":
        return total / len(values) / accumulation_steps
    return total / num_items


def attention(q, k, v, layout, scale, window):
    """Of a packed row, with a mask of L x L; `q` of shape `(L, Hq, D)`."""
    seen = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    positions = torch.zeros(layout.num_tokens, dtype=torch.long)
    for group in layout.groups:
        start, end = group.start, group.start + group.prefix_length
        positions[start:end] = torch.arange(group.prefix_length)
        seen[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
        branch = end
        for length in group.branch_lengths:
            positions[branch : branch + length] = group.prefix_length + torch.arange(length)
            seen[branch : branch + length, start:end] = True
            seen[branch : branch + length, branch : branch + length] = torch.ones(length, length).tril().bool()
            branch += length
    if window is not None:
        seen &= positions[:, None] - positions[None] < window
    repeats = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
