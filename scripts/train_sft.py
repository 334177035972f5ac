"""Cold start: supervised fine-tuning of the student on prompt -> answer, with TRL's `SFTTrainer`.

    accelerate launch scripts/train_sft.py --config recipes/smollm2-135m/sft/demo.yaml

Only the completion is trained on. Every field of TRL's `SFTConfig` and `ModelConfig` is a key of the recipe and a flag
of the command line; a key that no argument matches is an error.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from dgrpo_trl.data import escape_messages, load_rows


@dataclass
class SFTScriptArguments(ScriptArguments):
    """TRL's script arguments, and the column to train on."""

    completion_column: str = field(
        default="answer",
        metadata={"help": "Column with the text to train on, for instance 'response_Qwen3.5-27B' of LongBlocks."},
    )


def to_prompt_completion(dataset: Dataset, completion_column: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Keep the conversational `prompt`, and make the text of `completion_column` the assistant's `completion`.

    Special tokens that stand literally in a prompt are broken up, as the dGRPO trainer does.

    Raises:
        ValueError: If a column is missing.
    """
    missing = {"prompt", completion_column} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"The data set has no column {sorted(missing)}; its columns are {dataset.column_names}. Rename one, or "
            "set `completion_column`."
        )

    def convert(row: dict) -> dict:
        return {
            "prompt": escape_messages(row["prompt"], tokenizer),
            "completion": [{"role": "assistant", "content": row[completion_column]}],
        }

    return dataset.map(
        convert,
        remove_columns=[name for name in dataset.column_names if name != "prompt"],
    )


def main(script_args: SFTScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    if script_args.dataset_name is None or model_args.model_name_or_path is None:
        raise ValueError("`dataset_name` and `model_name_or_path` are required. Set them in the recipe or as flags.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    dataset = load_rows(script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split)
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=to_prompt_completion(dataset, script_args.completion_column, tokenizer),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "true" else resume)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()  # trainer_state.json, the log that reports are drawn from


if __name__ == "__main__":
    main(*TrlParser((SFTScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config())
