"""Packed rows against plain ones: attention, every allowed model type, values and gradients; controls that fail."""

import contextlib
import types
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dgrpo_trl.rollouts import Rollouts
from dgrpo_trl.scoring import CompletionScoring, add_completion_scoring, load_balancing_loss, router_sums
from dgrpo_trl.shared_prefix import (
    SUPPORTED_LAYERS,
    ExactnessCheck,
    Group,
    PrefixLayout,
    pack,
    register,
    share_prefill,
    shared_prefix_attention,
    split_by_tokens,
    unsupported_reason,
)
from dgrpo_trl.shared_prefix.kernels import TorchCPUKernel
from dgrpo_trl.shared_prefix.support import SLIDING


# --- Packing


def test_a_packed_row_by_hand():
    prompts = [torch.tensor(ids) for ids in ([5, 6, 7], [8], [5, 6, 7], [5, 6, 7])]
    completions = torch.tensor([[10, 11, 0], [12, 13, 14], [15, 16, 17], [18, 0, 0]])
    packed = pack(prompts, completions, [2, 3, 0, 1])
    assert packed.input_ids.tolist() == [[5, 6, 7, 10, 7, 8, 12, 13]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    assert packed.layout.groups == (Group(0, 2, (2, 1)), Group(5, 0, (3,)))
    assert packed.layout.segments == (2, 2, 1, 3)
    assert packed.state_index.tolist() == [2, 3, 5, 6, 7, 4]  # of 10, 11, 12, 13, 14, 18
    assert packed.token_weights.tolist() == [[2, 2, 1, 1, 1, 1, 1, 1]]

    whole = pack(prompts, completions, [2, 3, 0, 1], whole_rows=True)
    assert whole.input_ids.tolist() == [[5, 6, 7, 10, 11, 7, 7, 18, 8, 12, 13, 14]]
    assert whole.token_weights.sum() == 5 + 4 + 3 + 4  # as many as the unpacked rows have
    assert whole.state_index.tolist() == [2, 3, 8, 9, 10, 6]


def test_nothing_to_score_is_one_token():
    packed = pack([torch.tensor([5, 6, 7])] * 2, torch.tensor([[1], [2]]), [0, 0])
    assert packed.input_ids.tolist() == [[7]] and packed.state_index.numel() == 0


def test_parts_by_hand():
    # One prompt of 10 tokens runs 9 of them once, and 1 + C for each completion
    assert split_by_tokens([10] * 4, [5, 5, 5, 5], "aaaa", 8, 27) == [[0, 1, 2], [3]]
    assert split_by_tokens([10] * 4, [5, 5, 5, 5], "aaaa", 8, 26) == [[0, 1], [2, 3]]
    assert split_by_tokens([10] * 4, [5, 5, 5, 5], "abab", 8, 30) == [[0, 1], [2, 3]]
    assert split_by_tokens([10] * 4, [5, 5, 5, 5], "aaaa", 8, 30, row_length=15) == [[0, 1], [2, 3]]
    assert split_by_tokens([10] * 4, [5, 5, 5, 5], "aaaa", 3) == [[0, 1, 2], [3]]
    assert split_by_tokens([10, 90, 10], [5, 5, 5], "aba", 8, 20) == [[0], [1], [2]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=12),
    st.integers(1, 12),
    st.integers(1, 150),
)
def test_parts_keep_rows_order_and_bounds(rows, max_rows, max_tokens):
    keys = [key for key, _ in rows]
    prompt_lengths, completion_lengths = [10 + key for key in keys], [length for _, length in rows]
    parts = split_by_tokens(prompt_lengths, completion_lengths, keys, max_rows, max_tokens)
    assert [i for part in parts for i in part] == list(range(len(rows)))
    for part in parts:
        prompts = {keys[i]: prompt_lengths[i] - 1 for i in part}
        num_tokens = sum(prompts.values()) + sum(completion_lengths[i] + 1 for i in part)
        assert len(part) <= max_rows and (num_tokens <= max_tokens or len(part) == 1)


# --- Models


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "vocab_size": 90,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "first_k_dense_replace": 1,
}
OVERRIDES = {
    **dict.fromkeys(("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "granitemoe", "glm4_moe", "minimax_m2"), EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), {**EXPERTS, **LATENT}),
    "minicpm3": {**LATENT, "head_dim": 12},
    "seed_oss": {"attention_dropout": 0.0},
}
WINDOW = {
    "sliding_window": 8,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_window_layers": 0,
}
ALLOWED = [
    *((model_type, {}) for model_type in SUPPORTED_LAYERS),
    *((model_type, WINDOW) for model_type, layers in SUPPORTED_LAYERS.items() if SLIDING in layers),
]


def tiny_model(model_type, **overrides):
    """A random model of any type, with weights wide enough for its attention to be sharp."""
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **OVERRIDES.get(model_type, {}), **overrides})
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"  # the only one in float64
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
        model.get_output_embeddings().weight.mul_(4)
    register("sdpa")
    add_completion_scoring(model)
    return model.eval()


def rollouts_of(prompt_lengths=(37, 9, 1), num_generations=3, num_tokens=12):
    """Groups of rollouts with prompts and completions of unequal length."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, 90, (length,), generator=generator).tolist()
        for length in prompt_lengths
        for _ in range(num_generations)
    ]
    prompts = [prompts[i - i % num_generations] for i in range(len(prompts))]
    lengths = torch.randint(1, num_tokens + 1, (len(prompts), 1), generator=generator)
    lengths[1] = num_tokens
    ids = torch.randint(3, 90, (len(prompts), num_tokens), generator=generator)
    return Rollouts.from_prompts(prompts, ids, (torch.arange(num_tokens) < lengths).long(), 0)


def plain_forward(model, rollouts):
    """Padded rows, with the positions that tokens have without the padding: TRL leaves positions out."""
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], 1)
    return model(
        input_ids=torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        completion_scoring=CompletionScoring(rollouts.completion_ids, rollouts.completion_mask),
    )


def values_and_gradients(model, forward):
    model.zero_grad()
    output = forward(model)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, *output.logps.shape, generator=generator).to(output.logps)
    (weights[0] * output.logps + weights[1] * output.entropies).sum().backward()
    return output.logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def errors(model, rollouts=None, packed=None):
    """Packed against plain: largest error of a log-probability, largest relative error of a gradient."""
    rollouts = rollouts_of() if rollouts is None else rollouts
    packed = packed or (lambda model: rollouts.score(model, shares_prefix=True))
    logps, gradients = values_and_gradients(model, lambda model: plain_forward(model, rollouts))
    packed_logps, packed_gradients = values_and_gradients(model, packed)
    assert gradients.keys() == packed_gradients.keys()
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    relative = [
        (gradients[name] - packed_gradients[name]).norm() / gradients[name].norm().clamp(min=1e-6 * total)
        for name in gradients  # the bound: some biases of keys have no gradient but rounding
    ]
    return (logps - packed_logps).abs().max().item(), max(relative).item()


@contextlib.contextmanager
def no_casts():
    """Takes out the casts to float32 that models make inside, in norms and rotary embeddings: they hide errors."""

    def to(self, *args, original=torch.Tensor.to, **kwargs):
        args = [torch.float64 if argument is torch.float32 else argument for argument in args]
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return original(self, *args, **kwargs)

    def cast(self, dtype=None, original=torch.Tensor.type):
        return original(self) if dtype is None else original(self, torch.float64 if dtype is torch.float32 else dtype)

    def softmax(tensor, dim=None, _stacklevel=3, dtype=None, original=torch.nn.functional.softmax):
        return original(tensor, dim=dim)

    def method_softmax(self, dim, dtype=None, original=torch.softmax):
        return original(self, dim)

    with (
        mock.patch.object(torch.Tensor, "to", to),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(torch.Tensor, "type", cast),
        mock.patch.object(torch.Tensor, "softmax", method_softmax),
        mock.patch.object(torch.nn.functional, "softmax", softmax),
    ):
        yield


@pytest.mark.parametrize(("model_type", "options"), ALLOWED, ids=lambda value: value if isinstance(value, str) else "")
def test_values_and_gradients_of_every_allowed_model_type(model_type, options):
    model = tiny_model(model_type, **options)
    assert unsupported_reason(model.config) is None
    logps, gradients = errors(model)
    assert logps <= 1e-5 and gradients <= 1e-5
    model.double()
    with no_casts():
        logps, gradients = errors(model)
    assert logps <= 1e-12 and gradients <= 1e-12


@pytest.mark.parametrize("model_type", ["qwen2_moe", "olmoe", "phimoe"])
def test_models_with_their_window_in_the_mask_alone_are_wrong_and_refused(model_type):
    model = tiny_model(model_type, **{**EXPERTS, **WINDOW})
    assert errors(model)[0] > 0.1
    assert unsupported_reason(model.config) is not None


def test_long_rope_and_tied_embeddings():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    for options in ({"rope_parameters": rope}, {"tie_word_embeddings": True}):
        model = tiny_model("qwen3", **options).double()
        with no_casts():
            assert max(errors(model)) <= 1e-12


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_and_offloaded_activations(use_reentrant):
    model = tiny_model("qwen3", **WINDOW).double()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    rollouts = rollouts_of()

    def packed(model):
        with torch.autograd.graph.save_on_cpu():
            return rollouts.score(model, shares_prefix=True)

    with no_casts():
        assert max(errors(model, rollouts)) <= 1e-12
        assert max(errors(model, rollouts, packed)) <= 1e-12


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(checkpointing):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_model("llama").double(), config).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with no_casts():
        assert max(errors(model)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
def test_low_precision_is_as_close_to_float32_as_the_plain_forward(dtype):
    exact, _ = values_and_gradients(tiny_model("qwen3"), lambda model: plain_forward(model, rollouts_of()))
    model = tiny_model("qwen3").to(dtype)
    differences = []
    for forward in (
        lambda model: plain_forward(model, rollouts_of()),
        lambda model: rollouts_of().score(model, shares_prefix=True),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            logps, _ = values_and_gradients(model, forward)
        differences.append((logps.float() - exact).abs().mean().item())
    plain, packed = differences
    assert 0 < packed < 1.5 * plain


# --- Controls: what the comparison above must not pass


def test_control_positions_that_are_not_restarted_fail():
    def restart_nothing(*args, **kwargs):
        packed = pack(*args, **kwargs)
        packed.position_ids.copy_(torch.arange(packed.position_ids.size(1)))
        return packed

    with mock.patch("dgrpo_trl.rollouts.pack", restart_nothing):
        assert errors(tiny_model("qwen3"))[0] > 0.1


def test_control_completions_that_see_each_other_fail():
    def one_branch(*args, **kwargs):
        packed = pack(*args, **kwargs)
        groups = tuple(Group(g.start, g.prefix_length, (sum(g.branch_lengths),)) for g in packed.layout.groups)
        object.__setattr__(packed, "layout", PrefixLayout(groups))
        return packed

    with mock.patch("dgrpo_trl.rollouts.pack", one_branch):
        assert errors(tiny_model("qwen3"))[0] > 0.1


def test_control_a_detached_prompt_passes_for_its_values_and_fails_for_its_gradients():
    class DetachedPrefix(TorchCPUKernel):
        def backward(self, grad, q, k, v, *args):
            dq, dk, dv = super().backward(grad, q, k, v, *args)
            is_cross = not args[-1].causal  # a branch that sees its prefix
            return (dq, dk * 0, dv * 0) if is_cross else (dq, dk, dv)

    with mock.patch("dgrpo_trl.shared_prefix.attention.choose_kernel", lambda *args: DetachedPrefix()):
        logps, gradients = errors(tiny_model("qwen3"))
    assert logps <= 1e-5 and gradients > 0.1


# --- What is refused


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("gpt2", {}, "'gpt2' is not among those that were tested"),
        ("qwen3_next", {}, "'qwen3_next' is not among"),
        ("qwen2_moe", {**EXPERTS, **WINDOW}, "the sliding window of 'qwen2_moe' was not tested"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layers of type linear_attention"),
        ("llama", {"attention_dropout": 0.1}, "attention dropout of 0.1"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "soft-caps its attention scores"),
    ],
)
def test_unsupported_models(model_type, options, reason):
    config = transformers.AutoConfig.for_model(model_type, **({**SIZES, **options} if options else {}))
    assert reason in unsupported_reason(config)


def test_what_the_kernels_cannot_express_raises_in_the_layer():
    module, tensor = torch.nn.Module(), torch.zeros(1, 2, 3, 8)
    layout = PrefixLayout((Group(0, 1, (2,)),))
    attend = shared_prefix_attention
    with pytest.raises(NotImplementedError, match="`s_aux`"):
        attend(module, tensor, tensor, tensor, layout, s_aux=torch.zeros(2))
    with pytest.raises(NotImplementedError, match="dropout"):
        attend(module, tensor, tensor, tensor, layout, dropout=0.1)
    with pytest.raises(ValueError, match="3 tokens was announced"):
        attend(module, tensor[:, :, :2], tensor, tensor, layout)
    with pytest.raises(ValueError, match="'eager' cannot share prefixes"):
        register("eager")


def test_ordinary_forwards_and_padding_are_left_alone():
    model = tiny_model("qwen3")
    ids = torch.randint(3, 90, (2, 10))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = transformers.AutoModelForCausalLM.from_config(model.config)
    expected.load_state_dict(model.state_dict())
    with mock.patch.dict(
        transformers.AttentionInterface._global_mapping,
        {"sdpa": transformers.integrations.sdpa_attention.sdpa_attention_forward},
    ):
        wanted = expected.eval()(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, wanted)


# --- The comparison while training


def test_the_comparison_runs_as_many_forwards_on_every_rank():
    """Whether a rank has two rollouts of a prompt or not: under ZeRO-3 each forward is a collective call."""
    accelerator = types.SimpleNamespace(device="cpu", mixed_precision="no", gather=lambda tensor: tensor)
    for prompts, completions in (
        ([[1, 2], [1, 2], [3]], [[5], [6], [7]]),
        ([[1, 2], [3]], [[5], [6]]),  # the border of two ranks goes through both groups
        ([[1, 2], [1, 2]], [[], []]),  # all of them truncated
        ([[1, 2]], [[5]]),
    ):
        calls = []

        def states(prompts, completions, shares_prefix, first_position=0, calls=calls):
            calls.append((len(prompts), shares_prefix))
            return torch.ones(sum(map(len, completions)), 4)

        assert ExactnessCheck(accelerator).passes(prompts, completions, states)
        assert calls == [(1, False), (1, False), (2, True)]


# --- Generation


@pytest.mark.parametrize("options", [{}, WINDOW], ids=["full", "window"])
def test_generation_prefills_a_prompt_once_and_gives_the_same_tokens(options):
    plain, shared = tiny_model("qwen3", **options), tiny_model("qwen3", **options)
    share_prefill(shared)
    prompt_ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0)).repeat_interleave(3, 0)
    mask = torch.ones_like(prompt_ids)
    mask[3:, :7] = 0
    # A prompt may also come back further down
    prompt_ids, mask = (torch.cat([tensor, tensor[:1]]) for tensor in (prompt_ids, mask))
    batch_sizes = []
    shared.model.register_forward_pre_hook(
        lambda module, args, kwargs: batch_sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for do_sample in (False, True):
        batch_sizes.clear()
        outputs = []
        for model in (plain, shared):
            torch.manual_seed(0)
            outputs.append(
                model.generate(
                    input_ids=prompt_ids,
                    attention_mask=mask,
                    max_new_tokens=12,
                    do_sample=do_sample,
                    eos_token_id=None,
                )
            )
        assert torch.equal(*outputs)
        assert batch_sizes[0] == (2, 20) and set(batch_sizes[1:]) == {(7, 1)}


# --- Mixtures of experts


def test_the_load_balancing_loss_is_that_of_transformers():
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(30, 4, generator=generator, requires_grad=True) for _ in range(3))
    mask = (torch.rand(3, 10, generator=generator) > 0.3).long()
    expected = load_balancing_loss_func(logits, 4, 2, mask)
    got = load_balancing_loss(router_sums(logits, mask, 2))
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(a, b)


def test_a_packed_row_counts_the_router_as_the_plain_rows_do():
    model, rollouts = tiny_model("qwen3_moe").double(), rollouts_of()
    rollouts.completion_mask[2] = 0  # a row that is not scored is counted all the same
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], 1)
    with no_casts():
        logits = model.model(
            input_ids=torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_router_logits=True,
        ).router_logits
        sums = rollouts.score(model, shares_prefix=True, with_router=True).router_sums
    expected = load_balancing_loss_func(tuple(layer.float() for layer in logits), 4, 2, mask).double()
    torch.testing.assert_close(load_balancing_loss(sums), expected, rtol=1e-6, atol=0)
