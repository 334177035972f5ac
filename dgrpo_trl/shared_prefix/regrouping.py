"""Micro-batches whose rows share prompts: those of one group next to each other."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.logging import get_logger

from ..trl_compat import split_tensor_dict
from .packing import group_rows, prompt_keys, unpadded


logger = get_logger(__name__)


def num_regrouped(
    mode: str, steps_per_generation: int, accumulation_steps: int, dependent_terms: Sequence[str]
) -> int:
    """Among how many micro-batches rows may change places, so that those of one prompt meet.

    Rows stay within their optimizer step, and where a term of the loss depends on which rows share a micro-batch,
    within that: the steps are those of TRL then. `shared_prefix="on"` regroups the whole generation batch.

    Args:
        mode (`str`), steps_per_generation (`int`), accumulation_steps (`int`):
            `shared_prefix`, and the micro-batches of a generation batch and of an optimizer step.
        dependent_terms (`Sequence[str]`):
            Those terms, as a message names them.
    """
    if mode == "on":
        return steps_per_generation
    if dependent_terms and steps_per_generation > 1:
        logger.warning(
            "Shared prefix: rows stay in TRL's micro-batches, where only few share a prompt, as each of them is "
            f"normalized by itself by {' and '.join(dependent_terms)}. `shared_prefix='on'` regroups them all the "
            "same."
        )
        return 1
    return math.gcd(accumulation_steps, steps_per_generation)


def regroup(micro_batches: list[dict[str, Any]], num_regrouped: int) -> list[dict[str, Any]]:
    """The same rows in as many micro-batches, those of one prompt next to each other.

    Prompts keep the order in which their first rows come, so the parent's shuffle still decides which are trained on
    together, and its draw from the random generator stays the only one.

    Args:
        micro_batches (`list[dict[str, Any]]`):
            As TRL splits a generation batch: tensors and lists of rows, scalars and `None`.
        num_regrouped (`int`):
            Each that many of them exchange rows; 1 leaves all as they are.

    Returns:
        `list[dict[str, Any]]`
    """
    if num_regrouped == 1:
        return micro_batches
    starts = range(0, len(micro_batches), num_regrouped)
    return [batch for start in starts for batch in _regroup(micro_batches[start : start + num_regrouped])]


def _regroup(micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    whole: dict[str, Any] = {}
    for name, value in micro_batches[0].items():
        if isinstance(value, list):
            whole[name] = [item for micro_batch in micro_batches for item in micro_batch[name]]
        elif value is None or value.dim() == 0:
            whole[name] = value
        else:
            whole[name] = torch.cat([micro_batch[name] for micro_batch in micro_batches])
    groups = group_rows(prompt_keys(unpadded(whole["prompt_ids"], whole["prompt_mask"])))
    order = torch.tensor([i for rows in groups for i in rows])
    for name, value in whole.items():
        if isinstance(value, list):
            whole[name] = [value[i] for i in order]
        elif value is not None and value.dim() > 0:
            whole[name] = value[order.to(value.device)]
    return split_tensor_dict(whole, len(micro_batches))
