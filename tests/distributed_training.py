"""One case of the distributed tests: dGRPO steps on given rollouts, on the ranks of a job or in this process alone.

Options are fields of the config, and:

| option | meaning |
| --- | --- |
| `lora` | train an adapter |
| `no_end` | ranks whose completions never end, so that `mask_truncated_completions` leaves nothing of them |
| `corrupts` | generation batches (from 1) in which the last rank's teacher states hold a NaN |
| `evaluates` | rows to evaluate on after training |
| `resume` | resume from the newest checkpoint of this folder |
| `saves` | save the model as a script does |
| `measures` | write each rank's memory |
| `killed` | step in whose checkpoint the job is killed, between the weights and the optimizer's states |
| `hangs` | rank that never reaches the loss; the others wait for it |
| `one_forward_more` | rank whose teacher runs its first forward twice |
| `generates` | completions are sampled from the model |
| `tile_tokens` | tokens that the LM head takes at a time: so few that ranks have different numbers of tiles |
"""

import faulthandler
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import NoReturn
from unittest.mock import patch

import torch
from collectives import RECORDER
from conftest import build_tokenizer, length_reward
from datasets import Dataset
from peft import LoraConfig

from dgrpo_trl import DGRPOConfig, DGRPOTrainer
from dgrpo_trl.losses import TILE_TOKENS
from dgrpo_trl.run.checkpoints import latest_checkpoint


CASE_SECONDS = 240  # a case takes few, on a loaded machine ten times as many
TOKENIZER = build_tokenizer()


def make_rollout(no_end: list[int]):
    def rollout(prompts, trainer):
        """Completions that depend on the prompt and its place in the group alone, of unequal lengths."""
        rank = trainer.accelerator.process_index
        ids = [TOKENIZER.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts]
        first = rank * len(prompts)
        completions = []
        for i, prompt in enumerate(ids):
            generator = torch.Generator().manual_seed(1000 * len(prompt) + prompt[-8] + first + i)
            length = int(torch.randint(2, 9, (), generator=generator))
            completion = torch.randint(3, 290, (length,), generator=generator).tolist()
            # By the place in the batch, so that one process masks the same rows as two
            share = 2 * (first + i) // (trainer.accelerator.num_processes * len(prompts))
            completions.append(completion + [5 if share in no_end else 2])
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    return rollout


class Job(DGRPOTrainer):
    corrupt: tuple[int, ...] = ()
    killed_step = hanging_rank = None
    num_batches = 0

    def _generate_and_score_completions(self, inputs):
        rollouts = super()._generate_and_score_completions(inputs)
        self.num_batches += 1
        if self.num_batches in self.corrupt and self.accelerator.process_index == self.accelerator.num_processes - 1:
            rollouts["teacher_hidden_states"][-1, 0, 0] = float("nan")
        if self.accelerator.process_index == self.hanging_rank:
            faulthandler.dump_traceback_later(5, exit=True)  # its time is up soon
            wait_for_ever()
        return rollouts

    def _save_optimizer_and_scheduler(self, output_dir):  # after the weights
        if self.state.global_step == self.killed_step:
            self.accelerator.wait_for_everyone()
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


def repeat_the_first_forward(model: torch.nn.Module) -> None:
    def repeat(module, args, kwargs):
        handle.remove()
        RECORDER.patience = 5
        module(*args, **kwargs)

    # Before the hook that gathers the weights
    handle = model.register_forward_pre_hook(repeat, prepend=True, with_kwargs=True)


def wait_for_ever() -> NoReturn:
    while True:
        time.sleep(1)


@contextmanager
def watched_memory() -> Iterator[dict[str, float]]:
    """Anonymous memory of this process in MiB, now and at its peak; files that are mapped do not count."""
    seen, is_over = {"peak": 0.0}, threading.Event()

    def watch():
        while not is_over.wait(0.005):
            with open("/proc/self/status") as status:
                now = next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))
            seen["now"], seen["peak"] = now, max(seen["peak"], now)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    time.sleep(0.2)
    yield seen
    is_over.set()
    thread.join()


ROWS = [
    {
        "prompt": [{"role": "user", "content": f"{'The ship. ' * (i % 3)} Number {i}?"}],
        "teacher_prompt": [{"role": "user", "content": f"Evidence {i}."}] if i % 2 else None,
    }
    for i in range(11, 31)
]
DEFAULTS = {
    "num_generations": 4,
    "max_completion_length": 10,
    "max_steps": 3,
    "learning_rate": 0.05,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "shuffle_dataset": False,
}
OWN_OPTIONS = ("lora", "no_end", "corrupts", "evaluates", "resume", "saves", "measures", "killed", "hangs")
OWN_OPTIONS += ("one_forward_more", "tile_tokens", "generates")


def make_job(output: str, model_path: str, teacher_path: str, own: SimpleNamespace, options: dict) -> Job:
    trainer = Job(
        model_path,
        length_reward,
        DGRPOConfig(own.resume or output + "_out", **{**DEFAULTS, **options}),
        Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[: own.evaluates]) if own.evaluates else None,
        processing_class=TOKENIZER,
        rollout_func=None if own.generates else make_rollout(own.no_end or []),
        teacher_model=teacher_path,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if own.lora else None,
    )
    trainer.corrupt = tuple(own.corrupts or ())
    trainer.killed_step, trainer.hanging_rank = own.killed, own.hangs
    if own.one_forward_more == trainer.accelerator.process_index:
        repeat_the_first_forward(trainer.teacher.model)
    if own.lora:
        set_adapter(trainer.model)
    return trainer


def set_adapter(model: torch.nn.Module) -> None:
    """The same weights on any number of processes."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.numel() > 0:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = 0.0 if "lora_B" in name else 0.2
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


def train(output: str, model_path: str, teacher_path: str, options: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Trains; what was logged and measured, and, on the main process, the trained weights."""
    own = SimpleNamespace(**{name: options.get(name) for name in OWN_OPTIONS})
    options = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
    tile_tokens = {"cpu": own.tile_tokens} if own.tile_tokens else {}
    with watched_memory() if own.measures else nullcontext({}) as memory, patch.dict(TILE_TOKENS, tile_tokens):
        before = dict(memory)
        trainer = make_job(output, model_path, teacher_path, own, options)
        built = dict(memory)
        checkpoint = latest_checkpoint(own.resume) if own.resume else None
        trainer.train(resume_from_checkpoint=checkpoint)
        result = {"log": trainer.state.log_history, "evaluated": trainer.evaluate() if own.evaluates else None}
    result |= {"engine": trainer.accelerator.distributed_type.value, "resumed_from": checkpoint}
    if own.measures:
        result["built_mib"] = built["peak"] - before["now"]
        result["trained_mib"] = memory["peak"] - before["now"]
        teacher = list(trainer.teacher_model.parameters())
        result["held"] = sum(parameter.data.numel() for parameter in teacher)
        result["sharded"] = sum(parameter.ds_tensor.numel() for parameter in teacher)
    if own.saves:
        trainer.save_model()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}  # of ZeRO-3 on the main process alone
    trainer.accelerator.wait_for_everyone()
    return result, {name: weight.contiguous().clone() for name, weight in weights.items() if name in trained}
