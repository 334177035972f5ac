"""The shared prefix: rollouts packed so that a prompt runs once for all its completions, and where that is exact."""

import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from .attention import Group, PrefixLayout


# Model types whose packed forward equals the plain one, values and gradients: the tests run each of them, the first
# ones with sliding-window layers as well. Others may be exact too, or silently wrong: linear attention, convolutions
# and chunks take the row for one text, and some families (qwen2_moe) keep their window in the mask alone.
SLIDING_WINDOW_MODEL_TYPES = frozenset(
    "cohere2 cwm exaone4 gemma3_text ministral ministral3 mistral mixtral olmo3 phi3 qwen2 qwen3 qwen3_moe smollm3 "
    "starcoder2".split()
)
FULL_ATTENTION_MODEL_TYPES = frozenset(
    "apertus arcee cohere deepseek_v2 deepseek_v3 ernie4_5 gemma glm glm4 glm4_moe gpt_neox granite granitemoe helium "
    "hunyuan_v1_dense llama minicpm3 minimax_m2 olmo olmo2 olmoe phi qwen2_moe seed_oss".split()
)


def obstacle(config: PreTrainedConfig) -> str | None:
    """Why a model of this configuration cannot run packed rows exactly, or `None` if it can.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's own, not its text part.

    Returns:
        `str` or `None`
    """
    model_type, values = config.model_type, config.to_dict()
    if model_type not in SLIDING_WINDOW_MODEL_TYPES | FULL_ATTENTION_MODEL_TYPES:
        return f"model type {model_type!r} is not among those that were tested"
    layer_types = set(values.get("layer_types") or ())
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    has_window = "sliding_attention" in layer_types or (
        values.get("sliding_window") is not None and values.get("use_sliding_window") is not False and not layer_types
    )
    if has_window and model_type not in SLIDING_WINDOW_MODEL_TYPES:
        return f"the sliding window of {model_type!r} was not tested"
    if values.get("attn_logit_softcapping") is not None:
        return "it soft-caps its attention scores"
    if values.get("attention_dropout"):
        return f"it has an attention dropout of {values['attention_dropout']}"
    return None


@dataclass(frozen=True)
class PackedRollouts:
    """Rollouts as one packed row of L tokens, see `prefix_attention`.

    Args:
        input_ids (`torch.Tensor` of shape `(1, L)`):
            Of each prompt all tokens but the last, then, for each of its completions, that last token and the
            completion without its own last token, which predicts nothing.
        position_ids (`torch.Tensor` of shape `(1, L)`):
            Places in the unpacked rows.
        layout (`PrefixLayout`):
            Where prompts and completions lie.
        state_index (`torch.Tensor` of shape `(N,)`):
            For each of the N completion tokens that are scored, row after row, the place whose state predicts it.
        token_weights (`torch.Tensor` of shape `(1, L)`):
            How many of the unpacked rows a token stands for: float, the number of branches for those of a prompt.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: PrefixLayout
    state_index: Tensor
    token_weights: Tensor


def group_rows(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys together, in the order in which the keys first appear."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def unpadded(input_ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The rows of a padded batch without their padding, 1D, on the CPU; both tensors are of shape `(B, L)`."""
    return [ids[row] for ids, row in zip(input_ids.cpu(), mask.bool().cpu(), strict=True)]


def prompt_keys(prompts: Sequence[Tensor]) -> list[bytes]:
    """One key a prompt, the same for the same prompt; `prompts` are 1D, on the CPU."""
    return [prompt.numpy().tobytes() for prompt in prompts]


def pack(
    prompts: Sequence[Tensor],
    completion_ids: Tensor,
    completion_lengths: Sequence[int],
    whole_rows: bool = False,
    backend: str = "auto",
) -> PackedRollouts:
    """Packs rollouts into one row, on the device of `completion_ids`.

    Rows without a token to score are left out. If there is none to score at all, one token is run, so that every rank
    takes part in the forward.

    Args:
        prompts (`Sequence[torch.Tensor]`):
            B prompts, 1D, on the CPU. Equal ones are shared.
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            Padded on the right.
        completion_lengths (`Sequence[int]`):
            Tokens to score of each.
        whole_rows (`bool`, *optional*, defaults to `False`):
            Run also what predicts nothing: the last token of each completion, and rows without a token to score. A
            mixture of experts counts these tokens in its load-balancing loss.
        backend (`str`, *optional*, defaults to `"auto"`):
            Of the attention.

    Returns:
        [`PackedRollouts`]
    """
    completions = completion_ids.cpu()
    ids, positions, weights, groups = [], [], [], []
    starts, row_end = [0] * len(prompts), 0
    for rows in group_rows(prompt_keys(prompts)):
        rows = [i for i in rows if whole_rows or completion_lengths[i] > 0]
        if not rows:
            continue
        prompt = prompts[rows[0]]
        last = len(prompt) - 1
        ids.append(prompt[:-1])
        positions.append(torch.arange(last))
        weights.append(torch.full((last,), float(len(rows))))
        group_start, row_end, lengths = row_end, row_end + last, []
        for i in rows:
            num_completion_tokens = completion_lengths[i] if whole_rows else completion_lengths[i] - 1
            ids += [prompt[-1:], completions[i, :num_completion_tokens]]
            lengths.append(1 + num_completion_tokens)
            positions.append(torch.arange(last, last + lengths[-1]))
            weights.append(torch.ones(lengths[-1]))
            starts[i] = row_end
            row_end += lengths[-1]
        groups.append(Group(group_start, last, tuple(lengths)))
    if not groups:
        ids, positions, weights = [prompts[0][-1:]], [torch.zeros(1, dtype=torch.long)], [torch.ones(1)]
        groups = [Group(0, 0, (1,))]
    index = [torch.arange(start, start + n) for start, n in zip(starts, completion_lengths, strict=True)]
    device = completion_ids.device
    return PackedRollouts(
        input_ids=torch.cat(ids).unsqueeze(0).to(device),
        position_ids=torch.cat(positions).unsqueeze(0).to(device),
        layout=PrefixLayout(tuple(groups), backend),
        state_index=torch.cat(index).to(device),
        token_weights=torch.cat(weights).unsqueeze(0).to(device),
    )


def no_mask(device: torch.device) -> Tensor:
    """Attention mask of a packed row: 4D, so that transformers leaves it as it is and builds none of L x L itself."""
    return torch.zeros(1, 1, 0, 0, dtype=torch.bool, device=device)


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


def split_by_tokens(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    keys: Sequence[Hashable],
    max_rows: int,
    max_tokens: int | None = None,
    row_length: int | None = None,
) -> list[list[int]]:
    """Cuts rows, in their order, into parts of at most `max_rows` rows and `max_tokens` tokens.

    Args:
        prompt_lengths (`Sequence[int]`), completion_lengths (`Sequence[int]`):
            Of each row, in tokens.
        keys (`Sequence[Hashable]`):
            Of each row's prompt: a part counts a prompt once.
        max_rows (`int`):
            Rows a part.
        max_tokens (`int`, *optional*):
            Tokens a part. A row that is longer makes a part of its own.
        row_length (`int`, *optional*):
            Of the padded rows, where prompts are not shared: then each row counts with this many tokens.

    Returns:
        `list[list[int]]`: Indices of rows.
    """
    parts: list[list[int]] = []
    seen: set[Hashable] = set()
    num_tokens = 0
    for i, key in enumerate(keys):
        own = completion_lengths[i] + 1  # the last token of the prompt stands before each completion
        cost = row_length or own + (0 if key in seen else prompt_lengths[i] - 1)
        is_full = max_tokens is not None and num_tokens + cost > max_tokens
        if not parts or is_full or len(parts[-1]) == max_rows:
            parts.append([])
            seen, num_tokens = set(), 0
            cost = row_length or own + prompt_lengths[i] - 1
        parts[-1].append(i)
        seen.add(key)
        num_tokens += cost
    return parts


class ExactnessCheck:
    """Compares packed with plain forwards of one model while it trains: the second line of defence after `obstacle`.

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
        """Length and rows of the longest two rollouts of one prompt that have tokens to score; 0 if none has."""
        best, best_rows = 0, [0]
        for rows in group_rows([tuple(prompt) for prompt in prompts]):
            rows = sorted(rows, key=lambda i: len(completions[i]))[-2:]
            length = len(prompts[rows[0]]) + len(completions[rows[-1]])
            if len(rows) == 2 and len(completions[rows[0]]) > 0 and length > best:
                best, best_rows = length, rows
        return best, best_rows
