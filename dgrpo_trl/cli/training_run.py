"""What the training commands do before there is a trainer: arguments, tokenizer, data, dry run, id of the run."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..config import TrainingRunArguments
from ..models import load_student_tokenizer
from ..preflight import GPUS, preflight, read_engine, without_gpu
from ..row_checks import named_datasets
from ..run.console import quiet_known_warnings
from ..run.training import keep_run_id
from ..training_data import AnyDataset, load_training_data
from .arguments import parse_arguments


Arguments = TypeVar("Arguments", bound=TrainingRunArguments)


@dataclass(frozen=True)
class TrainingRun(Generic[Arguments]):
    """A run that may start: what its command line asks for, read and checked."""

    script_args: Arguments
    training_args: TrainingArguments
    model_args: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    train_dataset: AnyDataset
    eval_dataset: AnyDataset | None
    reward_funcs: list[Callable]

    @property
    def datasets(self) -> dict[str, AnyDataset]:
        """By the name of the trainer's argument."""
        return named_datasets(self.train_dataset, self.eval_dataset)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """What every trainer takes."""
        return {
            "model": self.model_args.model_name_or_path,
            "args": self.training_args,
            "train_dataset": self.train_dataset,
            "eval_dataset": self.eval_dataset,
            "quantization_config": get_quantization_config(self.model_args),
            "peft_config": get_peft_config(self.model_args),
        }


def prepare_run(
    script_class: type[Arguments],
    config_class: type[TrainingArguments],
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    load_reward_funcs: Callable[[Arguments], list[Callable]] | None = None,
) -> TrainingRun[Arguments] | None:
    """Reads command line, reward functions, tokenizer and data; `None` after a dry run, whose report is printed.

    Raises:
        ValueError: If an argument is wrong, the data cannot be read, or a dry run finds problems.
    """
    quiet_known_warnings()
    words = without_gpu(list(sys.argv[1:] if arguments is None else arguments))
    script_args, training_args, model_args = parse_arguments(
        (script_class, config_class, ModelConfig), words, description
    )
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing. There is no student. Set it in the recipe or as a flag.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    reward_funcs = [] if load_reward_funcs is None else load_reward_funcs(script_args)
    tokenizer = load_student_tokenizer(
        model_args.model_name_or_path, model_args.model_revision, training_args.trust_remote_code
    )
    data_options = script_args.data_options(training_args)
    with training_args.main_process_first(desc="reading the data"):
        train_dataset, eval_dataset = load_training_data(
            script_args,
            tokenizer,
            seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
            with_test=training_args.eval_strategy != "no",
            **data_options,
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
            eval_dataset,
            reward_funcs,
            script_args.allows_extrapolation(training_args),
            data_options["keep_special_tokens"],
        )
        print(report)
        report.raise_for_problems()
        return None
    keep_run_id(training_args)
    return TrainingRun(script_args, training_args, model_args, tokenizer, train_dataset, eval_dataset, reward_funcs)
