"""Checkpoints that are complete, or known not to be: marked when written, found, and chosen to resume from.

| what happens | what follows |
| --- | --- |
| killed, or disk full, while a checkpoint is written | it is never resumed from; the one before is still there |
| started again with `resume_from_checkpoint: auto` | resumes from the newest complete checkpoint, else starts fresh |
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path

from torch import nn
from transformers import Trainer

from ..files import write_json
from ..trl_compat import PREFIX_CHECKPOINT_DIR, rotate_checkpoints


logger = logging.getLogger(__name__)

_MARKER = "complete.json"
_CHECKPOINT = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")


class CompleteCheckpoints(Trainer):
    """Marks a checkpoint when it is complete, and deletes older ones only then. The first base of a trainer class.

    The mark, `complete.json` in its folder, holds the name and size of each of its files.
    """

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
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
                f"{'The newest complete one is ' + kept if kept else 'There is no complete one yet'}. Free some "
                "space, and start again with `resume_from_checkpoint: auto`."
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            rotate_checkpoints(str(run_dir), limit, self.state.best_model_checkpoint, use_mtime=True)


def mark_complete(folder: Path) -> None:
    """Marks a checkpoint as complete, after its files have reached the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MARKER):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = path.stat().st_size
    write_json(folder / _MARKER, {"files": files})


def what_is_missing(folder: Path) -> str | None:
    """Why a checkpoint is not complete; `None` if it is."""
    try:
        files = json.loads((folder / _MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"it has no {_MARKER}, so it was not written to the end"
    for name, size in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes and not {size}"
    return None


def latest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a folder, `None` if there is none; incomplete ones are logged."""
    folder = Path(output_dir)
    numbered = [(int(match[1]), path) for path in folder.glob("*") if (match := _CHECKPOINT.match(path.name))]
    for _, path in sorted(numbered, reverse=True):
        problem = what_is_missing(path)
        if problem is None:
            return str(path)
        logger.warning(f"The checkpoint {path} is passed over: {problem}.")
    return None


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint to resume from.

    `"auto"` is the newest complete one, or none if there is none yet; `True` the newest complete one; a path that one;
    `False` or nothing none.

    Raises:
        ValueError: If the checkpoint that is asked for is missing or incomplete.
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
                f"There is no complete checkpoint in {str(output_dir)!r} to resume from. Check `output_dir`, or set "
                "`resume_from_checkpoint: auto`, which starts from scratch where there is none."
            )
        return found
    problem = what_is_missing(Path(choice))
    if problem is None:
        return choice
    if not (Path(choice) / "trainer_state.json").exists():
        raise ValueError(
            f"The checkpoint {choice!r} cannot be resumed from: {problem}. Name another one, or set "
            "`resume_from_checkpoint: auto`, which finds the newest complete one."
        )
    logger.warning(f"The checkpoint {choice} is used although {problem}: it was named.")  # made by another trainer
    return choice
