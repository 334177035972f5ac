"""Sharing prompts outside the training forward: the prefill of generation, and the check that sharing is exact."""

import types
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .packing import group_rows, prompt_keys, unpadded


def share_prefill(model: PreTrainedModel) -> None:
    """Makes `model.generate` run equal prompts of a batch once, and copy their keys and values to all its rows.

    Only the first forward over the prompts changes; it stays one forward, so ranks that generate in step still do. The
    generation modes that do not start from an empty `DynamicCache` are left as they are.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model to patch; the base model, where PEFT wraps it.
    """
    original_prefill = model._prefill

    def prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        cache = model_kwargs.get("past_key_values")
        starts_empty = type(cache) is DynamicCache and cache.get_seq_length() == 0 and not cache.offloading
        returns_more = generation_config.output_hidden_states or generation_config.output_attentions
        if not starts_empty or returns_more or model_kwargs.get("inputs_embeds") is not None:
            return original_prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        attention_mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        groups = group_rows(prompt_keys(unpadded(input_ids, mask)))
        batch_size = len(input_ids)
        first_rows = torch.tensor([rows[0] for rows in groups], device=input_ids.device)
        shared_kwargs = {
            name: value[first_rows]
            if isinstance(value, Tensor) and value.dim() and len(value) == batch_size
            else value
            for name, value in model_kwargs.items()
        }
        outputs = original_prefill(input_ids[first_rows], generation_config, shared_kwargs, *args, **kwargs)
        group_of_row = torch.empty(batch_size, dtype=torch.long, device=input_ids.device)
        for group, rows in enumerate(groups):
            group_of_row[rows] = group
        outputs.past_key_values.batch_select_indices(group_of_row)
        outputs.logits = outputs.logits[group_of_row]
        return outputs

    model._prefill = types.MethodType(prefill, model)


class ExactnessCheck:
    """Compares packed with plain forwards of one model while it trains: the second line of defense.

    The first is [`unsupported_reason`].

    It runs two rollouts of one prompt both ways, on the first batch that has two and whenever the longest has doubled:
    a window, for instance, shows only in rows that are longer. All ranks take part, whatever their own batch holds,
    and come to the same result.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Reduces lengths and errors over all ranks.
        tolerance (`float`):
            For the largest relative error of a state in float32.
        low_precision_tolerance (`float`):
            For the mean relative error of a rollout's states in bfloat16 and float16. On SmolLM2-135M rounding alone
            gives 0.01; completions that see each other, or positions that are not restarted, give 0.2 and more.
    """

    def __init__(self, accelerator: Accelerator, tolerance: float = 1e-3, low_precision_tolerance: float = 0.05):
        self.accelerator = accelerator
        self.tolerance = tolerance
        self.low_precision_tolerance = low_precision_tolerance
        self.checked_length = 0  # tokens of the longest rollout that was compared, over all ranks
        self.error = 0.0  # the last one, over all ranks

    def is_due(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> bool:
        """Whether these rollouts, of whatever length on each rank, are to be compared. A collective call."""
        length, _ = self._longest_pair(prompts, completions)
        longest = self._maximum(length)
        if longest == 0 or longest < 2 * self.checked_length:
            return False
        self.checked_length = int(longest)
        return True

    @torch.no_grad()
    def passes(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        states: Callable[[list[list[int]], list[list[int]], bool], Tensor],
    ) -> bool:
        """Runs two rollouts both ways, and compares. A collective call.

        Args:
            prompts, completions (`Sequence[Sequence[int]]`):
                Rollouts, in token ids.
            states (`Callable`):
                From prompts, completions, and whether to share, the `(N, H)` states of the model that predict the
                completion tokens.

        Returns:
            `bool`: The same on all ranks.
        """
        _, rows = self._longest_pair(prompts, completions)
        pair = [list(prompts[i]) for i in rows], [list(completions[i]) for i in rows]
        # One row at a time: two long ones may not fit, and a padded row would have other positions
        plain = torch.cat([states([prompt], [completion], False) for prompt, completion in zip(*pair, strict=True)])
        shared = states(*pair, True)
        errors = (shared.float() - plain.float()).norm(dim=-1) / plain.float().norm(dim=-1)
        is_low = plain.dtype in (torch.bfloat16, torch.float16) or self.accelerator.mixed_precision in ("bf16", "fp16")
        if len(errors) == 0:
            error = 0.0
        elif is_low:  # the first completion is right whatever the second one sees
            lengths = [len(completion) for completion in pair[1]]
            error = torch.stack([part.mean() for part in errors.split(lengths)]).max().item()
        else:
            error = errors.max().item()
        self.error = self._maximum(error)
        return self.error <= (self.low_precision_tolerance if is_low else self.tolerance)  # not for NaN

    def _maximum(self, value: float) -> float:
        return self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).max().item()

    @staticmethod
    def _longest_pair(prompts, completions) -> tuple[int, list[int]]:
        """Length and rows of the longest two rollouts of one prompt that have tokens to score.

        If there are none, 0 and the first row twice: all ranks must run the same forwards.
        """
        best, best_rows = 0, [0, 0]
        for rows in group_rows([tuple(prompt) for prompt in prompts]):
            rows = sorted(rows, key=lambda i: len(completions[i]))[-2:]
            length = len(prompts[rows[0]]) + len(completions[rows[-1]])
            if len(rows) == 2 and len(completions[rows[0]]) > 0 and length > best:
                best, best_rows = length, rows
        return best, best_rows
