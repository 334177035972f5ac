"""How many tokens a model can read: what its configuration states, and what it was trained on."""

from typing import Any

from transformers import PreTrainedConfig


# Of the arguments of `from_pretrained`, those that change how many tokens a model can read
POSITION_ARGUMENTS = ("rope_parameters", "max_position_embeddings")

# Positions that a configuration states -> positions that the model was trained on, by model type. The model cards of
# Qwen3: "Context Length: 32,768 natively"; the 40,960 of `config.json` are 32,768 for outputs and 8,192 for prompts,
# "sufficient for most scenarios involving short text processing" (https://huggingface.co/Qwen/Qwen3-8B)
_TRAINED_POSITIONS = {("qwen3", 40960): 32768, ("qwen3_moe", 40960): 32768}

YARN_EXAMPLE = (
    "for a Qwen3 to 131,072 by `max_position_embeddings: 131072` and `rope_parameters: {rope_type: yarn, rope_theta: "
    "1000000, factor: 4.0, original_max_position_embeddings: 32768}`"
)


def stated_positions(config: PreTrainedConfig) -> int | None:
    """Positions that the configuration states, RoPE scaling included, in tokens; `None` where it states none."""
    values = config.get_text_config().to_dict()
    positions = values.get("max_position_embeddings")
    rope = values.get("rope_parameters") or {}
    scaled = rope.get("original_max_position_embeddings")
    if positions is None or not scaled or not rope.get("factor"):
        return positions
    return max(positions, int(scaled * rope["factor"]))


def trained_positions(config: PreTrainedConfig) -> int | None:
    """Longest sequence that a run may give to the model, in tokens: the positions that it was trained on.

    These are the stated ones, RoPE scaling included, except for models whose configuration states more than they were
    trained on. `None` where it states none.
    """
    positions = stated_positions(config)
    if positions is None or rope_scaling(config) is not None:
        return positions
    return _TRAINED_POSITIONS.get((config.get_text_config().model_type, positions), positions)


def rope_scaling(config: PreTrainedConfig) -> dict[str, Any] | None:
    """How positions are scaled beyond the native ones; `None` where they are not."""
    rope = config.get_text_config().to_dict().get("rope_parameters") or {}
    if rope.get("rope_type", "default") == "default":
        return None
    return {key: value for key, value in sorted(rope.items()) if key != "rope_theta"}


def teacher_scaling_warnings(student: PreTrainedConfig, teacher: PreTrainedConfig) -> list[str]:
    """A warning if one model scales its positions and the other does not, which is often an oversight."""
    ours, theirs = rope_scaling(student), rope_scaling(teacher)
    if ours == theirs:
        return []
    return [
        f"The student's positions are scaled by {ours or 'nothing'}, the teacher's by {theirs or 'nothing'}. Unless "
        "one of them has more native positions, they read the same document differently. Give both the same "
        "`rope_parameters` and `max_position_embeddings`, in `model_init_kwargs` and in `teacher_model_init_kwargs`."
    ]


def sampler_scaling_problems(student: PreTrainedConfig, stored_student: PreTrainedConfig) -> list[str]:
    """vLLM reads the configuration beside the weights, and sees nothing of `model_init_kwargs`."""
    ours, theirs = rope_scaling(student), rope_scaling(stored_student)
    if ours == theirs:
        return []
    return [
        f"The student's positions are scaled by {ours or 'nothing'}, but its own configuration says "
        f"{theirs or 'nothing'}, which is what vLLM reads: rollouts would be sampled by another model than is "
        "trained. Start from a checkpoint that was saved with them, as the cold start of the 128K recipes is."
    ]
