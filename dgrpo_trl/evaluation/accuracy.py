"""Accuracy of greedy answers, in all and by prompt length, with intervals."""

import math
import re
from collections.abc import Callable, Iterable, Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..rewards import exact_match_reward, normalize_answer


def wilson_interval(num_correct: int, num_rows: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share; unlike the normal one it stays in [0, 1] and is not empty at 0 and 1.

    Args:
        num_correct (`int`):
            Number of successes.
        num_rows (`int`):
            Number of trials.
        z (`float`, *optional*, defaults to `1.959964`):
            Standard normal quantile; the default gives 95 %.

    Returns:
        `tuple[float, float]`: the lower and the upper end.

    Raises:
        ValueError: unless `0 <= num_correct <= num_rows` and `num_rows > 0`.
    """
    if not 0 <= num_correct <= num_rows or num_rows == 0:
        raise ValueError(f"Needs 0 <= num_correct <= num_rows and num_rows > 0, got {num_correct} and {num_rows}.")
    share = num_correct / num_rows
    z2 = z * z / num_rows
    center = (share + z2 / 2) / (1 + z2)
    half_width = z / (1 + z2) * math.sqrt(share * (1 - share) / num_rows + z2 / (4 * num_rows))
    # At 0 and 1 the share itself is an end, which rounding may miss
    return max(0.0, min(share, center - half_width)), min(1.0, max(share, center + half_width))


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict]],
    max_new_tokens: int = 16,
    max_batch_tokens: int = 8192,
    description: str = "generate",
) -> list[str]:
    """Greedy completions of conversational prompts, in the order given.

    Prompts of similar length share a batch, padded on the left, so that little is computed for padding.

    Args:
        model (`PreTrainedModel`):
            Model to evaluate, on its device.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer, with a chat template and a padding token.
        prompts (`Sequence[list[dict]]`):
            Lists of messages.
        max_new_tokens (`int`, *optional*, defaults to `16`):
            Longest completion, in tokens.
        max_batch_tokens (`int`, *optional*, defaults to `8192`):
            Longest batch, in tokens, padding and completions included. A longer prompt forms a batch alone.
        description (`str`, *optional*, defaults to `"generate"`):
            Text beside the progress bar.

    Returns:
        `list[str]`: the completions, without special tokens.
    """
    texts = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) for prompt in prompts]
    prompt_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    completions = [""] * len(prompts)
    was_training = model.training
    model.eval()
    with tqdm(total=len(prompts), desc=description) as progress:
        for batch in _batches([len(ids) for ids in prompt_ids], max_new_tokens, max_batch_tokens):
            inputs = tokenizer.pad(
                {"input_ids": [prompt_ids[i] for i in batch]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            output_ids = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,  # unset what the checkpoint's sampling defaults say, as greedy search warns of it
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
            )
            completion_ids = output_ids[:, inputs["input_ids"].shape[1] :]  # (B, T)
            for i, text in zip(batch, tokenizer.batch_decode(completion_ids, skip_special_tokens=True), strict=True):
                completions[i] = text
            progress.update(len(batch))
    model.train(was_training)
    return completions


def _batches(lengths: Sequence[int], max_new_tokens: int, max_batch_tokens: int) -> Iterable[list[int]]:
    """Row numbers in batches of similar length, longest first, so that running out of memory shows at once."""
    batch = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batch[0]] if batch else lengths[i]
        if batch and (len(batch) + 1) * (longest + max_new_tokens) > max_batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def is_exact(completion: str, answer: str) -> bool:
    """Whether the completion has the full [`exact_match_reward`]: the answer and nothing else."""
    return exact_match_reward([completion], [answer]) == [1.0]


def is_mentioned(completion: str, answer: str) -> bool:
    """Whether the answer stands in the completion as a word, whatever else is said; it forgives the form."""
    words = rf"(?<!\w){re.escape(normalize_answer(answer))}(?!\w)"
    return re.search(words, normalize_answer(completion)) is not None


def summarize_accuracy(rows: Sequence[dict], completions: Sequence[str]) -> dict:
    """Accuracy of completions, in all, by `length_bin` and by `task`.

    Args:
        rows (`Sequence[dict]`):
            Rows with `answer`, `length_bin` and `task`.
        completions (`Sequence[str]`):
            One completion for each row, in the same order.

    Returns:
        `dict`: `overall`, `by_length` and `by_task` (both from group to the same), each with `num_rows`, and for
        `exact` and `mentioned` the `accuracy` and the 95 % Wilson `interval`.

    Raises:
        ValueError: if there are no rows, or not as many completions.
    """
    if not rows or len(rows) != len(completions):
        raise ValueError(f"Needs one completion for each row, got {len(completions)} for {len(rows)} rows.")
    scored = list(zip(rows, completions, strict=True))

    def grouped(column):
        groups = {}
        for row, completion in scored:
            groups.setdefault(row[column], []).append((row, completion))
        return {str(group): _summarize(groups[group]) for group in sorted(groups)}

    return {"overall": _summarize(scored), "by_length": grouped("length_bin"), "by_task": grouped("task")}


def _summarize(scored: Sequence[tuple[dict, str]]) -> dict:
    def share(is_correct: Callable[[str, str], bool]) -> dict:
        num_correct = sum(is_correct(completion, row["answer"]) for row, completion in scored)
        return {"accuracy": num_correct / len(scored), "interval": wilson_interval(num_correct, len(scored))}

    return {"num_rows": len(scored), "exact": share(is_exact), "mentioned": share(is_mentioned)}
