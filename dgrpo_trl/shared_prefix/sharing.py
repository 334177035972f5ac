"""Whether a model runs each prompt once: decided before training, checked while it trains; and the prefill."""

import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from ..trl_compat import CACHE_NAMES, base_model, without_dropout
from .attention import register
from .packing import group_rows, prompt_keys, unpadded
from .support import unsupported_reason


if TYPE_CHECKING:
    from peft import PeftModel

logger = get_logger(__name__)


class States(Protocol):
    """One forward: the `(N, H)` states that predict the completion tokens.

    Without sharing, positions may start at another number than 0: to a model of relative positions that is the same.
    """

    def __call__(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        shares_prefix: bool,
        first_position: int = 0,
    ) -> Tensor: ...


# Where the plain forwards of `ExactnessCheck` start that show what rounding does: any number but 0
NOISE_POSITION = 64


class PrefixSharing:
    """Whether one model runs each prompt once for all its completions.

    Decided here from the model, logged with the reason if it is off, and switched off by [`PrefixSharing.confirm`].

    Args:
        model (`nn.Module`):
            Possibly wrapped. Its attention is prepared.
        name (`str`):
            Which model, for messages.
        mode (`str`), backend (`str`):
            `shared_prefix` and `shared_prefix_backend` of the [`DGRPOConfig`].
        accelerator ([`~accelerate.Accelerator`]):
            Brings the outcome of the comparisons to all ranks.

    Attributes:
        is_on (`bool`):
            Whether it does.
        unsupported_reason (`str`, *optional*):
            Why the model cannot share. For `"on"` that is the caller's error to raise.
    """

    def __init__(self, model: nn.Module, name: str, mode: str, backend: str, accelerator: Accelerator):
        self.name = name
        self.mode = mode
        self.backend = backend
        self.check = ExactnessCheck(accelerator)
        self.is_on = False
        self.unsupported_reason: str | None = None
        if mode == "off":
            return
        unwrapped = accelerator.unwrap_model(model)
        self.unsupported_reason = _unsupported_reason(unwrapped)
        if self.unsupported_reason is not None:
            logger.warning(
                f"Shared prefix: off for {name}: {self.unsupported_reason}. Every completion runs with a copy of its "
                "prompt."
            )
            return
        register(base_model(unwrapped).config._attn_implementation)
        self.is_on = True
        logger.info(f"Shared prefix: on for {name}")

    def confirm(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        states: States,
    ) -> None:
        """Switches sharing off if packed forwards of `model` do not equal plain ones on these rollouts.

        A collective call; it runs forwards only where [`ExactnessCheck.is_due`].

        Raises:
            RuntimeError: If they do not, and `mode` is `"on"`.
        """
        if not (self.is_on and self.check.is_due(prompts, completions)):
            return
        with without_dropout(model):  # it would differ between the two
            self.is_on = self.check.passes(prompts, completions, states)
        error, length = self.check.error, self.check.checked_length
        noise = f"; rounding alone changes them by {self.check.noise:.2g}" if self.check.noise else ""
        if self.is_on:
            logger.info(f"Shared prefix: exact for {self.name} to {error:.1e} at {length} tokens")
            return
        message = (
            f"The hidden states of {self.name} with a shared prefix differ from those without by {error:.2g} of their "
            f"norm, at {length} tokens{noise}."
        )
        if self.mode == "on":
            raise RuntimeError(f"{message} Training would be wrong. Set `shared_prefix='off'`, and please report it.")
        logger.warning(f"{message} The shared prefix is switched off for it; please report this.")


def _unsupported_reason(model: "PreTrainedModel | PeftModel") -> str | None:
    """[`unsupported_reason`] of a model that is loaded: of its adapter and its attention too."""
    config = base_model(model).config
    reason = unsupported_reason(config)
    if reason is not None:
        return reason
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        return "its adapter puts virtual tokens before the prompt"
    implementation = config._attn_implementation
    if not (implementation == "sdpa" or "flash" in implementation):
        return f"its attention implementation is {implementation!r}, not 'sdpa' or a flash one"
    return None


def share_prefill(model: PreTrainedModel) -> None:
    """Makes `model.generate` run equal prompts of a batch once, and copy their keys and values to all its rows.

    Only the first forward over the prompts changes; it stays one forward, so ranks that generate in step still do.
    Where it cannot be shared, it is the forward it was, and the first time the reason is logged.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model to patch; the base model, where PEFT wraps it.
    """
    original_prefill = model._prefill
    logged: set[str] = set()

    def prefill(
        self: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        cache: Any = next((model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None), None)
        reason = _unshareable_reason(cache, generation_config, model_kwargs)
        if reason is not None:
            if reason not in logged:
                logged.add(reason)
                # The standard library's logger: models also generate where no accelerate state exists
                logger.logger.warning(f"Shared prefix: generation runs every row with a copy of its prompt: {reason}.")
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
        cache.batch_select_indices(group_of_row)  # the forward has filled it
        outputs.logits = outputs.logits[group_of_row]
        return outputs

    model._prefill = types.MethodType(prefill, model)


def _unshareable_reason(cache: Any, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> str | None:
    """Why this prefill cannot be shared, or `None` if it can."""
    if cache is None:
        return "it keeps no cache"
    if type(cache) is not DynamicCache:
        return f"its cache is a {type(cache).__name__}, not a DynamicCache"
    if cache.offloading:
        return "its cache is offloaded"
    if cache.get_seq_length() > 0:
        return "it continues from a cache that is not empty"
    if generation_config.output_hidden_states or generation_config.output_attentions:
        return "hidden states or attentions are to be returned"
    if model_kwargs.get("inputs_embeds") is not None:
        return "it starts from embeddings"
    return None


class ExactnessCheck:
    """Compares packed with plain forwards of one model while it trains: the second line of defense.

    The first is [`unsupported_reason`]. The check runs two rollouts of one prompt both ways, on the first batch that
    has two and whenever the longest has doubled: a window, for instance, shows only in rows that are longer. All ranks
    take part, with as many forwards whatever their own batch holds, and come to the same result.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Reduces lengths and errors over all ranks.
        tolerance (`float`):
            For the largest relative error of a state in float32.
        low_precision_tolerance (`float`):
            For the mean relative error of a rollout's states in bfloat16 and float16. On SmolLM2-135M rounding alone
            gives 0.01; completions that see each other give 0.3, positions that are not restarted 0.1.
        noise_factor (`float`):
            Deep models and long rows round more. Above that tolerance the error may be this multiple of what rounding
            does to plain forwards of the same rows, one of them at other positions: on SmolLM2-135M it is 0.7 to 0.9
            times as large, and with those two faults 28 and 7 times. On random Qwen3 models of 2, 8, 32 and 64 layers
            rounding gives 0.012, 0.023, 0.048 and 0.067, a right row 0.9 times that, and the mildest of four faults
            10, 10, 8 and 8 times (`scripts/benchmarks/exactness.py`, 2,048 tokens on a CPU).

    Attributes:
        checked_length (`int`):
            Tokens of the longest rollout that was compared, over all ranks.
        error, noise (`float`):
            The last ones, over all ranks; a noise of 0 was not measured.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tolerance: float = 1e-3,
        low_precision_tolerance: float = 0.05,
        noise_factor: float = 3.0,
    ):
        self.accelerator = accelerator
        self.tolerance = tolerance
        self.low_precision_tolerance = low_precision_tolerance
        self.noise_factor = noise_factor
        self.checked_length = 0
        self.error = self.noise = 0.0

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
        states: States,
    ) -> bool:
        """Runs two rollouts both ways, and compares. A collective call: as many forwards on every rank.

        Args:
            prompts, completions (`Sequence[Sequence[int]]`):
                Rollouts, in token ids.
            states (`Callable`):
                Runs the model once, see [`States`].

        Returns:
            `bool`: The same on all ranks.
        """
        _, rows = self._longest_pair(prompts, completions)
        pair = [list(prompts[i]) for i in rows], [list(completions[i]) for i in rows]

        def plain_states(first_position: int = 0) -> list[Tensor]:
            # One row at a time: two long ones may not fit, and a padded row would have other positions
            return [states([p], [c], False, first_position) for p, c in zip(*pair, strict=True)]

        plain = plain_states()
        shared = states(*pair, True).split([len(completion) for completion in pair[1]])
        has_low_dtype = plain[0].dtype in (torch.bfloat16, torch.float16)
        is_low = has_low_dtype or self.accelerator.mixed_precision in ("bf16", "fp16")
        # Of a mean, the largest: the first completion is right whatever the second one sees
        self.error, self.noise = self._error(plain, shared, Tensor.mean if is_low else Tensor.max), 0.0
        if not is_low:
            return self.error <= self.tolerance  # not for NaN
        if self.error <= self.low_precision_tolerance:
            return True
        self.noise = self._error(plain, plain_states(NOISE_POSITION), Tensor.mean)
        return self.error <= self.noise_factor * self.noise

    def _error(self, expected: Sequence[Tensor], got: Sequence[Tensor], reduce: Callable[[Tensor], Tensor]) -> float:
        """The largest relative error of a completion, over all ranks, of which all get to know it."""
        errors = [
            reduce((a.float() - b.float()).norm(dim=-1) / a.float().norm(dim=-1))
            for a, b in zip(expected, got, strict=True)
            if len(a) > 0
        ]
        return self._maximum(torch.stack(errors).max().item() if errors else 0.0)

    def _maximum(self, value: float) -> float:
        return self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).max().item()

    @staticmethod
    def _longest_pair(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> tuple[int, list[int]]:
        """Length and rows of the longest two rollouts of one prompt that have tokens to score; 0 if none has.

        Then the first row stands twice: every rank runs two plain rows, whatever its batch holds.
        """
        best, best_rows = 0, [0, 0]
        for rows in group_rows([tuple(prompt) for prompt in prompts]):
            rows = sorted(rows, key=lambda i: len(completions[i]))[-2:]
            length = len(prompts[rows[0]]) + len(completions[rows[-1]])
            if len(rows) == 2 and len(completions[rows[0]]) > 0 and length > best:
                best, best_rows = length, rows
        return best, best_rows
