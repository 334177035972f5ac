"""Rollouts on their way through a model: cut into parts, packed or padded, and scored."""

import functools
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from trl.trainer.utils import pad

from .losses import Distillation
from .scoring import CompletionOutput, CompletionScoring
from .shared_prefix import pack, prompt_keys, split_by_tokens, unpadded


@dataclass(frozen=True)
class Rollouts:
    """B prompts with a completion each.

    Args:
        prompt_ids (`torch.Tensor` of shape `(B, P)`), prompt_mask (`torch.Tensor` of shape `(B, P)`):
            Padded on the left; the mask is 1 at the prompts' tokens.
        completion_ids (`torch.Tensor` of shape `(B, T)`), completion_mask (`torch.Tensor` of shape `(B, T)`):
            Padded on the right; the mask is 1 at the tokens to score, the first n of each row.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor

    @classmethod
    def from_prompts(
        cls, prompts: list[list[int]], completion_ids: Tensor, completion_mask: Tensor, pad_token_id: int
    ) -> "Rollouts":
        """Pads `prompts`, which are lists of token ids."""
        ids = [torch.tensor(prompt, device=completion_ids.device) for prompt in prompts]
        return cls(
            pad(ids, padding_value=pad_token_id, padding_side="left"),
            pad([torch.ones_like(i) for i in ids], padding_value=0, padding_side="left"),
            completion_ids,
            completion_mask,
        )

    @functools.cached_property
    def prompts(self) -> list[Tensor]:
        """The prompts without padding, on the CPU."""
        return unpadded(self.prompt_ids, self.prompt_mask)

    @functools.cached_property
    def completion_lengths(self) -> list[int]:
        return self.completion_mask.sum(-1).tolist()

    def select(self, rows: list[int]) -> "Rollouts":
        """Some rows. For none, the first without a token to score: a rank with nothing to run still takes part."""
        if len(rows) == len(self.prompt_ids):
            return self
        if rows:
            return Rollouts(*(tensor[rows] for tensor in self._tensors))
        *tensors, completion_mask = (tensor[:1] for tensor in self._tensors)
        return Rollouts(*tensors, torch.zeros_like(completion_mask))

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.prompt_ids, self.prompt_mask, self.completion_ids, self.completion_mask

    def split(
        self, max_rows: int, max_tokens: int | None, shares_prefix: bool, accelerator: Accelerator
    ) -> list[list[int]]:
        """Indices of rows, for one forward each. With `max_tokens` a collective call: all ranks get as many parts.

        Args:
            max_rows (`int`), max_tokens (`int`, *optional*):
                Bounds of a part.
            shares_prefix (`bool`):
                Whether parts will be packed.
            accelerator ([`~accelerate.Accelerator`]):
                Tells how many parts the other ranks have.

        Returns:
            `list[list[int]]`: The last may be empty.
        """
        if max_tokens is None:
            rows = list(range(len(self.prompt_ids)))
            return [rows[start : start + max_rows] for start in range(0, len(rows), max_rows)]
        parts = split_by_tokens(
            [len(prompt) for prompt in self.prompts],
            self.completion_lengths,
            prompt_keys(self.prompts),
            max_rows,
            max_tokens,
            None if shares_prefix else self.prompt_ids.size(1) + self.completion_ids.size(1),
        )
        num_parts = accelerator.gather(torch.tensor([len(parts)], device=accelerator.device)).max().item()
        return parts + [[]] * (num_parts - len(parts))

    def forward(
        self,
        model: nn.Module,
        shares_prefix: bool,
        backend: str = "auto",
        hidden_states_only: bool = False,
        distillation: Distillation | None = None,
        with_router: bool = False,
    ) -> CompletionOutput:
        """One forward of `model`, which `heads.add_completion_scoring` has been given.

        Args:
            model (`nn.Module`):
                Possibly wrapped.
            shares_prefix (`bool`):
                Run one packed row instead of B padded ones.
            backend (`str`, *optional*, defaults to `"auto"`):
                Attention kernels of a packed row.
            hidden_states_only (`bool`, *optional*, defaults to `False`), distillation (`Distillation`, *optional*):
                See [`~heads.CompletionScoring`].
            with_router (`bool`, *optional*, defaults to `False`):
                Also sum up the router of a mixture of experts.

        Returns:
            [`~heads.CompletionOutput`]
        """
        kwargs = {"output_router_logits": True} if with_router else {}
        if shares_prefix:
            packed = pack(
                self.prompts, self.completion_ids, self.completion_lengths, whole_rows=with_router, backend=backend
            )
            kwargs |= {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
        else:
            packed = None
            kwargs["input_ids"] = torch.cat([self.prompt_ids, self.completion_ids], dim=1)
            kwargs["attention_mask"] = torch.cat([self.prompt_mask, self.completion_mask.to(self.prompt_mask)], dim=1)
        scoring = CompletionScoring(
            self.completion_ids, self.completion_mask, hidden_states_only, distillation, packed=packed
        )
        return model(**kwargs, completion_scoring=scoring)
