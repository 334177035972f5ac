"""What a run refuses before weights load."""

from collections.abc import Callable, Sequence

from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig

from .chat import Prompt, num_bytes


# Tokenising every row of a long-context data set takes hours; the longest rows decide
MAX_ROWS_TOKENIZED = 512


def check_dataset(dataset: Dataset | IterableDataset, name: str) -> None:
    """Raises if `dataset` cannot be trained on, before any weights are loaded.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Data set to look at. The columns of a stream may be unknown, and are then not checked.
        name (`str`):
            The argument it was passed as, for the message.

    Raises:
        ValueError: If it is empty, or has no column `prompt`.
    """
    columns = dataset.column_names
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"`{name}` has no column 'prompt'; its columns are {sorted(columns)}. The trainer generates completions "
            "for the prompts of that column. Rename yours with `dataset.rename_column(old, 'prompt')`, or build it "
            "with `dataset.map`."
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(
            f"`{name}` is empty. There is nothing to train on. Check the path and the split, and whether a filter "
            "dropped every row."
        )


def max_positions(config: PreTrainedConfig) -> int | None:
    """Longest sequence a model is made for, in tokens, with its RoPE scaling counted; `None` where it states none."""
    values = config.to_dict()
    positions = values.get("max_position_embeddings")
    rope = values.get("rope_parameters") or {}
    scaled = rope.get("original_max_position_embeddings")
    if positions is None or not scaled or not rope.get("factor"):
        return positions
    return max(positions, int(scaled * rope["factor"]))


def rope_scaling(config: PreTrainedConfig) -> dict | None:
    """How positions are scaled beyond the native ones; `None` where they are not."""
    rope = config.get_text_config().to_dict().get("rope_parameters") or {}
    if rope.get("rope_type", "default") == "default":
        return None
    return {key: value for key, value in sorted(rope.items()) if key != "rope_theta"}


def trained_positions(config: PreTrainedConfig) -> int | None:
    """[`max_positions`], but of a Qwen3 those it was trained on: its configuration on the Hub adds room for output."""
    text = config.get_text_config()
    positions = max_positions(text)
    is_native_qwen3 = text.model_type == "qwen3" and positions == 40960 and rope_scaling(config) is None
    return 32768 if is_native_qwen3 else positions


def check_prompt_lengths(
    dataset: Dataset,
    column: str,
    count_tokens: Callable[[Sequence[Prompt]], list[int]],
    max_completion_length: int,
    positions: int,
    model_name: str,
) -> None:
    """Raises if a prompt, with the longest completion, exceeds the positions of the model that is to read it.

    A prompt has no more tokens than bytes, plus those of the chat template, so only rows with enough bytes are
    tokenised; of these, the `MAX_ROWS_TOKENIZED` longest.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows to check.
        column (`str`):
            Column with the prompts, texts or messages; `None` in a row is skipped.
        count_tokens (`Callable`):
            Maps prompts to their lengths in tokens.
        max_completion_length (`int`):
            Longest completion, in tokens.
        positions (`int`):
            Positions of the model, in tokens.
        model_name (`str`):
            Which model, for the message.

    Raises:
        ValueError: If any checked row is too long, naming how many are, the longest, and the way out.
    """
    budget = positions - max_completion_length
    prompts = dataset[column]
    template_tokens = 512  # more than any chat template adds without tools
    sizes = {i: num_bytes(prompt) for i, prompt in enumerate(prompts) if prompt is not None}
    candidates = sorted((i for i, size in sizes.items() if size + template_tokens > budget), key=sizes.get)
    checked = candidates[-MAX_ROWS_TOKENIZED:]
    if not checked:
        return
    lengths = [length for i in checked for length in count_tokens([prompts[i]])]
    num_over = sum(length > budget for length in lengths)
    if num_over == 0:
        return
    at_least = "at least " if len(checked) < len(candidates) else ""
    raise ValueError(
        f"{at_least}{num_over} of {len(dataset)} rows have a '{column}' that is too long: the longest has "
        f"{max(lengths)} tokens, which with `max_completion_length` ({max_completion_length}) exceeds the {positions} "
        f"positions of {model_name}. Beyond its positions a model is silently wrong. Filter out rows over {budget} "
        "tokens, lower `max_completion_length`, or extend the positions (for instance YaRN: `rope_parameters` in "
        "`model_init_kwargs` and `teacher_model_init_kwargs`)."
    )
