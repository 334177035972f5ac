"""dGRPO (arXiv 2605.12227): GRPO on the student's own rollouts plus the exact KL to a teacher at every token.

    accelerate launch scripts/train_dgrpo.py --config recipes/smollm2-135m/dgrpo/demo.yaml

The same script trains with GRPO (`distill_coef: 0`) and with on-policy distillation (no `reward_funcs`). Every field
of `DGRPOConfig` and TRL's `ModelConfig` is a key of the recipe and a flag of the command line; a key that no argument
matches is an error.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import DGRPOConfig
from ..run.training import train_to_the_end
from .training_run import TrainingRunArguments, prepare_run


@dataclass
class DGRPOScriptArguments(TrainingRunArguments):
    """The data, the rewards, and the dry run."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: names from `dgrpo_trl.rewards` ('exact_match_reward', ...) or import paths "
            "('trl.rewards.think_format_reward', 'my_rewards.mine'). None trains with the teacher alone."
        },
    )
    judge_model: str | None = field(
        default=None,
        metadata={"help": "Also reward with this model's verdict on open answers, asked at `judge_base_url`."},
    )
    judge_base_url: str | None = field(
        default=None,
        metadata={"help": "URL of the judge's OpenAI-compatible server. The key is read from OPENAI_API_KEY."},
    )

    def data_options(self, training_args: DGRPOConfig) -> dict[str, Any]:
        return {"chat_template_kwargs": training_args.chat_template_kwargs}


def load_reward_func(name: str) -> Callable:
    """The reward function of that name or import path.

    Raises:
        ValueError: If there is none.
    """
    from .. import rewards  # takes seconds, which `--help` does without

    module_name, _, function_name = name.rpartition(".")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name) if module_name else rewards
        return getattr(module, function_name)
    except (ImportError, AttributeError) as error:
        known = sorted(n for n, f in vars(rewards).items() if n.endswith("_reward") and inspect.isfunction(f))
        raise ValueError(
            f"There is no reward function {name!r}: {error}. Give one of {', '.join(known)}, or the import path of "
            "your own."
        ) from error
    finally:
        sys.path.pop(0)


def load_reward_funcs(script_args: DGRPOScriptArguments) -> list[Callable]:
    from ..rewards import LLMJudgeReward

    reward_funcs = [load_reward_func(name) for name in script_args.reward_funcs or []]
    if script_args.judge_model is not None:
        reward_funcs.append(LLMJudgeReward(script_args.judge_model, base_url=script_args.judge_base_url))
    return reward_funcs


def main(arguments: Sequence[str] | None = None) -> None:
    run = prepare_run(DGRPOScriptArguments, DGRPOConfig, arguments, __doc__)
    if run is None:
        return
    from ..trainer import DGRPOTrainer  # takes seconds, which `--help` and a dry run do without

    trainer = DGRPOTrainer(**run.trainer_arguments, reward_funcs=load_reward_funcs(run.script_args))
    train_to_the_end(trainer)
    if run.training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=run.script_args.dataset_name)
    trainer.end()
