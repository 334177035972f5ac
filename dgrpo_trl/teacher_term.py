"""The term that the teacher adds to the loss of a micro-batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import DGRPOConfig
from .losses import Distillation, LMHead, aggregate
from .run.metrics import distillation_values
from .scoring import DistilledTokens


class TeacherTerm:
    """The divergence to the teacher at a micro-batch's tokens, normalized as `loss_type` normalizes the GRPO term.

    Args:
        args ([`DGRPOConfig`]):
            Divergence, gate, clip and `loss_type`.
        num_processes (`int`):
            Ranks, over which gradients are averaged.
        unshared_ids (`tuple[int, ...]`, *optional*):
            See [`~losses.Distillation`].
        eos_token_ids (`list[int]`, *optional*):
            The tokens that end a completion, for `distill_mask_eos`.
    """

    def __init__(
        self,
        args: DGRPOConfig,
        num_processes: int,
        unshared_ids: tuple[int, ...] = (),
        eos_token_ids: Sequence[int] = (),
    ):
        self.args = args
        self.num_processes = num_processes
        self.unshared_ids = unshared_ids
        self.eos_token_ids = eos_token_ids

    def distillation(self, inputs: dict[str, Any], head: LMHead) -> Distillation:
        """What the student's forward compares itself with."""
        args = self.args
        return Distillation(
            inputs["teacher_hidden_states"],
            head,
            args.distill_divergence,
            args.distill_jsd_mixture,
            self.unshared_ids,
        )

    def mask(self, inputs: dict[str, Any]) -> Tensor:
        """The tokens that the term covers, of shape `(B, T)`."""
        mask = loss_mask(inputs)
        if not self.args.distill_mask_eos:
            return mask
        ends = torch.tensor(self.eos_token_ids, device=mask.device)
        return mask * ~torch.isin(inputs["completion_ids"], ends)

    def __call__(self, inputs: dict[str, Any], tokens: DistilledTokens, accumulation_steps: int | None) -> Tensor:
        """The term without its coefficient, a scalar.

        Args:
            inputs (`dict`):
                A micro-batch, as TRL makes it.
            tokens ([`~scoring.DistilledTokens`]):
                Of its B completions, in tensors of shape `(B, T)`.
            accumulation_steps (`int`, *optional*):
                Micro-batches of this optimizer step; `None` in an evaluation.
        """
        # `num_items_in_batch` counts the tokens of a generation batch, over all ranks
        windows = 1 if accumulation_steps is None else self.args.steps_per_generation / accumulation_steps
        divergences = tokens.divergences
        if self.args.distill_clip is not None:
            divergences = divergences.clamp(max=self.args.distill_clip)
        return aggregate(
            divergences.masked_fill(self._taught(inputs) == 0, 0.0),
            loss_mask(inputs),  # the normalizer of the GRPO term, so that a token weighs the same whatever is taught
            self.args.loss_type,
            self.args.max_completion_length,
            inputs["num_items_in_batch"].clamp(min=1) / self.num_processes / windows,
            accumulation_steps or 1,
        )

    def metrics(self, inputs: dict[str, Any], tokens: DistilledTokens) -> dict[str, tuple[Tensor, Tensor]]:
        """What is logged of a micro-batch, see [`~run.metrics.AccumulationWindow.add`]."""
        mask = self.mask(inputs)
        values = distillation_values(tokens, mask)
        if self.args.distill_gate != "all":
            values["distill/taught_share"] = self._taught(inputs), mask
        if self.args.distill_clip is not None:
            is_clipped = (tokens.divergences > self.args.distill_clip).to(mask.dtype)
            values["distill/clipped_share"] = is_clipped, self._taught(inputs)
        return values

    def gate(self, rewards_per_func: Tensor, weights: Tensor, num_generations: int) -> Tensor:
        """1 for the rollouts that are taught, of shape `(N,)`; those without any reward are.

        Args:
            rewards_per_func (`torch.Tensor` of shape `(N, F)`):
                Of all ranks, rollouts of a group next to each other; NaN where a function gives none.
            weights (`torch.Tensor` of shape `(F,)`):
                Of the functions.
            num_generations (`int`):
                Rollouts of a group.
        """
        rewards = (rewards_per_func * weights).nansum(-1)
        has_none = rewards_per_func.isnan().all(-1)
        threshold = self.args.distill_gate_reward
        if threshold is not None:
            return (has_none | (rewards < threshold)).to(rewards)
        groups, is_missing = rewards.view(-1, num_generations), has_none.view(-1, num_generations)
        highest = groups.masked_fill(is_missing, -torch.inf).amax(-1)
        lowest = groups.masked_fill(is_missing, torch.inf).amin(-1)
        has_variance = highest - lowest > 1e-8  # as TRL counts `frac_reward_zero_std`
        return (~has_variance).to(rewards).repeat_interleave(num_generations)

    def _taught(self, inputs: dict[str, Any]) -> Tensor:
        """1 at the tokens that are taught, of shape `(B, T)`."""
        mask = self.mask(inputs)
        return mask if self.args.distill_gate == "all" else mask * inputs["distill_gate"].unsqueeze(-1)


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """The tokens that TRL's loss covers, of shape `(B, T)`."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
