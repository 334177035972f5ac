"""Steps whose loss or gradient is NaN or infinite: they are reported and skipped, and too many end the run."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..scoring import CompletionOutput
from ..shared_prefix import unpadded


if TYPE_CHECKING:
    from ..trainer import DGRPOTrainer

logger = get_logger(__name__)

_TAIL_TOKENS = 48  # of a prompt, in a message
_MAX_ROWS = 4  # of a micro-batch, in a message


class NonFiniteGuard(TrainerCallback):
    """Leaves the weights as they are where an optimiser step would spoil them.

    A step is skipped on all ranks where the loss of a micro-batch, or the norm of the gradient, is not finite on any.
    DeepSpeed skips such a step by itself, with the same test of the gradient; elsewhere the gradients are taken away
    before the optimiser looks, so that neither weights nor moments move. Steps so skipped count as steps.

    Args:
        trainer ([`DGRPOTrainer`]):
            The run.
        max_steps (`int`):
            Training ends with an error after so many skipped steps in a row.
    """

    def __init__(self, trainer: "DGRPOTrainer", max_steps: int):
        self.trainer = trainer
        self.max_steps = max_steps
        self.num_in_a_row = 0
        self._is_bad = False
        self._report = "the gradient is not finite although the loss is"

    @torch.no_grad()
    def look(self, inputs: dict[str, Any], terms: dict[str, Tensor], scored: CompletionOutput | None) -> None:
        """Remembers and reports a micro-batch whose loss is not finite. Rank-local.

        Args:
            inputs (`dict`):
                The micro-batch, as the trainer's loss gets it.
            terms (`dict[str, torch.Tensor]`):
                The terms of its loss, scalars.
            scored ([`~heads.CompletionOutput`], *optional*):
                What the student's forward gave.
        """
        if not self.trainer.model.training or torch.isfinite(sum(terms.values())):
            return
        bad_terms = [name for name, value in terms.items() if not torch.isfinite(value)] or list(terms)
        rows = "; ".join(self._rows(inputs, scored)) or "no single row stands out"
        self._is_bad = True
        self._report = f"the {' and the '.join(bad_terms)} term of the loss is not finite. Rows: {rows}"
        logger.warning(
            f"Step {self.trainer.state.global_step + 1} on rank {self.trainer.accelerator.process_index}: "
            f"{self._report}",
            main_process_only=False,
        )

    def _rows(self, inputs: dict[str, Any], scored: CompletionOutput | None) -> list[str]:
        """Which rows hold a value that is not finite, and in what."""
        mask = inputs["completion_mask"].bool()
        values = {
            "advantage": inputs["advantages"],
            "old log-probabilities": inputs.get("old_per_token_logps"),
        }
        if scored is not None:
            values |= {"log-probabilities": scored.logps, "divergence to the teacher": scored.divergences}
        faults: dict[int, list[str]] = {}
        for name, value in values.items():
            if value is None:
                continue
            is_bad = ~torch.isfinite(value)
            is_bad = (is_bad & mask).any(-1) if value.dim() == 2 else is_bad
            for row in is_bad.nonzero().flatten().tolist():
                faults.setdefault(row, []).append(name)
        prompts = unpadded(inputs["prompt_ids"], inputs["prompt_mask"])
        decode = self.trainer._tokenizer.decode
        return [
            f"{row} ({', '.join(names)}), whose prompt ends {decode(prompts[row][-_TAIL_TOKENS:].tolist())!r}"
            for row, names in sorted(faults.items())[:_MAX_ROWS]
        ]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        """A collective call. Under DeepSpeed the step has been made, or skipped, at this point."""
        trainer = self.trainer
        is_deepspeed = trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        is_bad = self._is_bad or not trainer.gradient_is_finite
        is_bad = trainer.accelerator.reduce(torch.tensor(float(is_bad), device=trainer.accelerator.device)).item() > 0
        was_skipped = is_deepspeed and trainer.accelerator.optimizer_step_was_skipped
        self._is_bad = False
        if not (is_bad or was_skipped):
            self.num_in_a_row = 0
            return
        if is_deepspeed and not was_skipped:
            raise RuntimeError(
                f"Step {state.global_step + 1}: {self._report}; DeepSpeed has made the step all the same, and the "
                "weights may be spoilt. Go on from the last checkpoint with `resume_from_checkpoint: auto`, with a "
                "lower `learning_rate` or without these rows; under ZeRO-2 set `check_grad_overflow` in the bf16 "
                "section of DeepSpeed's configuration."
            )
        if not is_deepspeed:
            trainer.model_wrapped.zero_grad(set_to_none=True)  # optimisers pass over what has no gradient
        self.num_in_a_row += 1
        logger.warning(
            f"Step {state.global_step + 1} is skipped, the {self.num_in_a_row}. in a row: the weights stay."
        )
        if self.num_in_a_row >= self.max_steps:
            raise RuntimeError(
                f"{self.num_in_a_row} optimiser steps in a row were not finite; the last: {self._report}. Nothing is "
                "learnt any more. The log names the rows of each. Look at them, lower `learning_rate`, or check that "
                "the teacher runs in bf16 or float32; `max_nonfinite_steps` sets when to stop."
            )
        self._report = "the gradient is not finite although the loss is"
