"""The term that the teacher adds to the loss of a micro-batch."""

from typing import Any

from torch import Tensor

from .config import DGRPOConfig
from .losses import Distillation, LMHead, aggregate
from .scoring import DistilledTokens


class TeacherTerm:
    """The divergence to the teacher at a micro-batch's tokens, normalized as `loss_type` normalizes the GRPO term.

    Args:
        args ([`DGRPOConfig`]):
            Divergence and `loss_type`.
        num_processes (`int`):
            Ranks, over which gradients are averaged.
        unshared_ids (`tuple[int, ...]`, *optional*):
            See [`~losses.Distillation`].
    """

    def __init__(self, args: DGRPOConfig, num_processes: int, unshared_ids: tuple[int, ...] = ()):
        self.args = args
        self.num_processes = num_processes
        self.unshared_ids = unshared_ids

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
        return aggregate(
            tokens.divergences,
            loss_mask(inputs),
            self.args.loss_type,
            self.args.max_completion_length,
            inputs["num_items_in_batch"].clamp(min=1) / self.num_processes / windows,
            accumulation_steps or 1,
        )


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """The tokens that TRL's loss covers, of shape `(B, T)`."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
