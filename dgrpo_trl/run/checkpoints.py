"""Runs that lose no work: stopping on a signal, checkpoints that are whole, going on from the newest of them.

| what happens | what follows |
| --- | --- |
| SIGTERM, SIGINT or SIGUSR1 | the micro-batch is finished, a checkpoint written, the process exits with code 75 |
| killed, or disk full, while a checkpoint is written | that one is never resumed from; the one before is still there |
| started again with `resume_from_checkpoint: auto` | goes on from the newest whole checkpoint, or begins |
"""

import json
import logging
import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .console import show_one_line


logger = logging.getLogger(__name__)

# `EX_TEMPFAIL` of sysexits.h: try again later
EXIT_REQUEUE = 75
# A file to touch when the run is to be started again: launchers such as `torchrun` turn every exit code into 1
REQUEUE_FILE_VARIABLE = "DGRPO_REQUEUE_FILE"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_MARKER = "complete.json"
_CHECKPOINT = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")


class CompleteCheckpoints:
    """Mixin of [`~transformers.Trainer`]: marks a checkpoint when it is whole, and deletes older ones only then.

    The mark, `complete.json` in its folder, holds the name and size of each of its files.
    """

    def _save_checkpoint(self: Trainer, model, trial) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # of an earlier run of these steps; a part of it might outlast this one
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # safetensors and torch have errors of their own for a full disk
            kept = latest_checkpoint(run_dir)
            raise RuntimeError(
                f"The checkpoint {folder} could not be written: {error}. "
                f"{'The newest whole one is ' + str(kept) if kept else 'There is no whole one yet'}. Make room, and "
                "start again with `resume_from_checkpoint: auto`."
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            rotate_checkpoints(str(run_dir), limit, self.state.best_model_checkpoint, use_mtime=True)


def mark_complete(folder: Path) -> None:
    """Marks a checkpoint as whole, after its files have reached the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MARKER):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = path.stat().st_size
    unfinished = folder / f"{_MARKER}.tmp"
    unfinished.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    os.replace(unfinished, folder / _MARKER)


def what_is_missing(folder: Path) -> str | None:
    """Why a checkpoint is not whole; `None` if it is."""
    try:
        files = json.loads((folder / _MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"it has no {_MARKER}, so its writing did not end"
    for name, size in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes and not {size}"
    return None


def latest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint of a folder, `None` if there is none; those passed over are logged."""
    folder = Path(output_dir)
    numbered = [(int(match[1]), path) for path in folder.glob("*") if (match := _CHECKPOINT.match(path.name))]
    for _, path in sorted(numbered, reverse=True):
        problem = what_is_missing(path)
        if problem is None:
            return str(path)
        logger.warning(f"The checkpoint {path} is passed over: {problem}.")
    return None


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint to go on from.

    Args:
        resume_from_checkpoint (`str`, `bool`, *optional*):
            `"auto"`: the newest whole one, or none if there is none yet. `True`: the newest whole one. A path: that
            one. `False` or nothing: none.
        output_dir (`str` or `Path`):
            Folder of the run.

    Returns:
        `str` or `None`

    Raises:
        ValueError: If the checkpoint that is asked for is not there, or not whole.
    """
    choice = str(resume_from_checkpoint or "false")
    if choice.lower() == "false":
        return None
    if choice == "auto":
        return latest_checkpoint(output_dir)
    if choice.lower() == "true":
        found = latest_checkpoint(output_dir)
        if found is None:
            raise ValueError(
                f"There is no whole checkpoint in {str(output_dir)!r} to go on from. Check `output_dir`, or set "
                "`resume_from_checkpoint: auto`, which begins where there is none."
            )
        return found
    problem = what_is_missing(Path(choice))
    if problem is None:
        return choice
    if not (Path(choice) / "trainer_state.json").exists():
        raise ValueError(
            f"The checkpoint {choice!r} cannot be gone on from: {problem}. Name another one, or set "
            "`resume_from_checkpoint: auto`, which finds the newest whole one."
        )
    logger.warning(f"The checkpoint {choice} is used although {problem}: it was named.")  # made by another trainer
    return choice


class StopOnSignal(TrainerCallback):
    """Ends a run on SIGTERM, SIGINT or SIGUSR1 after the micro-batch that is under way, with a checkpoint.

    The checkpoint is that of the last whole optimiser step, its random states included: what was accumulated of the
    next one is computed again on resuming. All ranks stop together, whichever of them the signal reaches. A second
    SIGINT ends the process at once.

    Args:
        trainer ([`~transformers.Trainer`]):
            The run. Add the callback with `trainer.add_callback`.
    """

    def __init__(self, trainer: Trainer):
        self.accelerator = trainer.accelerator
        self.stopped = False
        self._signal: int | None = None
        self._random_states: dict | None = None
        self._handlers: dict[int, object] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._random_states = _random_states()
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in no other
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._random_states = _random_states()
        self._stop_if_asked(state, control)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
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
        """Ends the process with code 75 if a signal has ended the run. A collective call.

        Raises:
            SystemExit: If so.
        """
        if not self.stopped:
            return
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and (path := os.environ.get(REQUEUE_FILE_VARIABLE)):
            Path(path).touch()
        raise SystemExit(EXIT_REQUEUE)


def _random_states() -> dict:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_states(states: dict) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])


def keep_run_id(args: TrainingArguments) -> None:
    """Keeps the id of the run in wandb, in `wandb_run_id.txt`, for when it is resumed; call it before the trainer.

    An id that the environment gives (`WANDB_RUN_ID`) is left alone.
    """
    if "wandb" not in args.report_to or args.process_index > 0 or "WANDB_RUN_ID" in os.environ:
        return
    path = Path(args.output_dir) / "wandb_run_id.txt"
    is_resumed = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir) is not None
    if not (is_resumed and path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{random.SystemRandom().getrandbits(40):010x}\n", encoding="utf-8")
    os.environ["WANDB_RUN_ID"] = path.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_RESUME", "allow")


def train_to_the_end(trainer: Trainer) -> None:
    """Trains, from a checkpoint where the arguments say so, and saves the model and the log to `output_dir`.

    Args:
        trainer ([`~transformers.Trainer`]):
            With [`CompleteCheckpoints`] among its bases. `args.resume_from_checkpoint` is what
            [`resolve_checkpoint`] takes.

    Raises:
        SystemExit: With code 75, if a signal has ended the run; its checkpoint is written.
        ValueError: If the checkpoint to go on from is not there.
    """
    args = trainer.args
    show_one_line(trainer)
    stop = StopOnSignal(trainer)
    trainer.add_callback(stop)
    checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if checkpoint is not None:
        logger.info(f"Going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    stop.exit_if_stopped()
    trainer.save_model(args.output_dir)
    trainer.save_state()  # trainer_state.json, the log that reports are drawn from
