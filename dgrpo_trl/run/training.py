"""A run from its checkpoint, if it has one, to the saved model: what the training scripts call."""

import logging
import os
import random
from pathlib import Path

from transformers import Trainer, TrainingArguments

from .checkpoints import resolve_checkpoint
from .console import show_one_line
from .signals import StopOnSignal


logger = logging.getLogger(__name__)


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


def train_to_the_end(trainer: Trainer, dataset_name: str | None = None) -> None:
    """Trains, from a checkpoint where the arguments name one, and saves the model and the log to `output_dir`.

    With `push_to_hub` among the arguments, the model goes to the Hub too, with `dataset_name` in its card. Other
    processes cannot be reached after it. The trainer has [`~checkpoints.CompleteCheckpoints`] among its bases.

    Raises:
        SystemExit: With code 75, if a signal has ended the run; its checkpoint is written.
        ValueError: If the checkpoint to resume from is missing.
    """
    args = trainer.args
    show_one_line(trainer)
    stop = StopOnSignal(trainer.accelerator)
    trainer.add_callback(stop)
    checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if checkpoint is not None:
        logger.info(f"Resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    stop.exit_if_stopped()
    trainer.save_model(args.output_dir)
    trainer.save_state()  # trainer_state.json, the log that reports are drawn from
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    trainer.accelerator.end_training()  # all that `trainer.end` does, which transformers 5.17 does not have
