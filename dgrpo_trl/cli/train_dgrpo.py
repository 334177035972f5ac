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

from ..config import DGRPOConfig, DGRPOScriptArguments
from ..run.training import train_to_the_end
from .training_run import prepare_run


def load_reward_func(name: str) -> Callable:
    """The reward function of that name or import path; a `ValueError` if there is none."""
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
    run = prepare_run(DGRPOScriptArguments, DGRPOConfig, arguments, __doc__, load_reward_funcs)
    if run is None:
        return
    from ..trainer import DGRPOTrainer  # takes seconds, which `--help` and a dry run do without

    trainer = DGRPOTrainer(**run.trainer_arguments, reward_funcs=run.reward_funcs)
    train_to_the_end(trainer, run.script_args.dataset_name)
