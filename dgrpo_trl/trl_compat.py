"""What this package uses of TRL and transformers beyond their public interfaces: all of it, each with its reason.

Private helpers are imported from here. Methods are overridden, and attributes used, only if a table below names them.
The tests compare every entry with the installed versions, and say what changed: that is the list to go through when
the pinned versions are raised.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import (
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    is_async_callable,
    maybe_gather_lm_head_ctx,
    pad,
    split_tensor_dict,
    use_adapter,
)


if TYPE_CHECKING:
    from peft import PeftModel
    from trl import GRPOConfig, GRPOTrainer

__all__ = [
    "ATTRIBUTES",
    "CACHE_NAMES",
    "HELPERS",
    "Hook",
    "OVERRIDDEN",
    "PREFIX_CHECKPOINT_DIR",
    "base_model",
    "create_model_from_path",
    "disable_dropout_in_model",
    "disable_gradient_checkpointing",
    "forget_loaded_weights",
    "get_config_model_id",
    "is_async_callable",
    "keep_to_one_gpu",
    "take_checkpoint_options",
    "maybe_gather_lm_head_ctx",
    "pad",
    "prepare_deepspeed",
    "prepare_fsdp",
    "rotate_checkpoints",
    "split_tensor_dict",
    "use_adapter",
    "without_dropout",
]

# What transformers takes out of `gradient_checkpointing_kwargs` before the rest goes to `torch.utils.checkpoint`
CHECKPOINT_OPTIONS = ("every_n_layers", "offload")
# The keyword of a cache in the arguments of `generate` and `_prefill`: from transformers 5.24 on, and before
CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True)
class Hook:
    """A function of TRL or transformers that this package depends on.

    Args:
        path (`str`):
            Where it is, for `pydoc.locate`.
        parameters (`str`):
            Their names, in order, without `self`: of a method all, of a helper those that are passed.
        reason (`str`):
            Why it is needed.
    """

    path: str
    parameters: str
    reason: str


# Overridden by the trainer, or replaced on an instance. All their parameters are known here: a new one is one that the
# override does not pass on
OVERRIDDEN = (
    Hook(
        "trl.GRPOTrainer._set_signature_columns_if_needed",
        "",
        "keeps the column of teacher prompts where unused columns are removed",
    ),
    Hook(
        "trl.GRPOTrainer._tokenize_prompts",
        "prompts",
        "special tokens in the text of a message stay text, and prompts must fit the positions",
    ),
    Hook("trl.GRPOTrainer._get_tool_suffix_ids", "tool_messages", "special tokens in the result of a tool stay text"),
    Hook(
        "trl.GRPOTrainer._generate_single_turn",
        "prompt_ids images multimodal_fields num_generations has_tool_images",
        "waits for a vLLM server that is lost",
    ),
    Hook("trl.GRPOTrainer._generate", "prompts", "compares shared with plain forwards before anything is scored"),
    Hook(
        "trl.GRPOTrainer._generate_and_score_completions",
        "inputs",
        "the teacher scores a generation batch right after TRL made it",
    ),
    Hook(
        "trl.GRPOTrainer._calculate_rewards",
        "inputs prompts completions completion_ids_list",
        "the guard calls the reward functions, and `reward_funcs` keeps the user's own objects",
    ),
    Hook(
        "trl.GRPOTrainer._prepare_inputs",
        "generation_batch",
        "completions of one prompt come into one micro-batch, after TRL's shuffle",
    ),
    Hook(
        "trl.GRPOTrainer._get_per_token_logps_and_entropies",
        "model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss pixel_values "
        "image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
        "mm_token_type_ids image_position_ids",
        "one student forward gives log-probabilities, entropies and the divergence to the teacher",
    ),
    Hook("trl.GRPOTrainer._compute_loss", "model inputs", "adds the teacher term"),
    Hook("trl.GRPOTrainer.training_step", "model inputs num_items_in_batch", "the teacher's share of the time"),
    Hook("trl.GRPOTrainer.log", "logs start_time", "the table of completions, and the heat map"),
    Hook("trl.GRPOTrainer._save_checkpoint", "model trial", "marks a complete checkpoint, deletes older ones after"),
    Hook("trl.GRPOTrainer.create_model_card", "model_name dataset_name tags", "adds the recipe and the metrics"),
    Hook("trl.GRPOTrainer._get_grad_norm", "model grad_norm", "a norm that is not finite skips the step"),
    Hook(
        "transformers.GenerationMixin._prefill",
        "input_ids generation_config model_kwargs is_first_iteration",
        "equal prompts of a batch run once",
    ),
)

HELPERS = (
    Hook("trl.trainer.utils.create_model_from_path", "model_id", "loads the teacher as TRL loads models"),
    Hook("trl.trainer.utils.disable_dropout_in_model", "model", "the teacher is deterministic"),
    Hook("trl.trainer.utils.get_config_model_id", "config", "the name of a model that is loaded"),
    Hook("trl.trainer.utils.is_async_callable", "func", "TRL's own test of which reward functions it awaits"),
    Hook("trl.trainer.utils.maybe_gather_lm_head_ctx", "params", "the LM head outside its module under ZeRO-3"),
    Hook("trl.trainer.utils.pad", "tensors padding_value padding_side", "pads as TRL does"),
    Hook("trl.trainer.utils.split_tensor_dict", "tensor_dict num_chunks", "micro-batches of the form that TRL makes"),
    Hook("trl.trainer.utils.use_adapter", "model adapter_name", "the student without its adapter is a teacher"),
    Hook("trl.models.prepare_deepspeed", "model accelerator", "shards the teacher under ZeRO-3"),
    Hook("trl.models.prepare_fsdp", "model accelerator", "shards the teacher under FSDP"),
    Hook(
        "transformers.PreTrainedModel.gradient_checkpointing_enable",
        "gradient_checkpointing_kwargs",
        "keeps `offload` and `every_n_layers` when TRL switches checkpoints on again",
    ),
    Hook(
        "trl.models.utils.disable_gradient_checkpointing",
        "model gradient_checkpointing_kwargs",
        "forwards without gradients run without checkpoints",
    ),
    Hook(
        "transformers.trainer_utils.rotate_checkpoints",
        "output_dir save_total_limit best_model_checkpoint use_mtime",
        "deletes older checkpoints once the new one is complete",
    ),
    Hook(
        "trl.generation.vllm_client.VLLMClient.generate", "", "a server that is lost becomes an answer, on all ranks"
    ),
    Hook("trl.generation.vllm_client.VLLMClient.init_communicator", "device", "connects to a server that restarted"),
)

# Of a `GRPOTrainer`, not in its documentation
ATTRIBUTES = {
    "_batch_environments": "the environment of each row, whose tools its prompt describes",
    "_entropy_bonus_enabled": "whether the loss has a term that is a mean over a micro-batch",
    "_buffered_inputs": "the micro-batches of a generation batch: read and replaced, to regroup them",
    "_get_output_dir": "the folder of the checkpoints",
    "_last_loaded_step": "the step whose weights vLLM has: reset where the server has others",
    "_log_completion_extra": "the column `dataset/answer` of the table of completions",
    "_logs": "the table of completions: long prompts are cut, and a column is added",
    "_metrics": "what is logged: the metrics of the teacher term",
    "_name": "the method, in the model card",
    "_paper": "its paper, in the model card",
    "_signature_columns": "columns that are kept, see `_set_signature_columns_if_needed`",
    "_tag_names": "tags of the model card",
    "_step": "counts micro-batches: which of the buffered ones is next, and where an optimizer step ends",
    "_tokenizer": "the tokenizer within `processing_class`",
    "aux_loss_enabled": "whether a mixture of experts has a load-balancing loss",
    "current_gradient_accumulation_steps": "micro-batches of this optimizer step",
    "model_wrapped": "the student as the engine runs it",
    "ref_model": "gives its log-probabilities by the same forward as the student",
    "reward_func_names": "names of the reward functions in messages, as in the metrics",
    "vllm_generation": "holds the client of a vLLM server",
}


def forget_loaded_weights(trainer: "GRPOTrainer") -> None:
    """Makes TRL send the student's weights to vLLM before it generates again."""
    trainer._last_loaded_step = -1


def keep_to_one_gpu(args: "GRPOConfig", loads_model: bool) -> None:
    """Makes a process that sees several GPUs train on its first, which `args.device` is.

    Otherwise TRL spreads a model that it loads over all of them, and refuses one that is loaded.
    """
    args._n_gpu = 1
    if loads_model:
        args.model_init_kwargs = {"device_map": str(args.device), **(args.model_init_kwargs or {})}


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within it `model` is in eval mode, but for modules that hold weights themselves: these draw nothing.

    bitsandbytes' layers of 4 bits take eval mode on a CPU for the end of training: they repack their weights, and pass
    on no gradient from then on.
    """
    changed = [module for module in model.modules() if module.training and not module._parameters]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


def base_model(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """`model` without its PEFT wrapper, if it has one."""
    return model.get_base_model() if is_peft_model(model) else model


def take_checkpoint_options(model: PreTrainedModel) -> None:
    """Makes `model.gradient_checkpointing_enable` find `CHECKPOINT_OPTIONS` among its `gradient_checkpointing_kwargs`.

    When training starts, transformers passes them by name. TRL switches checkpoints off to generate and to score, and
    on again with all of `gradient_checkpointing_kwargs`, which `torch.utils.checkpoint` would refuse.

    Without an accelerator `offload` does nothing: what is saved is on the host, which has no pinned memory then.
    """
    enable = model.gradient_checkpointing_enable

    def gradient_checkpointing_enable(
        gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        rest = dict(gradient_checkpointing_kwargs or {})
        options = {name: rest.pop(name) for name in CHECKPOINT_OPTIONS if name in rest} | options
        if torch.accelerator.current_accelerator() is None:
            options.pop("offload", None)
        enable(rest or None, **options)

    model.gradient_checkpointing_enable = gradient_checkpointing_enable
