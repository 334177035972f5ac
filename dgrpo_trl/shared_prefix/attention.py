"""Attention over a packed row, in which the completions of a prompt share one copy of it.

A packed row is `[prefix_1, branch_11, ..., branch_1G, prefix_2, ...]`. A prefix token attends to its prefix up to
itself; a branch token to the whole prefix of its group and to its branch up to itself. So the attention of a row is
computed in parts: every segment with itself, causally, and the branches of each group with their prefix. Where a token
has two parts, they are merged in float32 by their log-sum-exps. The keys and values of a prefix are read where they
are, never copied for a branch, and no mask of L x L is made, neither in forward nor in backward: the gradient of a
part is that of FlashAttention, given the merged output and log-sum-exp.

`register` makes a model's attention implementation accept a layout as the keyword `shared_prefix`. It arrives with
each forward's own arguments, because gradient checkpointing repeats a forward when any surrounding context is gone.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from .kernels import Kernel, Sequences, choose_kernel
from .packing import Group, PrefixLayout


_MARK = "takes_shared_prefix"  # an attribute of the attention functions that do
MERGED_ELEMENTS = 2**24  # of the outputs, merged at a time: the float32 intermediates are of this size


def _calls_to_prefix(group: Group, window: int | None) -> Iterator[tuple[slice, slice, Sequences]]:
    """How a group's branches see their prefix: rows of queries, rows of keys, and which of them see which.

    Without a window, one call serves all branches. With one, only the first tokens of a branch see the last of the
    prefix, and how many of it depends on the place in the branch.
    """
    if group.prefix_length == 0:
        return
    if window is None:
        lengths = (sum(group.branch_lengths),), (group.prefix_length,)
        yield group.branches, group.prefix, Sequences(*lengths, causal=False)
        return
    num_keys = min(group.prefix_length, window - 1)
    if num_keys == 0:
        return
    keys = slice(group.prefix.stop - num_keys, group.prefix.stop)
    for start, length in zip(group.branch_starts, group.branch_lengths, strict=True):
        num_queries = min(length, window - 1)
        reach = window - 1 - num_queries
        yield slice(start, start + num_queries), keys, Sequences((num_queries,), (num_keys,), causal=False, left=reach)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: PrefixLayout,
        scale: float,
        window: int | None,
        kernel: Kernel,
    ) -> Tensor:
        own = Sequences(layout.segments, layout.segments, causal=True, left=None if window is None else window - 1)
        with kernel.active():
            out, lse = kernel.forward(q, k, v, scale, own)
            for group in layout.groups:
                for queries, keys, sequences in _calls_to_prefix(group, window):
                    part, part_lse = kernel.forward(q[queries], k[keys], v[keys], scale, sequences)
                    _merge(out[queries], lse[:, queries], part, part_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale, ctx.window, ctx.kernel, ctx.own = layout, scale, window, kernel, own
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        kernel, scale = ctx.kernel, ctx.scale
        with kernel.active():
            dq, dk, dv = kernel.backward(grad, q, k, v, out, lse, scale, ctx.own)
            for group in ctx.layout.groups:
                prefix_dk, prefix_dv = (d[group.prefix].to(lse.dtype) for d in (dk, dv))  # a sum over many branches
                for queries, keys, sequences in _calls_to_prefix(group, ctx.window):
                    tensors = (grad[queries], q[queries], k[keys], v[keys], out[queries], lse[:, queries])
                    part_dq, part_dk, part_dv = kernel.backward(*tensors, scale, sequences)
                    dq[queries] += part_dq
                    prefix_dk[keys.start - group.start : keys.stop - group.start] += part_dk
                    prefix_dv[keys.start - group.start : keys.stop - group.start] += part_dv
                dk[group.prefix], dv[group.prefix] = prefix_dk, prefix_dv
        return dq, dk, dv, None, None, None, None


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float, window: int | None, kernel: Kernel
) -> Tensor:
    """Attention of a packed row of L tokens, of which each sees at most the last `window`, with its gradient.

    Args:
        q (`torch.Tensor` of shape `(L, Hq, D)`), k, v (`torch.Tensor` of shape `(L, Hkv, D)`):
            Of one dtype.

    Returns:
        `torch.Tensor`: Of the shape of `q`.
    """
    return _PackedAttention.apply(q, k, v, layout, scale, window, kernel)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds to the attention `out` (T, H, D) over some keys, with `lse` (H, T), in place, that over further keys."""
    total = torch.logaddexp(lse, part_lse)
    weight, part_weight = ((x - total).exp().T.unsqueeze(-1) for x in (lse, part_lse))
    step = max(1, MERGED_ELEMENTS // out[0].numel())
    for start in range(0, out.size(0), step):
        rows = slice(start, start + step)
        out[rows] = out[rows] * weight[rows] + part[rows] * part_weight[rows]  # the weights are float32: the sum too
    lse.copy_(total)


@torch.compiler.disable  # one graph for each layout would be compiled
def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one packed row, with the signature of transformers' attention functions.

    Args:
        module (`nn.Module`):
            The attention layer.
        query (`torch.Tensor` of shape `(1, Hq, L, D)`), key (`torch.Tensor` of shape `(1, Hkv, L, D)`):
            After rotary embedding, by the positions of the unpacked rows.
        value (`torch.Tensor` of shape `(1, Hkv, L, Dv)`):
            Dv <= D.
        layout (`PrefixLayout`):
            Of L tokens.
        dropout, scaling, sliding_window:
            As transformers passes them.

    Returns:
        `tuple[torch.Tensor, None]`: The output, of shape `(1, L, Hq, Dv)`.

    Raises:
        NotImplementedError: For what the kernels cannot express: dropout, soft-caps, sinks, position biases,
            bidirectional layers.
        ValueError: If the tensors are not a packed row of the layout.
    """
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"Shared prefix: {type(module).__name__} uses `{name}`. Set `shared_prefix='off'`."
            )
    if dropout or not getattr(module, "is_causal", True):
        raise NotImplementedError(
            f"Shared prefix: {type(module).__name__} has attention dropout or is not causal. Set it to 0, or set "
            "`shared_prefix='off'`."
        )
    if query.size(0) != 1 or query.size(2) != layout.num_tokens or key.size(2) != layout.num_tokens:
        raise ValueError(
            f"A packed row of {layout.num_tokens} tokens was announced, but queries are of shape "
            f"{tuple(query.shape)} and keys of shape {tuple(key.shape)}."
        )
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):  # raw kernels have no autocast rule
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    else:  # layer norms that PEFT keeps in float32 promote queries and keys
        query, key = query.to(value.dtype), key.to(value.dtype)
    if sliding_window is not None and layout.longest <= sliding_window:
        sliding_window = None
    head_dim, value_dim = query.size(-1), value.size(-1)
    scaling = head_dim**-0.5 if scaling is None else scaling
    if value_dim < head_dim:  # multi-head latent attention
        value = F.pad(value, (0, head_dim - value_dim))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    with torch.autocast(device_type, enabled=False):
        kernel = choose_kernel(layout.backend, query.device, query.dtype, head_dim)
        out = packed_attention(q, k, v, layout, scaling, sliding_window, kernel)
    return out[..., :value_dim].unsqueeze(0), None


def register(attn_implementation: str) -> None:
    """Makes transformers' attention function of this name take a `PrefixLayout` as the keyword `shared_prefix`.

    Without the keyword, it is the function it was. Does nothing the second time.

    Args:
        attn_implementation (`str`):
            A name in transformers' `AttentionInterface`, such as `"sdpa"` or `"flash_attention_2"`.

    Raises:
        ValueError: If there is no function of that name; `"eager"` is each model's own.
    """
    original = AttentionInterface().get(attn_implementation)
    if original is None:
        raise ValueError(
            f"The attention implementation {attn_implementation!r} cannot share prefixes. Use 'sdpa' or a flash one."
        )
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def attention(module, query, key, value, attention_mask, *args, shared_prefix=None, **kwargs):
        if shared_prefix is None:
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        return shared_prefix_attention(module, query, key, value, shared_prefix, *args, **kwargs)

    setattr(attention, _MARK, True)
    AttentionInterface.register(attn_implementation, attention)
