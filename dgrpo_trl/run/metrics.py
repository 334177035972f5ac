"""Metrics of the teacher term: means over the tokens of an accumulation window, on all ranks together."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from ..scoring import DistilledTokens


class AccumulationWindow:
    """Sums of the micro-batches between two optimizer steps, over all ranks.

    A mean over micro-batches or ranks would weigh the tokens of a short one more; sums and counts weigh all alike.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._totals: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, per_token: Mapping[str, tuple[Tensor, Tensor]], losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Adds a micro-batch. A collective call at the end of the window.

        Args:
            per_token (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
                Values and the mask of those that count, of one shape.
            losses (`dict[str, torch.Tensor]`):
                Scalars, already divided by the number of micro-batches, that add up over these.

        Returns:
            `dict[str, float]`: Empty within the window. At its end the mean of each value, without those of which no
            token counts, and the mean over ranks of each loss.
        """
        sums = [(values * mask).sum() for values, mask in per_token.values()]
        counts = [mask.sum().to(sums[0].dtype) for _, mask in per_token.values()]
        shares = [loss / self.accelerator.num_processes for loss in losses.values()]
        self._totals = torch.stack([*sums, *counts, *shares]) + self._totals
        if not self.accelerator.sync_gradients:
            return {}
        totals = self.accelerator.reduce(self._totals, reduction="sum").tolist()
        self._totals = 0.0
        n = len(per_token)
        means = {name: totals[i] / totals[n + i] for i, name in enumerate(per_token) if totals[n + i] > 0}
        return means | dict(zip(losses, totals[2 * n :], strict=True))


def distillation_values(tokens: DistilledTokens, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What is logged of the tokens of a micro-batch, see [`AccumulationWindow.add`]; `mask` is of shape `(B, T)`."""
    rank_in_completion, lengths = mask.cumsum(-1), mask.sum(-1, keepdim=True)
    quarter = (lengths + 3) // 4
    return {
        "distill/divergence": (tokens.divergences, mask),
        "distill/divergence_first_quarter": (tokens.divergences, mask * (rank_in_completion <= quarter)),
        "distill/divergence_last_quarter": (tokens.divergences, mask * (rank_in_completion > lengths - quarter)),
        "distill/teacher_entropy": (tokens.teacher_entropies, mask),
        "distill/top1_agreement": (tokens.top1_agreement, mask),
    }
