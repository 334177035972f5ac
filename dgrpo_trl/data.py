"""Data sets on their way into training: reading them, checking them, and documents that look like control tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from trl import is_conversational

from .longblocks.cleaning import break_special_tokens


Prompt = str | list[dict]

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Tokenising every row of a long-context data set takes hours; the longest rows decide
MAX_ROWS_TOKENIZED = 512


def load_rows(
    name_or_path: str, config: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Reads a JSONL or Parquet file, a folder of them or of `Dataset.save_to_disk`, or a data set of the Hub.

    Args:
        name_or_path (`str`):
            Path, or Hub id.
        config (`str`, *optional*):
            Configuration of a data set of the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a data set of the Hub or of a saved `DatasetDict`; a file has only one.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        ValueError: If it cannot be read, or a saved `DatasetDict` lacks the split.
    """
    path = Path(name_or_path)
    if (path / "state.json").exists():
        return load_from_disk(name_or_path)
    if (path / "dataset_dict.json").exists():
        splits = load_from_disk(name_or_path)
        if split not in splits:
            raise ValueError(f"{name_or_path!r} has no split {split!r}; it has {sorted(splits)}. Name one of these.")
        return splits[split]
    try:
        if path.is_file() and path.suffix in _FILE_FORMATS:
            return load_dataset(
                _FILE_FORMATS[path.suffix], data_files=name_or_path, split="train", streaming=streaming
            )
        if path.is_dir() and config is None:
            return _load_folder(path, split, streaming)
        return load_dataset(name_or_path, name=config, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The data set {name_or_path!r} cannot be read: {error} Give a {', '.join(_FILE_FORMATS)} file, a folder "
            "saved with `save_to_disk`, or the id of a data set of the Hub that this machine can reach."
        ) from error


def _load_folder(folder: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    """The files of a split, as `datasets` finds them by their names and folders.

    They are named one by one: for a folder with a card that names its files, the cache of `datasets` (5.2) knows the
    folder's name and not what is in it, and gives the rows of another build.

    Raises:
        ValueError: If the folder has no file of that split.
    """
    try:
        patterns = get_data_patterns(str(folder.resolve()))
    except EmptyDatasetError as error:
        raise ValueError(f"it has no data files ({error}).") from error
    if split not in patterns:
        raise ValueError(f"it has no split {split!r}, but {sorted(map(str, patterns))}.")
    found = DataFilesList.from_patterns(patterns[split], base_path=str(folder.resolve()))
    for suffix, file_format in reversed(_FILE_FORMATS.items()):
        if files := sorted({file for file in found if file.endswith(suffix)}):
            return load_dataset(file_format, data_files=files, split="train", streaming=streaming)
    raise ValueError(f"its files are no {', '.join(_FILE_FORMATS)}.")


def escape_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Breaks up every special token of `tokenizer` that stands literally in `text`, so that it stays text.

    A zero-width space (U+200B) goes in after the first character: `<|im_end|>` then tokenises as the characters that a
    reader sees, never as the control token. Text without such literals is returned unchanged.

    Args:
        text (`str`):
            A document or a question; not a rendered chat template, whose control tokens are meant.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decides what is special.

    Returns:
        `str`
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return break_special_tokens(text, special | set(tokenizer.all_special_tokens))


def escape_messages(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """`messages` with `escape_special_tokens` applied to what others wrote: all roles but the assistant's."""
    return [
        message if message["role"] == "assistant" else {**message, "content": _escape_content(message, tokenizer)}
        for message in messages
    ]


def _escape_content(message: dict, tokenizer: PreTrainedTokenizerBase) -> str | list | None:
    content = message.get("content")
    if isinstance(content, str):
        return escape_special_tokens(content, tokenizer)
    if isinstance(content, list):
        return [
            {**part, "text": escape_special_tokens(part["text"], tokenizer)} if part.get("type") == "text" else part
            for part in content
        ]
    return content


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
    sizes = {i: _num_bytes(prompt) for i, prompt in enumerate(prompts) if prompt is not None}
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


def _num_bytes(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt.encode())
    total = 0
    for message in prompt:
        content = message.get("content") or ""
        texts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
        total += sum(len(text.encode()) for text in texts)
    return total


def prompt_token_counter(
    tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict, tools: list[Callable] | None
) -> Callable[[Sequence[Prompt]], list[int]]:
    """A function from prompts to their lengths in tokens, as the trainer will tokenise them."""

    def count(prompts: Sequence[Prompt]) -> list[int]:
        if is_conversational({"prompt": prompts[0]}):
            escaped = [escape_messages(prompt, tokenizer) for prompt in prompts]
            encoded = tokenizer.apply_chat_template(
                escaped, tools=tools or None, add_generation_prompt=True, return_dict=True, **chat_template_kwargs
            )
        else:
            encoded = tokenizer(list(prompts))
        return [len(ids) for ids in encoded["input_ids"]]

    return count
