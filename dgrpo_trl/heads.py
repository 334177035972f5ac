"""A model's forward over whole rollouts that scores the completion tokens only.

`add_completion_scoring` gives a causal language model a second way to be called: the backbone runs over prompt and
completion, and the LM head only over the positions that predict a completion token. Being part of the model's own
forward, it fires the hooks of DDP, FSDP and ZeRO-3 like any other call.
"""

import functools
import types
from dataclasses import dataclass, replace

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .losses import Distillation, LMHead, token_terms


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
    """

    completion_ids: Tensor
    completion_mask: Tensor
    hidden_states_only: bool = False
    distillation: Distillation | None = None


@dataclass
class CompletionOutput(ModelOutput):
    """Outputs of a scored forward; the fields of `losses.TokenTerms`, of shape `(B, T)`, and what else was asked for.

    Args:
        aux_loss (`torch.Tensor`, *optional*):
            Load-balancing loss of a mixture of experts, a scalar, when `output_router_logits` is set.
        hidden_states (`torch.Tensor` of shape `(B, T, H)`, *optional*):
            With `hidden_states_only`.
    """

    logps: Tensor | None = None
    entropies: Tensor | None = None
    divergences: Tensor | None = None
    teacher_entropies: Tensor | None = None
    top1_agreement: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: Tensor | None = None


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
    def forward(self, *args, completion_scoring: CompletionScoring | None = None, **kwargs):
        if completion_scoring is None:
            return original_forward(*args, **kwargs)
        kwargs.pop("labels", None)  # PEFT passes it on, as None
        outputs = self.base_model(*args, **kwargs, use_cache=False)
        num_tokens = completion_scoring.completion_ids.size(1)
        states = outputs.last_hidden_state[:, -num_tokens - 1 : -1]  # a position's state predicts the next token
        if completion_scoring.hidden_states_only:
            return CompletionOutput(hidden_states=states)
        scored = _score(states, lm_head(self), completion_scoring, temperature, fp32_projection)
        if kwargs.get("output_router_logits"):
            scored.aux_loss = _load_balancing_loss(self.config.get_text_config(), outputs, kwargs["attention_mask"])
        return scored

    model.forward = types.MethodType(forward, model)


def _score(
    states: Tensor, head: LMHead, scoring: CompletionScoring, temperature: float, fp32_projection: bool
) -> CompletionOutput:
    mask = scoring.completion_mask.bool()
    distillation = scoring.distillation
    if distillation is not None:
        distillation = replace(distillation, hidden_states=distillation.hidden_states[mask])
    terms = token_terms(
        states[mask], head, scoring.completion_ids[mask], temperature, distillation, fp32_projection=fp32_projection
    )
    # `masked_scatter` keeps an empty result connected to the graph, so that every rank runs backward
    padded = (None if term is None else term.new_zeros(mask.shape).masked_scatter(mask, term) for term in terms)
    return CompletionOutput(*padded)


def _load_balancing_loss(config: PreTrainedConfig, outputs: ModelOutput, attention_mask: Tensor) -> Tensor:
    # As TRL counts it: Mixtral's formula, over prompt and completion tokens alike
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
    )
