"""Stopping on a signal: the micro-batch is finished, a checkpoint written, and the process exits with code 75."""

import logging
import os
import random
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)

# `EX_TEMPFAIL` of sysexits.h: try again later
EXIT_REQUEUE = 75
# A file to touch when the run is to be started again: launchers such as `torchrun` turn every exit code into 1
REQUEUE_FILE_VARIABLE = "DGRPO_REQUEUE_FILE"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopOnSignal(TrainerCallback):
    """Ends a run on SIGTERM, SIGINT or SIGUSR1 after the current micro-batch, with a checkpoint.

    The checkpoint is that of the last complete optimizer step, its random states included: what was accumulated of the
    next one is computed again on resuming. All ranks stop together, whichever of them the signal reaches. A second
    SIGINT ends the process at once.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.stopped = False
        self._signal: int | None = None
        self._random_states: dict[str, Any] = {}
        self._handlers: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._random_states = _random_states()
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in no other
            self._handlers = {number: signal.signal(number, self.handle) for number in SIGNALS}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """What a signal does; a SIGINT after another signal raises a `KeyboardInterrupt`."""
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._random_states = _random_states()
        self._stop_if_asked(state, control)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._stop_if_asked(state, control):
            _set_random_states(self._random_states)  # the checkpoint is that of the last step

    def _stop_if_asked(self, state: TrainerState, control: TrainerControl) -> bool:
        """A collective call."""
        if self._signal is not None:
            self.accelerator.set_trigger()
        if not self.accelerator.check_trigger():
            return False
        name = "a signal on another rank" if self._signal is None else signal.Signals(self._signal).name
        if self.accelerator.is_main_process:
            logger.warning(f"Stopped by {name} after step {state.global_step}. A checkpoint is written.")
        self.stopped = control.should_training_stop = True
        control.should_save = state.global_step > 0
        return True

    def exit_if_stopped(self) -> None:
        """Ends the process with code 75 if a signal has ended the run. A collective call."""
        if not self.stopped:
            return
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and (path := os.environ.get(REQUEUE_FILE_VARIABLE)):
            Path(path).touch()
        raise SystemExit(EXIT_REQUEUE)


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
