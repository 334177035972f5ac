"""What `test_distributed.py` launches: dGRPO steps on given rollouts; rank 0 writes the losses and the new weights."""

import json
import sys

import torch
from conftest import build_tokenizer, length_reward
from datasets import Dataset
from safetensors.torch import save_file

from dgrpo_trl import DGRPOConfig, DGRPOTrainer


TOKENIZER = build_tokenizer()


def rollout(prompts, trainer):
    """Completions that depend on the prompt and its place in the group alone, of unequal lengths."""
    ids = [TOKENIZER.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts]
    first = trainer.accelerator.process_index * len(prompts)
    completions = []
    for i, prompt in enumerate(ids):
        generator = torch.Generator().manual_seed(1000 * len(prompt) + prompt[-8] + first + i)
        length = int(torch.randint(2, 9, (), generator=generator))
        completions.append(torch.randint(3, 290, (length,), generator=generator).tolist() + [2])
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def main(output: str, model_path: str, teacher_path: str, options: dict) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{'The ship. ' * (i % 3)} Number {i}?"}],
            "teacher_prompt": [{"role": "user", "content": f"Evidence {i}."}] if i % 2 else None,
        }
        for i in range(11, 31)
    ]
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
    trainer = DGRPOTrainer(
        model_path,
        length_reward,
        DGRPOConfig(output + "_out", **{**defaults, **options}),
        Dataset.from_list(rows),
        processing_class=TOKENIZER,
        rollout_func=rollout,
        teacher_model=teacher_path,
    )
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        save_file({name: weight.contiguous().clone() for name, weight in weights.items()}, output + ".safetensors")
        with open(output + ".json", "w") as file:
            json.dump({"log": trainer.state.log_history}, file)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
