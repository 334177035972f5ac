"""Greedy completions of conversational prompts, by transformers or by vLLM.

A text that several prompts begin with is run once: transformers fills a cache with it that each question continues
from, vLLM has a prefix cache of its own. Both get the same token ids.
"""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..chat import escape_messages
from ..extras import import_extra
from .samples import prompt_text


# Below this, a batch of whole prompts is faster than prompts that wait for a common beginning
MIN_SHARED_TOKENS = 256


def bind_chat_template_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> None:
    """Writes arguments of the chat template into it, so that it renders the same text wherever it is used."""
    lines = "".join(f"{{%- set {name} = {json.dumps(value)} %}}" for name, value in kwargs.items())
    tokenizer.chat_template = lines + tokenizer.chat_template


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[dict]], answer_prefixes: Sequence[str] | None = None
) -> list[list[int]]:
    """Token ids of prompts as the model reads them.

    Literals of special tokens in the messages stay text, see [`escape_messages`]. A prefix of the answer follows the
    generation prompt, and the model continues from it.
    """
    prefixes = [""] * len(prompts) if answer_prefixes is None else answer_prefixes
    texts = [
        prompt_text(escape_messages(prompt, tokenizer), prefix, tokenizer)
        for prompt, prefix in zip(prompts, prefixes, strict=True)
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict]],
    max_new_tokens: int = 16,
    max_batch_tokens: int = 8192,
    description: str | None = "generate",
    *,
    answer_prefixes: Sequence[str] | None = None,
    shared_with: Sequence[str | None] | None = None,
    min_shared_tokens: int = MIN_SHARED_TOKENS,
    on_progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Greedy completions of conversational prompts, in the order given, without special tokens.

    Prompts of similar length share a batch, padded on the left, so that little is computed for padding. Prompts that
    begin with the same text run it once. Sampling and penalties of the checkpoint's generation defaults are ignored;
    their end-of-sequence tokens are used.

    Args:
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`):
            Model to evaluate, on its device, and its tokenizer, with a chat template and a padding token.
        prompts (`Sequence[list[dict]]`):
            Lists of messages.
        max_new_tokens (`int`, *optional*, defaults to `16`):
            Longest completion, in tokens.
        max_batch_tokens (`int`, *optional*, defaults to `8192`):
            Longest batch, in tokens, padding and completions included. A longer prompt is a batch by itself.
        description (`str`, *optional*, defaults to `"generate"`):
            Text of the progress bar. `None` shows no bar.
        answer_prefixes (`Sequence[str]`, *optional*):
            See [`tokenize_prompts`]. The completions are without them.
        shared_with (`Sequence[str | None]`, *optional*):
            Prompts with the same value are taken to begin with the same text. Their common tokens run once, if they
            are at least `min_shared_tokens`, where that is exact: see [`can_continue`].
        on_progress (`Callable[[int], None]`, *optional*):
            Called with the number of prompts completed since the last call.
    """
    prompt_ids = tokenize_prompts(tokenizer, prompts, answer_prefixes)
    completions = [""] * len(prompts)
    was_training, defaults = model.training, model.generation_config
    model.eval()
    model.generation_config = greedy_config(defaults, tokenizer)
    groups = _shared_groups(prompt_ids, shared_with, min_shared_tokens) if can_continue(model) else []
    shared = {i for rows, _ in groups for i in rows}
    progress = tqdm(total=len(prompts), desc=description, disable=description is None)

    def complete(rows: list[int], cache: Cache | None, num_cached: int) -> None:
        inputs = _batch([prompt_ids[i] for i in rows], num_cached, model.generation_config.pad_token_id)
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        output_ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens)
        completion_ids = output_ids[:, inputs["input_ids"].shape[1] :]  # (B, T)
        for i, text in zip(rows, tokenizer.batch_decode(completion_ids, skip_special_tokens=True), strict=True):
            completions[i] = text
        progress.update(len(rows))
        if on_progress is not None:
            on_progress(len(rows))

    try:
        for rows, num_shared in groups:
            cache = _prefill(model, prompt_ids[rows[0]][:num_shared])
            for batch in _shared_batches(rows, prompt_ids, cache, max_new_tokens, max_batch_tokens):
                copied = copy.deepcopy(cache)
                copied.batch_repeat_interleave(len(batch))
                complete(batch, copied, num_shared)
        alone = [i for i in range(len(prompts)) if i not in shared]
        for batch in _batches([len(prompt_ids[i]) for i in alone], max_new_tokens, max_batch_tokens):
            complete([alone[i] for i in batch], None, 0)
    finally:
        progress.close()
        model.generation_config = defaults
        model.train(was_training)
    return completions


def can_continue(model: PreTrainedModel) -> bool:
    """Whether continuing from a cache of a prompt's beginning is the same as running the whole prompt.

    It is with attention over all tokens or over a sliding window. It is not with chunked or linear attention, nor with
    positions whose scaling depends on the length of the text (`dynamic`, `longrope`): their prompts are run whole.
    """
    values = model.config.get_text_config().to_dict()
    if set(values.get("layer_types") or ()) - {"full_attention", "sliding_attention"}:
        return False
    rope = values.get("rope_parameters") or {}
    kinds = {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))}
    if kinds & {"dynamic", "longrope"} or not model._supports_default_dynamic_cache():
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def greedy_config(defaults: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy search without the sampling and the penalties of `defaults`; their end-of-sequence tokens are kept."""
    ends = defaults.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = defaults.pad_token_id if defaults.pad_token_id is not None else ends[0] if ends else 0
    return GenerationConfig(do_sample=False, num_beams=1, eos_token_id=ends or None, pad_token_id=pad)


def _shared_groups(
    prompt_ids: Sequence[list[int]], shared_with: Sequence[str | None] | None, min_shared_tokens: int
) -> list[tuple[list[int], int]]:
    """Rows that begin with the same tokens, and the number of these; the longest first."""
    by_key: dict[str, list[int]] = {}
    for i, key in enumerate(shared_with or ()):
        if key is not None:
            by_key.setdefault(key, []).append(i)
    groups = []
    for rows in by_key.values():
        first = prompt_ids[rows[0]]
        num_shared = min(len(prompt_ids[i]) for i in rows) - 1  # the last token predicts the first new one
        for i in rows[1:]:
            equal = (a == b for a, b in zip(first[:num_shared], prompt_ids[i], strict=False))
            num_shared = next((place for place, same in enumerate(equal) if not same), num_shared)
        if len(rows) > 1 and num_shared >= min_shared_tokens:
            groups.append((rows, num_shared))
    return sorted(groups, key=lambda group: -group[1])


def _prefill(model: PreTrainedModel, ids: list[int]) -> DynamicCache:
    """Keys and values of a text; logits are computed for one token only."""
    cache = DynamicCache(config=model.config)
    last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True, **last)
    return cache


def _batch(prompt_ids: Sequence[list[int]], num_cached: int, pad_token_id: int) -> dict[str, Tensor]:
    """A batch padded on the left, but after the tokens in the cache; both tensors have shape `(B, L)`."""
    longest = max(len(ids) for ids in prompt_ids)
    input_ids, mask = [], []
    for ids in prompt_ids:
        padding = longest - len(ids)
        input_ids.append(ids[:num_cached] + [pad_token_id] * padding + ids[num_cached:])
        mask.append([1] * num_cached + [0] * padding + [1] * (len(ids) - num_cached))
    return {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(mask)}


def _shared_batches(
    rows: Sequence[int],
    prompt_ids: Sequence[list[int]],
    cache: DynamicCache,
    max_new_tokens: int,
    max_batch_tokens: int,
) -> Iterable[list[int]]:
    """Batches of rows that continue from one cache.

    A sliding window counts the padding between the cache and a question: only rows of equal length are then batched.
    """
    parts: dict[int, list[int]] = {}
    for i in rows:
        parts.setdefault(len(prompt_ids[i]) if any(cache.is_sliding) else 0, []).append(i)
    for part in parts.values():
        for batch in _batches([len(prompt_ids[i]) for i in part], max_new_tokens, max_batch_tokens):
            yield [part[i] for i in batch]


def _batches(lengths: Sequence[int], max_new_tokens: int, max_batch_tokens: int) -> Iterable[list[int]]:
    """Row numbers in batches of similar length, longest first, so that it runs out of memory at the start or never."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batch[0]] if batch else lengths[i]
        if batch and (len(batch) + 1) * (longest + max_new_tokens) > max_batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def load_vllm(name_or_path: str, revision: str | None, dtype: str, max_length: int, kwargs: dict[str, Any]) -> Any:
    """A `vllm.LLM` with its prefix cache on, for prompts with their completions of up to `max_length` tokens."""
    vllm = import_extra("vllm", "`backend: vllm`", "vllm", ", or set `backend: transformers`")
    settings = {"enable_prefix_caching": True, "max_model_len": max_length, **kwargs}
    return vllm.LLM(model=name_or_path, revision=revision, tokenizer_revision=revision, dtype=dtype, **settings)


def generate_with_vllm(
    llm: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict]],
    max_new_tokens: int = 16,
    *,
    answer_prefixes: Sequence[str] | None = None,
) -> list[str]:
    """As [`generate_completions`], by a `vllm.LLM`, which batches and shares beginnings by itself."""
    from vllm import SamplingParams

    prompt_ids = tokenize_prompts(tokenizer, prompts, answer_prefixes)
    params = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, skip_special_tokens=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompt_ids], params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]
