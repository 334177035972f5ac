"""Rollouts on their way through a model: cut into parts, packed or padded, and scored."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .losses import Distillation
from .scoring import CompletionOutput, CompletionScoring, CompletionStates
from .shared_prefix import PrefixSharing, pack, prompt_keys, split_by_tokens, unpadded
from .trl_compat import pad


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

    @classmethod
    def from_rows(cls, input_ids: Tensor, attention_mask: Tensor, num_completion_tokens: int) -> "Rollouts":
        """Cuts rows of prompt and completion, of shape `(B, P + T)`, before their last T tokens."""
        prompt_length = input_ids.size(1) - num_completion_tokens
        return cls(
            input_ids[:, :prompt_length],
            attention_mask[:, :prompt_length],
            input_ids[:, prompt_length:],
            attention_mask[:, prompt_length:],
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
        index = rows or [0]
        completion_mask = self.completion_mask[index]
        return Rollouts(
            self.prompt_ids[index],
            self.prompt_mask[index],
            self.completion_ids[index],
            completion_mask if rows else torch.zeros_like(completion_mask),
        )

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

    def score(
        self,
        model: Callable[..., Any],
        shares_prefix: bool,
        backend: str = "auto",
        distillation: Distillation | None = None,
        with_router: bool = False,
    ) -> CompletionOutput:
        """One forward of `model`, to which `scoring.add_completion_scoring` has been applied.

        Args:
            model (`nn.Module` or `Callable`):
                Possibly wrapped.
            shares_prefix (`bool`):
                Run one packed row instead of B padded ones.
            backend (`str`, *optional*, defaults to `"auto"`):
                Attention kernels of a packed row.
            distillation (`Distillation`, *optional*):
                See [`~scoring.CompletionScoring`].
            with_router (`bool`, *optional*, defaults to `False`):
                Also sum up the router of a mixture of experts.

        Returns:
            [`~scoring.CompletionOutput`]
        """
        inputs = self._inputs(shares_prefix, backend, distillation=distillation, whole_rows=with_router)
        output: CompletionOutput = model(**inputs, **({"output_router_logits": True} if with_router else {}))
        return output

    def hidden_states(self, model: Callable[..., Any], shares_prefix: bool, backend: str = "auto") -> Tensor:
        """The states that predict the completion tokens, of shape `(B, T, H)`; as [`Rollouts.score`], without the LM
        head."""
        output: CompletionStates = model(**self._inputs(shares_prefix, backend, hidden_states_only=True))
        return output.hidden_states

    def _inputs(
        self,
        shares_prefix: bool,
        backend: str,
        hidden_states_only: bool = False,
        distillation: Distillation | None = None,
        whole_rows: bool = False,
    ) -> dict[str, Any]:
        scoring = CompletionScoring(self.completion_ids, self.completion_mask, hidden_states_only, distillation)
        if not shares_prefix:
            masks = self.prompt_mask, self.completion_mask.to(self.prompt_mask)
            return {
                "input_ids": torch.cat([self.prompt_ids, self.completion_ids], dim=1),
                "attention_mask": torch.cat(masks, dim=1),
                "completion_scoring": scoring,
            }
        packed = pack(self.prompts, self.completion_ids, self.completion_lengths, whole_rows, backend)
        return {
            "input_ids": packed.input_ids,
            "position_ids": packed.position_ids,
            "completion_scoring": replace(scoring, packed=packed),
        }


def score(
    model: nn.Module,
    rollouts: Rollouts,
    accelerator: Accelerator,
    sharing: PrefixSharing,
    max_rows: int,
    max_tokens: int | None = None,
    distillation: Distillation | None = None,
    with_router: bool = False,
) -> CompletionOutput:
    """Scores the completions with one forward of `model`, or with several where the bounds ask for that.

    A collective call. With a gradient and several parts, each part is checkpointed: its gradient needs the loss of the
    whole, and the graphs of all parts may not fit.

    Args:
        model (`nn.Module`):
            Possibly wrapped; `scoring.add_completion_scoring` has been applied to it.
        rollouts ([`Rollouts`]):
            B rows.
        accelerator ([`~accelerate.Accelerator`]):
            See [`Rollouts.split`].
        sharing ([`~shared_prefix.PrefixSharing`]):
            Whether and how rows are packed.
        max_rows (`int`), max_tokens (`int`, *optional*):
            Bounds of a forward.
        distillation (`Distillation`, *optional*):
            The teacher's side, with hidden states of B rows.
        with_router (`bool`, *optional*, defaults to `False`):
            See [`Rollouts.score`].

    Returns:
        [`~scoring.CompletionOutput`]: Of B rows.
    """
    parts = rollouts.split(max_rows, max_tokens, sharing.is_on, accelerator)
    is_split = len(parts) > 1 and torch.is_grad_enabled()
    called = _entered_once(model, accelerator) if is_split else model

    def score_part(rows: list[int], on_device: Tensor) -> CompletionOutput:
        taught = distillation
        if taught is not None:
            states = taught.hidden_states
            taught = replace(taught, hidden_states=states[rows[0] : rows[-1] + 1] if rows else states[:1])
        with accelerator.autocast():
            return rollouts.select(rows).score(called, sharing.is_on, sharing.backend, taught, with_router)

    # The repetition draws the same dropout only if an argument lies on the device: its generator alone is put back
    run_part = functools.partial(checkpoint, score_part, use_reentrant=False) if is_split else score_part
    outputs = [run_part(rows, rollouts.completion_ids) for rows in parts]
    return _concatenate(outputs, [len(rows) for rows in parts])


def _entered_once(model: nn.Module, accelerator: Accelerator) -> Callable[..., CompletionOutput]:
    """`model`, for several forwards, and repetitions of them, before one backward.

    Under ZeRO-3 every forward of the outermost module starts the record of what to fetch anew, which must not happen
    before the backward has ended. The hooks that fetch sit on the modules within.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return model
    inner, calls = accelerator.unwrap_model(model), itertools.count()
    return lambda **kwargs: (model if next(calls) == 0 else inner.forward)(**kwargs)


def _concatenate(outputs: list[CompletionOutput], num_rows: list[int]) -> CompletionOutput:
    """The outputs of a batch from those of its parts, of which the last may stand for no rows."""
    fields = {}
    for name in outputs[0].keys():
        values = [output[name] for output in outputs]
        if name == "router_sums":
            fields[name] = sum(value for value, n in zip(values, num_rows, strict=True) if n > 0)
        else:
            fields[name] = torch.cat([value[:n] for value, n in zip(values, num_rows, strict=True)])
    whole = CompletionOutput(**fields)
    for output, n in zip(outputs, num_rows, strict=True):
        if n == 0:  # parts without rows stay in the graph, so that every rank runs their backward
            whole.logps = whole.logps + 0 * output.logps.sum()
    return whole


def confirm(
    sharing: PrefixSharing,
    model: nn.Module,
    accelerator: Accelerator,
    pad_token_id: int,
    prompts: list[list[int]],
    completions: list[list[int]],
) -> None:
    """[`~shared_prefix.PrefixSharing.confirm`] with forwards of `model`, possibly wrapped. A collective call."""
    states = functools.partial(completion_states, model, accelerator, pad_token_id, sharing.backend)
    sharing.confirm(model, prompts, completions, states)


def completion_states(
    model: nn.Module,
    accelerator: Accelerator,
    pad_token_id: int,
    backend: str,
    prompts: list[list[int]],
    completions: Sequence[Sequence[int]],
    shares_prefix: bool,
    first_position: int = 0,
) -> Tensor:
    """The states of `model` that predict the tokens of `completions`, of shape `(N, H)`, by one forward.

    `first_position` is for a single rollout that is not packed.
    """
    ids = [torch.tensor(completion, dtype=torch.long) for completion in completions]
    mask = pad([torch.ones_like(row) for row in ids]).to(accelerator.device)
    rollouts = Rollouts.from_prompts(prompts, pad(ids).to(accelerator.device), mask, pad_token_id)
    called: Callable[..., Any] = model
    if first_position:
        num_tokens = rollouts.prompt_ids.size(1) + rollouts.completion_ids.size(1)
        positions = torch.arange(first_position, first_position + num_tokens, device=accelerator.device)
        called = functools.partial(model, position_ids=positions.unsqueeze(0))
    with accelerator.autocast():
        return rollouts.hidden_states(called, shares_prefix, backend)[mask.bool()]
