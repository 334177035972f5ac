"""Steps whose loss or gradient is NaN or infinite: they are reported and skipped, and too many end the run."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..scoring import CompletionOutput
from ..shared_prefix import unpadded


logger = get_logger(__name__)

_TAIL_TOKENS = 48  # of a prompt, in a message
_MAX_ROWS = 4  # of a micro-batch, in a message
_NOTHING_OBSERVED = "the gradient is not finite although the loss is"


class NonFiniteGuard(TrainerCallback):
    """Leaves the weights as they are where an optimizer step would corrupt them.

    A step is skipped on all ranks where the loss of a micro-batch, or the norm of the gradient, is not finite on any.
    DeepSpeed skips such a step by itself, with the same test of the gradient; elsewhere the gradients are removed
    before the optimizer reads them, so that neither weights nor moments move. Skipped steps count as steps. After
    `max_steps` consecutive ones, training ends with an error.

    In fp16 a gradient that overflows while the loss is finite is how a `GradScaler`, or DeepSpeed, searches for its
    scale: it skips the step itself, and lowers the scale. Such a step is left to it, and does not count, unless the
    scale is down at 1 and no longer the reason.
    """

    def __init__(self, accelerator: Accelerator, decode: Callable[[list[int]], str], max_steps: int):
        self.accelerator = accelerator
        self.decode = decode
        self.max_steps = max_steps
        self.num_consecutive = 0
        self.gradient_is_finite = True  # of the last step; set by the trainer
        self._is_bad = False
        self._report = _NOTHING_OBSERVED

    @torch.no_grad()
    def observe(
        self, step: int, inputs: dict[str, Any], terms: dict[str, Tensor], scored: CompletionOutput | None
    ) -> None:
        """Remembers and reports a micro-batch of an optimizer step, from 1 on, whose loss is not finite. Rank-local.

        The terms of the loss are scalars; `scored` is what the student's forward returned.
        """
        if torch.isfinite(sum(terms.values(), torch.tensor(0.0))):
            return
        bad_terms = [name for name, value in terms.items() if not torch.isfinite(value)] or list(terms)
        rows = "; ".join(self._rows(inputs, scored)) or "no single row stands out"
        self._is_bad = True
        self._report = f"the {' and the '.join(bad_terms)} term of the loss is not finite. Rows: {rows}"
        logger.warning(
            f"Step {step} on rank {self.accelerator.process_index}: {self._report}", main_process_only=False
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
        return [
            f"{row} ({', '.join(names)}), whose prompt ends {self.decode(prompts[row][-_TAIL_TOKENS:].tolist())!r}"
            for row, names in sorted(faults.items())[:_MAX_ROWS]
        ]

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """A collective call. Under DeepSpeed the step has been made, or skipped, at this point."""
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        flags = torch.tensor([self._is_bad, not self.gradient_is_finite], device=self.accelerator.device).float()
        loss_is_bad, gradient_is_bad = (flag > 0 for flag in self.accelerator.reduce(flags).tolist())
        any_is_bad = loss_is_bad or gradient_is_bad
        was_skipped = is_deepspeed and self.accelerator.optimizer_step_was_skipped
        self._is_bad = False
        if not (any_is_bad or was_skipped):
            self.num_consecutive = 0
            return
        if not loss_is_bad and (was_skipped or not is_deepspeed) and self._is_searching_for_scale():
            return
        if is_deepspeed and not was_skipped:
            raise RuntimeError(
                f"Step {state.global_step + 1}: {self._report}; DeepSpeed has made the step all the same, and the "
                "weights may be corrupt. Resume from the last checkpoint with `resume_from_checkpoint: auto`, with a "
                "lower `learning_rate` or without these rows; under ZeRO-2 set `check_grad_overflow` in the bf16 "
                "section of DeepSpeed's configuration."
            )
        if not is_deepspeed:
            model.zero_grad(set_to_none=True)  # optimizers pass over what has no gradient
        self.num_consecutive += 1
        logger.warning(
            f"Step {state.global_step + 1} is skipped and the weights stay: {self.num_consecutive} consecutive."
        )
        if self.num_consecutive >= self.max_steps:
            raise RuntimeError(
                f"{self.num_consecutive} consecutive optimizer steps were not finite; the last: {self._report}. "
                "Nothing is learned any more. The log names the rows of each. Inspect them, lower `learning_rate`, "
                f"or {self._advice()}; `max_nonfinite_steps` sets when to stop."
            )
        self._report = _NOTHING_OBSERVED

    def _is_searching_for_scale(self) -> bool:
        if self.accelerator.mixed_precision != "fp16":
            return False
        scaler = self.accelerator.scaler  # none under DeepSpeed, which stops by itself at its smallest scale
        return scaler is None or scaler.get_scale() > 1

    def _advice(self) -> str:
        if self.accelerator.mixed_precision == "fp16":
            return "train with `bf16: true`, whose numbers do not end at 65,504 as those of fp16 do"
        return "check that the teacher runs in bf16 or float32"
