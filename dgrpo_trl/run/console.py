"""What a training script shows: one line of progress, and no warnings that its reader cannot act on."""

import os
import time
import warnings
from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments


# Deprecations inside the packages below, seen on a normal run: (beginning of the message, whose call it is)
KNOWN_WARNINGS = (
    (r"`gradient_checkpointing`", "TRL's configurations set it by default"),
    (r"`is_gradient_checkpointing`", "TRL reads it"),
    (r"`gradient_checkpointing_enable`", "the trainer of transformers calls it"),
    (r"`torch.distributed.all_gather_into_tensor`", "DeepSpeed calls it"),
    (r"`torch.distributed.reduce_scatter_tensor`", "DeepSpeed calls it"),
)

# What stands beside the bar, where it is logged
_SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "distill/divergence": "divergence",
    "completions/mean_length": "length",
}


def quiet_known_warnings() -> None:
    """Hides the warnings of `KNOWN_WARNINGS`, and DeepSpeed's that there is no GPU."""
    for message, _ in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


class OneLineProgress(ProgressCallback):
    """The progress bar of transformers, with the main figures and the tokens per second beside it instead of below it.

    All figures are in the logs that `report_to` names, and in `trainer_state.json`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._since: tuple[float, float] | None = None  # clock and tokens of the last log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._since = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        figures = {name: f"{logs[key]:.3g}" for key, name in _SHOWN.items() if isinstance(logs.get(key), float | int)}
        if (tokens := logs.get("num_tokens")) is not None:
            now = time.monotonic()
            if self._since is not None and now > self._since[0]:
                figures["tokens/s"] = f"{(tokens - self._since[1]) / (now - self._since[0]):,.0f}"
            self._since = (now, tokens)
        if figures:
            self.training_bar.set_postfix(figures)


def show_one_line(trainer: Trainer) -> None:
    """Puts [`OneLineProgress`] in the place of the bar of transformers, where that is shown."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(OneLineProgress())
