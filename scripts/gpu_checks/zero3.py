"""A step under DeepSpeed ZeRO-3 on two processes, of which one has nothing to learn from, against one process.

    accelerate launch ... scripts/gpu_checks/zero3.py FOLDER DEVICE     # what each process runs

Every parameter is sharded, however small. The second rank's completions never end, and are masked.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from datasets import Dataset


sys.path.append(str(Path(__file__).resolve().parent.parent))

from dgrpo_trl import DGRPOConfig, DGRPOTrainer  # noqa: E402
from gpu_checks import SCRIPTS, Failed, Figures, Skipped, require  # noqa: E402
from gpu_checks.training import make_tokenizer, save_models  # noqa: E402


NUM_ROWS = 8  # of both ranks
NAMES = ("grad_norm", "distill/divergence", "entropy")


def check_two_gpus(device: str) -> Figures:
    if importlib.util.find_spec("deepspeed") is None:
        raise Skipped("DeepSpeed is not installed: `make install-gpu`")
    if device == "cuda" and torch.cuda.device_count() < 2:
        raise Skipped("there is one GPU")
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder)
        two, one = _launch(folder, device, 2), _launch(folder, device, 1)
    figures: Figures = {f"{key}, {n}": log[key] for key in NAMES for n, log in (("two", two), ("one", one))}
    for key in NAMES:
        is_equal = math.isclose(two[key], one[key], rel_tol=0.05)
        require(is_equal, f"{key} is {two[key]:.4g} on two processes, and {one[key]:.4g} on one")
    return figures


def _launch(folder: Path, device: str, num_processes: int) -> dict[str, float]:
    """What the step logged."""
    config = folder / f"{num_processes}.yaml"
    config.write_text(yaml.safe_dump(_accelerate_config(folder, device, num_processes)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", __file__, str(folder), device]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    if done.returncode != 0:
        raise Failed(f"{num_processes} processes ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    log: dict[str, float] = json.loads((folder / f"log{num_processes}.json").read_text())
    return log


def _accelerate_config(folder: Path, device: str, num_processes: int) -> dict:
    """That of the recipe, for a part of one node."""
    name = "zero3.yaml" if device == "cuda" else "cpu_zero3.yaml"
    config: dict = yaml.safe_load((SCRIPTS.parent / "recipes" / "accelerate_configs" / name).read_text())
    deepspeed = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": "auto"},
        **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto"),
    }
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": True}
    config.pop("mixed_precision", None)  # DeepSpeed's own file says it
    return {**config, "num_processes": num_processes}


def roll_out(prompts: list, trainer: DGRPOTrainer) -> dict:
    """Completions that depend on the place in the batch of all ranks; those of its second half have no end."""
    state = trainer.accelerator
    first = state.process_index * len(prompts)
    completions = []
    for i in range(first, first + len(prompts)):
        words = torch.randint(1, 100, (4 + i,), generator=torch.Generator().manual_seed(i)).tolist()
        completions.append(words[:12] if i < NUM_ROWS // 2 else words[:12] + [1] * (12 - len(words)))
        completions[-1] += [0] if i < NUM_ROWS // 2 else [1]  # 0 is the end
    ids = [[1, 2, 3, 4] for _ in prompts]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def take_step(folder: Path, device: str) -> None:
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = DGRPOTrainer(
        str(folder / "student"),
        lambda completions, **_: [float(len(completion) % 3) for completion in completions],
        DGRPOConfig(
            str(folder / f"out{num_processes}"),
            per_device_train_batch_size=NUM_ROWS // num_processes,
            num_generations=4,
            max_completion_length=13,
            mask_truncated_completions=True,
            shuffle_dataset=False,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=True,
            use_cpu=device == "cpu",
        ),
        Dataset.from_dict({"prompt": ["w1 w2 w3 w4"] * 4}),
        processing_class=make_tokenizer(),
        rollout_func=roll_out,
        teacher_model=str(folder / "teacher"),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        (folder / f"log{num_processes}.json").write_text(json.dumps(trainer.state.log_history[0]))


if __name__ == "__main__":
    take_step(Path(sys.argv[1]), sys.argv[2])
