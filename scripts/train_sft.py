"""Cold start: supervised fine-tuning of the student on prompt -> answer, with TRL's `SFTTrainer`.

    accelerate launch scripts/train_sft.py --config recipes/smollm2-135m/sft/demo.yaml

Only the completion is trained on: the reference answers, or a teacher's responses, which makes it off-policy
distillation. Every field of TRL's `SFTConfig` and `ModelConfig` is a key of the recipe and a flag of the command line;
a key that no argument matches is an error.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from dgrpo_trl.models import load_student_tokenizer
from dgrpo_trl.preflight import GPUS, PreflightArguments, preflight, read_engine, without_gpu
from dgrpo_trl.run.card import add_recipe_and_metrics
from dgrpo_trl.run.checkpoints import CompleteCheckpoints, keep_run_id, train_to_the_end
from dgrpo_trl.run.console import quiet_known_warnings
from dgrpo_trl.training_data import LongBlocksArguments, load_training_data


@dataclass
class SFTScriptArguments(LongBlocksArguments, PreflightArguments):
    """The data, and which column to learn, and the dry run."""

    completion_column: str = field(
        default="answer",
        metadata={"help": "Column with the text to train on, for instance 'response_Qwen3.5-27B' of LongBlocks."},
    )


class ResumableSFTTrainer(CompleteCheckpoints, SFTTrainer):
    """`SFTTrainer`, whose checkpoints are marked when they are whole, and whose card holds recipe and metrics."""

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            add_recipe_and_metrics(Path(self.args.output_dir) / "README.md", self.args, self.state.log_history)


def main(script_args: SFTScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
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
            completion_column=script_args.completion_column,
            max_length=training_args.max_length,
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
    trainer = ResumableSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    train_to_the_end(trainer)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    quiet_known_warnings()
    parser = TrlParser((SFTScriptArguments, SFTConfig, ModelConfig))
    main(*parser.parse_args_and_config(without_gpu(sys.argv[1:])))
