"""Rollouts as one packed row, in which a prompt runs once for all its completions."""

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """A prompt and its completions in a packed row; all numbers are in tokens.

    Args:
        start (`int`):
            Where the prefix begins in the row.
        prefix_length (`int`):
            Tokens of the prefix, which may be none.
        branch_lengths (`tuple[int, ...]`):
            Tokens of each branch, at least one.
    """

    start: int
    prefix_length: int
    branch_lengths: tuple[int, ...]

    @property
    def prefix(self) -> slice:
        return slice(self.start, self.start + self.prefix_length)

    @property
    def branches(self) -> slice:
        return slice(self.prefix.stop, self.prefix.stop + sum(self.branch_lengths))

    @property
    def branch_starts(self) -> list[int]:
        return list(accumulate(self.branch_lengths[:-1], initial=self.prefix.stop))


@dataclass(frozen=True)
class PrefixLayout:
    """Where prompts and completions lie in a packed row, which the groups fill one after the other.

    Args:
        groups (`tuple[Group, ...]`):
            At least one.
        backend (`str`, *optional*, defaults to `"auto"`):
            One of `BACKENDS`, see [`choose_kernel`].
    """

    groups: tuple[Group, ...]
    backend: str = "auto"

    @property
    def num_tokens(self) -> int:
        return self.groups[-1].branches.stop

    @functools.cached_property
    def segments(self) -> tuple[int, ...]:
        """Lengths of prefixes and branches, in the order of the row."""
        lengths = [n for group in self.groups for n in (group.prefix_length, *group.branch_lengths)]
        return tuple(n for n in lengths if n > 0)

    @property
    def longest(self) -> int:
        """Tokens of the longest prefix with one of its branches."""
        return max(group.prefix_length + max(group.branch_lengths) for group in self.groups)


@dataclass(frozen=True)
class PackedRollouts:
    """Rollouts as one packed row of L tokens, see [`~shared_prefix.shared_prefix_attention`].

    Args:
        input_ids (`torch.Tensor` of shape `(1, L)`):
            Of each prompt all tokens but the last, then, for each of its completions, that last token and the
            completion without its own last token, which predicts nothing.
        position_ids (`torch.Tensor` of shape `(1, L)`):
            Positions in the unpacked rows.
        layout (`PrefixLayout`):
            Where prompts and completions lie.
        state_index (`torch.Tensor` of shape `(N,)`):
            For each of the N completion tokens that are scored, row after row, the place in the packed row whose state
            predicts it.
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
    """One key per prompt, the same for the same prompt; `prompts` are 1D, on the CPU."""
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
            See [`~shared_prefix.choose_kernel`].

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
            Of each row's prompt: a part counts a prompt once, however many of its rows hold it.
        max_rows (`int`):
            Rows per part.
        max_tokens (`int`, *optional*):
            Tokens per part. A longer row is a part of its own.
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
