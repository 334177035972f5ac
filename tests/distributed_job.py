"""What `test_distributed.py` launches: dGRPO steps on given rollouts; rank 0 writes the losses and the new weights.

`train` is what one process of it does, for the reference that runs in the process of the tests.

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
| `stalls` | step whose checkpoint is written in part, and no further |
| `hangs` | rank that never reaches the loss; the others wait for it |
| `tile_tokens` | tokens that the LM head takes at a time: so few that ranks have different numbers of tiles |
"""

import faulthandler
import json
import signal
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import PartialState
from conftest import build_tokenizer, length_reward
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file

from dgrpo_trl import DGRPOConfig, DGRPOTrainer
from dgrpo_trl.losses import TILE_TOKENS
from dgrpo_trl.run.checkpoints import latest_checkpoint


TIMEOUT_SECONDS = 480  # a job takes two minutes on a loaded machine
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
    stalled_step = hanging_rank = None
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
        if self.state.global_step == self.stalled_step:
            Path(output_dir, "stalled").touch()
            wait_for_ever()
        super()._save_optimizer_and_scheduler(output_dir)


def wait_for_ever() -> NoReturn:
    while True:
        time.sleep(1)


def watch_memory() -> dict[str, float]:
    """Peak of the anonymous memory of this process in MiB, while it runs; files that are mapped do not count."""
    seen = {"peak": 0.0}

    def watch():
        while True:
            with open("/proc/self/status") as status:
                now = next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))
            seen["now"], seen["peak"] = now, max(seen["peak"], now)
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    time.sleep(0.2)
    return seen


def train(output: str, model_path: str, teacher_path: str, options: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Trains; what was logged and measured, and, on the main process, the trained weights."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{'The ship. ' * (i % 3)} Number {i}?"}],
            "teacher_prompt": [{"role": "user", "content": f"Evidence {i}."}] if i % 2 else None,
        }
        for i in range(11, 31)
    ]
    own = ("lora", "no_end", "corrupts", "evaluates", "resume", "saves", "measures", "tile_tokens", "stalls", "hangs")
    own, options = {name: options.get(name) for name in own}, {k: v for k, v in options.items() if k not in own}
    if own["tile_tokens"]:
        TILE_TOKENS["cpu"] = own["tile_tokens"]
    defaults = {
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
    memory = watch_memory() if own["measures"] else {}
    before = memory.get("now", 0.0)
    trainer = Job(
        model_path,
        length_reward,
        DGRPOConfig(own["resume"] or output + "_out", **{**defaults, **options}),
        Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[: own["evaluates"]]) if own["evaluates"] else None,
        processing_class=TOKENIZER,
        rollout_func=make_rollout(own["no_end"] or []),
        teacher_model=teacher_path,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if own["lora"] else None,
    )
    built = dict(memory)
    trainer.corrupt = tuple(own["corrupts"] or ())
    trainer.stalled_step, trainer.hanging_rank = own["stalls"], own["hangs"]
    for name, parameter in trainer.model.named_parameters():
        if own["lora"] and parameter.requires_grad and parameter.numel() > 0:  # the same on any number of processes
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = 0.0 if "lora_B" in name else 0.2
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    trainer.train(resume_from_checkpoint=latest_checkpoint(own["resume"]) if own["resume"] else None)
    evaluated = trainer.evaluate() if own["evaluates"] else None
    if own["saves"]:
        trainer.save_model()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    result = {"log": trainer.state.log_history, "evaluated": evaluated}
    if own["measures"]:
        teacher = list(trainer.teacher_model.parameters())
        result |= {
            "built_mib": built["peak"] - before,
            "trained_mib": memory["peak"] - before,
            "held": sum(parameter.data.numel() for parameter in teacher),
            "sharded": sum(parameter.ds_tensor.numel() for parameter in teacher),
        }
    trainer.accelerator.wait_for_everyone()
    weights = weights or {}  # of ZeRO-3 on the main process alone
    return result, {name: weight.contiguous().clone() for name, weight in weights.items() if name in trained}


def main(output: str, model_path: str, teacher_path: str, options: dict) -> None:
    # The first rank to time out prints its stack and ends. The others print theirs when the launcher ends them, or
    # when they fail because the first is gone
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS, exit=True)
    faulthandler.register(signal.SIGTERM, chain=True)
    result, weights = train(output, model_path, teacher_path, options)
    state = PartialState()
    Path(f"{output}.rank{state.process_index}.json").write_text(json.dumps(result))
    if state.is_main_process:
        save_file(weights, output + ".safetensors")
    state.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
