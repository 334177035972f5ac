"""Runs that lose no work: stopped by signals, killed while saving, and resumed."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build_model, length_reward
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTConfig

from dgrpo_trl import DGRPOTrainer
from dgrpo_trl.run.checkpoints import CompleteCheckpoints, latest_checkpoint, mark_complete, resolve_checkpoint
from dgrpo_trl.run.signals import EXIT_REQUEUE, StopOnSignal
from dgrpo_trl.run.training import train_to_the_end
from dgrpo_trl.sft_trainer import ResumableSFTTrainer


def make_checkpoint(folder, step, is_complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * 100)
    (path / "trainer_state.json").write_text("{}")
    if is_complete:
        mark_complete(path)
    return path


def test_an_incomplete_checkpoint_is_passed_over(tmp_path):
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 10)  # later than 9, although not in the alphabet
    make_checkpoint(tmp_path, 9)
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    make_checkpoint(tmp_path, 11, is_complete=False)
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"x" * 99)
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "complete.json").write_text("{")
    assert latest_checkpoint(tmp_path) is None


def test_which_checkpoint_is_asked_for(tmp_path):
    for nothing in (None, False, "false"):
        assert resolve_checkpoint(nothing, tmp_path) is None
    assert resolve_checkpoint("auto", tmp_path) is None
    with pytest.raises(ValueError, match="There is no complete checkpoint in"):
        resolve_checkpoint("true", tmp_path)
    path = make_checkpoint(tmp_path, 3)
    assert resolve_checkpoint("auto", tmp_path) == resolve_checkpoint(True, tmp_path) == str(path)
    assert resolve_checkpoint(str(path), "elsewhere") == str(path)
    with pytest.raises(ValueError, match="cannot be resumed from"):
        resolve_checkpoint(str(tmp_path / "checkpoint-4"), tmp_path)


class DiskFull(DGRPOTrainer):
    """From the second checkpoint on, the system lets no file grow beyond `limit` bytes."""

    limit = 0

    def _save_checkpoint(self, model, trial):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, limits[1]))
        try:
            super()._save_checkpoint(model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("limit", [100, 20_000, 150_000])  # the configuration, the weights, the optimizer's states
def test_a_full_disk_leaves_the_checkpoint_before(make_trainer, saved_teacher, tmp_path, limit):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    options["optim"] = "adamw_torch"
    trainer = make_trainer(DiskFull, teacher_model=saved_teacher, **options)
    trainer.limit = limit
    with pytest.raises(
        RuntimeError, match="checkpoint-2 could not be written: .*The newest complete one is .*checkpoint-1"
    ):
        trainer.train()
    assert latest_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-1")
    trainer = make_trainer(DGRPOTrainer, teacher_model=saved_teacher, resume_from_checkpoint="auto", **options)
    train_to_the_end(trainer)
    assert trainer.state.global_step == 3
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def signal_at(step, number):
    """A reward that gets a signal sent while the rollouts of an optimizer step are scored."""
    calls = []

    def reward(completions, trainer_state=None, **kwargs):
        calls.append(len(completions))
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return length_reward(completions)

    return reward


def weights(path):
    return load_file(Path(path) / "model.safetensors")


STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_ends_a_run_that_then_gives_the_same_weights(make_trainer, saved_teacher, tmp_path, number):
    options = {**STEPS, "teacher_model": saved_teacher, "optim": "adamw_torch", "learning_rate": 1e-3}
    straight = make_trainer(DGRPOTrainer, output_dir=str(tmp_path / "straight"), **options)
    train_to_the_end(straight)
    handler = signal.getsignal(number)

    options |= {"output_dir": str(tmp_path / "stopped"), "resume_from_checkpoint": "auto"}
    stopped = make_trainer(DGRPOTrainer, reward_funcs=signal_at(3, number), **options)
    with pytest.raises(SystemExit) as exit:
        train_to_the_end(stopped)
    assert exit.value.code == EXIT_REQUEUE and signal.getsignal(number) is handler
    assert stopped.state.global_step == 2  # the third was under way, after the first of its two micro-batches
    assert stopped._step == 5
    assert latest_checkpoint(tmp_path / "stopped").endswith("checkpoint-2")

    resumed = make_trainer(DGRPOTrainer, **options)
    train_to_the_end(resumed)
    assert resumed.state.global_step == 4
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    start = build_model().state_dict()
    assert any(not torch.equal(a[name], start[name]) for name in a)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


class StopInStep(TrainerCallback):
    """Sends a signal after the first micro-batch of an optimizer step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_cold_start_that_is_stopped_resumes_to_the_same_weights_and_its_card_holds_the_recipe(tokenizer, tmp_path):
    rows = [{"prompt": f"Number {i}?", "completion": f" {i}" * (i % 3 + 1)} for i in range(16)]

    def make(output, *callbacks):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
        options |= {"max_steps": 4, "save_strategy": "no", "report_to": "none", "bf16": False, "use_cpu": True}
        options |= {"resume_from_checkpoint": "auto", "disable_tqdm": True, "logging_steps": 1}
        return ResumableSFTTrainer(
            build_model(),
            SFTConfig(str(tmp_path / output), **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )

    straight = make("straight")
    train_to_the_end(straight)
    straight.create_model_card(model_name="ship")
    card = (tmp_path / "straight" / "README.md").read_text()
    assert "gradient_accumulation_steps: 2" in card and "After 4 steps" in card and "| `loss` |" in card
    stopped = make("stopped", StopInStep(3))
    with pytest.raises(SystemExit):
        train_to_the_end(stopped)
    assert latest_checkpoint(tmp_path / "stopped").endswith("checkpoint-2")
    train_to_the_end(make("stopped"))
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    start = build_model().state_dict()
    assert any(not torch.equal(a[name], start[name]) for name in a)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_before_the_first_step_there_is_nothing_to_save(make_trainer, saved_teacher, tmp_path):
    trainer = make_trainer(
        DGRPOTrainer, reward_funcs=signal_at(1, signal.SIGTERM), teacher_model=saved_teacher, **STEPS
    )
    with pytest.raises(SystemExit):
        train_to_the_end(trainer)
    assert trainer.state.global_step == 0 and not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_second_interrupt_ends_the_run_at_once(make_trainer, saved_teacher):
    trainer = make_trainer(DGRPOTrainer, teacher_model=saved_teacher)
    stop = StopOnSignal(trainer.accelerator)
    stop.handle(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT)


REWARDS = """
import os, signal
calls = []
def stopping(completions, **kwargs):
    calls.append(1)
    if len(calls) == 2 and not os.path.exists("stopped"):
        open("stopped", "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(c[0]["content"]) % 7) for c in completions]
"""


def test_a_script_that_is_stopped_asks_to_be_started_again_and_resumes(tokenizer, saved_teacher, tmp_path):
    build_model().save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    rows = [{"prompt": [{"role": "user", "content": f"Number {i}?"}], "answer": str(i)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    command = [
        *(sys.executable, str(ROOT / "scripts" / "train_dgrpo.py")),
        *("--config", str(ROOT / "recipes" / "smollm2-135m" / "dgrpo" / "demo.yaml")),
        *("--model_name_or_path", "student", "--teacher_model_name_or_path", saved_teacher),
        *("--dataset_name", "rows.jsonl", "--reward_funcs", "my_rewards.stopping", "--output_dir", "out"),
        *("--max_steps", "3", "--bf16", "false", "--resume_from_checkpoint", "auto", "--report_to", "wandb"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
    ]
    requeue = tmp_path / "requeue"
    environment = {
        # Without those of another test's run: wandb has one session per process, hence the processes
        **{name: value for name, value in os.environ.items() if not name.startswith("WANDB_")},
        "DGRPO_REQUEUE_FILE": str(requeue),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
        "WANDB_MODE": "offline",
    }
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert first.returncode == EXIT_REQUEUE, first.stderr[-3000:]
    assert requeue.exists() and not (tmp_path / "out" / "model.safetensors").exists()
    run_id = (tmp_path / "out" / "wandb_run_id.txt").read_text().strip()
    requeue.unlink()
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and not requeue.exists()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith(run_id) for run in runs)


def test_the_mixin_serves_any_trainer():
    assert issubclass(DGRPOTrainer, CompleteCheckpoints)
