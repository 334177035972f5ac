"""Which models run packed rows exactly. To add a model type, add its line to `SUPPORTED_LAYERS`; the tests follow."""

from transformers import PreTrainedConfig


FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names

# Model types whose packed forward equals the plain one, values and gradients, with the layer types for which the tests
# show it. Others may be exact too, or silently wrong: linear attention, convolutions and chunks take the row for one
# text, and some families (qwen2_moe) keep their window in the mask alone.
SUPPORTED_LAYERS = {
    "apertus": (FULL,),
    "arcee": (FULL,),
    "cohere": (FULL,),
    "cohere2": (FULL, SLIDING),
    "cwm": (FULL, SLIDING),
    "deepseek_v2": (FULL,),
    "deepseek_v3": (FULL,),
    "ernie4_5": (FULL,),
    "exaone4": (FULL, SLIDING),
    "gemma": (FULL,),
    "gemma3_text": (FULL, SLIDING),
    "glm": (FULL,),
    "glm4": (FULL,),
    "glm4_moe": (FULL,),
    "gpt_neox": (FULL,),
    "granite": (FULL,),
    "granitemoe": (FULL,),
    "helium": (FULL,),
    "hunyuan_v1_dense": (FULL,),
    "llama": (FULL,),
    "minicpm3": (FULL,),
    "minimax_m2": (FULL,),
    "ministral": (FULL, SLIDING),
    "ministral3": (FULL, SLIDING),
    "mistral": (FULL, SLIDING),
    "mixtral": (FULL, SLIDING),
    "olmo": (FULL,),
    "olmo2": (FULL,),
    "olmo3": (FULL, SLIDING),
    "olmoe": (FULL,),
    "phi": (FULL,),
    "phi3": (FULL, SLIDING),
    "qwen2": (FULL, SLIDING),
    "qwen2_moe": (FULL,),
    "qwen3": (FULL, SLIDING),
    "qwen3_moe": (FULL, SLIDING),
    "seed_oss": (FULL,),
    "smollm3": (FULL, SLIDING),
    "starcoder2": (FULL, SLIDING),
}


def unsupported_reason(config: PreTrainedConfig) -> str | None:
    """Why a model of this configuration cannot run packed rows exactly, or `None` if it can.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's own, not its text part.

    Returns:
        `str` or `None`
    """
    model_type, values = config.model_type, config.to_dict()
    supported = SUPPORTED_LAYERS.get(model_type)
    if supported is None:
        return f"model type {model_type!r} is not among those that were tested"
    layer_types = set(values.get("layer_types") or ())
    if unknown := layer_types - {FULL, SLIDING}:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    has_window = SLIDING in layer_types or (
        values.get("sliding_window") is not None and values.get("use_sliding_window") is not False and not layer_types
    )
    if has_window and SLIDING not in supported:
        return f"the sliding window of {model_type!r} was not tested"
    if values.get("attn_logit_softcapping") is not None:
        return "it soft-caps its attention scores"
    if values.get("attention_dropout"):
        return f"it has an attention dropout of {values['attention_dropout']}"
    return None
