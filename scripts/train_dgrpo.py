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
from collections.abc import Callable
from dataclasses import dataclass, field

from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from dgrpo_trl import DGRPOConfig, DGRPOTrainer, rewards
from dgrpo_trl.models import load_student_tokenizer
from dgrpo_trl.preflight import GPUS, PreflightArguments, preflight, read_engine, without_gpu
from dgrpo_trl.run.checkpoints import keep_run_id, train_to_the_end
from dgrpo_trl.run.console import quiet_known_warnings
from dgrpo_trl.training_data import LongBlocksArguments, load_training_data


@dataclass
class DGRPOScriptArguments(LongBlocksArguments, PreflightArguments):
    """The data, and the rewards, and the dry run."""

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


def load_reward_func(name: str) -> Callable:
    """The reward function of that name or import path.

    Raises:
        ValueError: If there is none.
    """
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
    reward_funcs = [load_reward_func(name) for name in script_args.reward_funcs or []]
    if script_args.judge_model is not None:
        reward_funcs.append(rewards.LLMJudgeReward(script_args.judge_model, base_url=script_args.judge_base_url))
    return reward_funcs


def main(script_args: DGRPOScriptArguments, training_args: DGRPOConfig, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing. There is no student. Set it in the recipe or as a flag.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    tokenizer = load_student_tokenizer(
        model_args.model_name_or_path, model_args.model_revision, training_args.trust_remote_code
    )
    with training_args.main_process_first(desc="reading the data"):
        train_dataset, eval_dataset = load_training_data(
            script_args,
            tokenizer,
            chat_template_kwargs=training_args.chat_template_kwargs,
            seed=training_args.data_seed or training_args.seed,
            with_test=training_args.eval_strategy != "no",
        )
    if script_args.dry_run:
        report = preflight(
            training_args,
            model_args.model_name_or_path,
            train_dataset,
            tokenizer,
            read_engine(script_args.accelerate_config),
            GPUS[script_args.gpu],
            script_args.mfu,
            get_peft_config(model_args),
        )
        print(report)
        return report.raise_for_problems()
    keep_run_id(training_args)
    trainer = DGRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=load_reward_funcs(script_args),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    train_to_the_end(trainer)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    quiet_known_warnings()
    parser = TrlParser((DGRPOScriptArguments, DGRPOConfig, ModelConfig))
    main(*parser.parse_args_and_config(without_gpu(sys.argv[1:])))
