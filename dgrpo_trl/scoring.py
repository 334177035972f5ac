"""A model's forward over whole rollouts that scores the completion tokens only.

`add_completion_scoring` gives a causal language model a second way to be called: the backbone runs over prompt and
completion, and the LM head only over the positions that predict a completion token. Being part of the model's own
forward, it fires the hooks of DDP, FSDP and ZeRO-3 like any other call.
"""

import functools
import types
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .losses import Distillation, LMHead, token_terms
from .shared_prefix import PackedRollouts, no_mask


@dataclass(frozen=True)
class CompletionScoring:
    """Asks a model to score completions. Passed to its forward as `completion_scoring`.

    Args:
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            The last T token ids of each row of `input_ids`.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            1 at the tokens to score; all outputs are 0 elsewhere.
        hidden_states_only (`bool`, *optional*, defaults to `False`):
            Return the hidden states that predict the completion tokens, and leave the LM head alone.
        distillation (`Distillation`, *optional*):
            The teacher's side, with `hidden_states` of shape `(B, T, H_teacher)`.
        packed (`PackedRollouts`, *optional*):
            The same rollouts as one packed row. Then its `input_ids` and `position_ids` are what the forward is given.
    """

    completion_ids: Tensor
    completion_mask: Tensor
    hidden_states_only: bool = False
    distillation: Distillation | None = None
    packed: PackedRollouts | None = None


@dataclass
class CompletionStates(ModelOutput):
    """Output of a forward with `hidden_states_only`: a tensor of shape `(B, T, H)`."""

    hidden_states: Tensor


@dataclass
class CompletionOutput(ModelOutput):
    """Outputs of a scored forward: the fields of `losses.TokenTerms`, of shape `(B, T)`.

    Args:
        router_sums (`torch.Tensor` of shape `(k + 1, E)`, *optional*):
            Of a mixture of E experts, k per token, when `output_router_logits` is set; see [`router_sums`].
    """

    logps: Tensor
    entropies: Tensor | None = None  # a `ModelOutput` has one field without a default; it is always set
    divergences: Tensor | None = None
    teacher_entropies: Tensor | None = None
    top1_agreement: Tensor | None = None
    router_sums: Tensor | None = None

    @property
    def distilled(self) -> "DistilledTokens":
        """What there is with a teacher.

        Raises:
            ValueError: If the forward was given none.
        """
        if self.divergences is None or self.teacher_entropies is None or self.top1_agreement is None:
            raise ValueError("These completions were scored without a teacher. Pass `distillation`.")
        return DistilledTokens(self.logps, self.divergences, self.teacher_entropies, self.top1_agreement)


class DistilledTokens(NamedTuple):
    """Fields of a [`CompletionOutput`] with a teacher, of shape `(B, T)`."""

    logps: Tensor
    divergences: Tensor
    teacher_entropies: Tensor
    top1_agreement: Tensor


def logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Factor and soft-cap that a model applies to its projected logits, under the names that model families use.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Text configuration of the model.

    Returns:
        `tuple[float, float | None]`: `logit_scale` and `final_logit_softcapping` of [`~losses.LMHead`].
    """
    values = config.to_dict()
    softcap = values.get("final_logit_softcapping")
    # Cohere, Muse Glimmer and Falcon-H1 multiply. Granite and MiniCPM3 divide; HyperCLOVA X multiplies by that name.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if values.get(name) is not None:
            return values[name], softcap
    scaling = values.get("logits_scaling")
    if scaling is None:
        return 1.0, softcap
    return (scaling if config.model_type == "hyperclovax" else 1 / scaling), softcap


def lm_head(model: PreTrainedModel) -> LMHead:
    """The head of `model` as it is now. Under FSDP2 this gathers it, a collective call."""
    module = model.get_output_embeddings()
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (module.weight, module.bias))
    return LMHead(weight, bias, *logit_transform(model.config.get_text_config()))


@dataclass
class StudentForward:
    """What the student's forward of one loss is given, and what it returns, beside TRL's own tensors.

    TRL's `_compute_loss` runs that forward itself, by `_get_per_token_logps_and_entropies`: it names all arguments,
    and keeps of the results what its own loss needs. So the teacher's side gets in, and the divergences get out, by an
    attribute of the trainer that holds this for the time of one loss.
    """

    distillation: Distillation | None
    output: CompletionOutput | None = None

    @property
    def tokens(self) -> DistilledTokens:
        """The output, of a forward with a teacher.

        Raises:
            RuntimeError: If there was no forward: TRL has changed.
        """
        if self.output is None:
            raise RuntimeError("TRL's `_compute_loss` has not called `_get_per_token_logps_and_entropies`.")
        return self.output.distilled


def add_completion_scoring(model: PreTrainedModel, temperature: float = 1.0, fp32_projection: bool = False) -> None:
    """Gives `model` a forward that also accepts `completion_scoring`; without it, the forward is the one it had.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model to patch; the base model, where PEFT wraps it.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature that the logits are divided by.
        fp32_projection (`bool`, *optional*, defaults to `False`):
            Run the LM head in float32 (TRL's `cast_lm_head_to_fp32`).
    """
    original_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against this signature
    def forward(
        self: PreTrainedModel, *args: Any, completion_scoring: CompletionScoring | None = None, **kwargs: Any
    ) -> Any:
        if completion_scoring is None:
            return original_forward(*args, **kwargs)
        kwargs.pop("labels", None)  # PEFT passes it on, as None
        packed = completion_scoring.packed
        if packed is not None:
            kwargs |= {"attention_mask": no_mask(packed.input_ids.device), "shared_prefix": packed.layout}
        outputs = self.base_model(*args, **kwargs, use_cache=False)
        states = _completion_states(outputs.last_hidden_state, completion_scoring)
        if completion_scoring.hidden_states_only:
            mask = completion_scoring.completion_mask.bool()
            padded = states.new_zeros(*mask.shape, states.size(-1))
            return CompletionStates(padded.masked_scatter(mask.unsqueeze(-1), states))
        scored = _score(states, lm_head(self), completion_scoring, temperature, fp32_projection)
        if kwargs.get("output_router_logits"):
            weights = kwargs["attention_mask"] if packed is None else packed.token_weights
            top_k = self.config.get_text_config().num_experts_per_tok
            scored.router_sums = router_sums(outputs.router_logits, weights, top_k)
        return scored

    model.forward = types.MethodType(forward, model)


def _completion_states(last_hidden_state: Tensor, scoring: CompletionScoring) -> Tensor:
    """The states that predict the N tokens to score, of shape `(N, H)`: a position's state predicts the next token."""
    if scoring.packed is not None:
        return last_hidden_state[0].index_select(0, scoring.packed.state_index)
    num_tokens = scoring.completion_ids.size(1)
    return last_hidden_state[:, -num_tokens - 1 : -1][scoring.completion_mask.bool()]


def _score(
    states: Tensor, head: LMHead, scoring: CompletionScoring, temperature: float, fp32_projection: bool
) -> CompletionOutput:
    mask = scoring.completion_mask.bool()
    distillation = scoring.distillation
    if distillation is not None:
        distillation = replace(distillation, hidden_states=distillation.hidden_states[mask])
    terms = token_terms(
        states, head, scoring.completion_ids[mask], temperature, distillation, fp32_projection=fp32_projection
    )

    def padded(term: Tensor) -> Tensor:
        # `masked_scatter` keeps an empty result connected to the graph, so that every rank runs backward
        return term.new_zeros(mask.shape).masked_scatter(mask, term)

    return CompletionOutput(
        padded(terms.logps),
        padded(terms.entropies),
        *(None if term is None else padded(term) for term in terms[2:]),
    )


def router_sums(router_logits: tuple[Tensor, ...], token_weights: Tensor, top_k: int) -> Tensor:
    """What the load-balancing loss of a mixture of experts needs of some tokens; sums over batches add up.

    Args:
        router_logits (`tuple[torch.Tensor, ...]`):
            Of each layer, of shape `(n, E)`.
        token_weights (`torch.Tensor` of n elements):
            How often each token counts.
        top_k (`int`):
            Experts per token.

    Returns:
        `torch.Tensor` of shape `(top_k + 1, E)`: Over tokens and layers, how often each expert is a token's first,
        ..., k-th choice, and, last, the sum of its probabilities. Only the last has a gradient.
    """
    weights = token_weights.flatten()

    def layer_sums(logits: Tensor) -> Tensor:
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        chosen = F.one_hot(probabilities.topk(top_k).indices, logits.size(-1)).to(probabilities.dtype)
        choices = torch.cat([chosen, probabilities.unsqueeze(1)], 1)
        return torch.einsum("n,nke->ke", weights.to(probabilities), choices)

    first, *others = map(layer_sums, router_logits)
    return sum(others, first)


def load_balancing_loss(sums: Tensor) -> Tensor:
    """The auxiliary loss of Mixtral and its successors, a scalar, from `router_sums`.

    With f_je the share of tokens whose j-th choice is expert e, and p_e its mean probability, it is the sum over j and
    e of E * f_je * p_e.
    """
    counts, probabilities = sums[:-1], sums[-1]
    num_tokens = counts[0].sum()
    return sums.size(-1) * (counts * probabilities).sum() / num_tokens**2
