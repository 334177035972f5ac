"""Micro-batches whose rows share prompts: those of one group next to each other."""

from typing import Any

import torch

from ..trl_compat import split_tensor_dict
from .packing import group_rows, prompt_keys, unpadded


def regroup(micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in as many micro-batches, those of one prompt next to each other.

    Prompts keep the order in which their first rows come, so the parent's shuffle still decides which are trained on
    together, and its draw from the random generator stays the only one.

    Args:
        micro_batches (`list[dict[str, Any]]`):
            As TRL splits a generation batch: tensors and lists of rows, scalars and `None`.

    Returns:
        `list[dict[str, Any]]`
    """
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
