"""Whole training steps, and their parts, on a CUDA device that computes on the CPU: they give what the CPU gives.

Each has controls: a tensor of the wrong device or dtype at that place, which must not get through.
"""

from dataclasses import replace

import pytest
import reference
import torch
from accelerate.state import AcceleratorState
from conftest import given_rollouts
from fake_cuda import CUDA, aten, backward, fake_cuda
from test_prefix_attention import LAYOUT, random_qkv
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainerCallback

from dgrpo_trl import DGRPOTrainer, rollouts, teacher, teacher_term, trainer
from dgrpo_trl.losses import Distillation, LMHead, token_terms
from dgrpo_trl.shared_prefix import Sequences, kernels, packed_attention
from dgrpo_trl.shared_prefix.kernels import TorchFlashKernel


@pytest.fixture
def fresh_state():
    """Makes the next trainer look for its device anew."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)

    reset()
    yield reset
    reset()


@pytest.fixture
def device(fresh_state):
    with fake_cuda() as mode:
        yield mode


# --- The device


def numbers(*shape, dtype=torch.float32, device=CUDA):
    return torch.ones(shape, dtype=dtype, device=device)


MIXES = {
    "a sum": lambda: numbers(3) + numbers(3, device="cpu"),
    "a product of matrices": lambda: numbers(3, 3) @ numbers(3, 3, device="cpu"),
    "a product of two dtypes": lambda: numbers(3, 3) @ numbers(3, 3, dtype=torch.bfloat16),
    "a number that is stacked": lambda: torch.stack([numbers(), numbers(device="cpu")]),
    "an index of the device into the CPU": lambda: numbers(3, device="cpu")[numbers(2, dtype=torch.int64)],
    "a mask of the device into the CPU": lambda: numbers(3, device="cpu")[numbers(3, dtype=torch.bool)],
    "values that are put": lambda: numbers(3).index_put_((torch.tensor([1]),), numbers(1, device="cpu")),
    "a gather": lambda: numbers(3, 3).gather(1, torch.zeros(3, 1, dtype=torch.int64)),
    "a scatter": lambda: numbers(3).masked_scatter(numbers(3, dtype=torch.bool), numbers(3, device="cpu")),
    "a choice": lambda: torch.where(numbers(3, dtype=torch.bool), numbers(3), numbers(3, device="cpu")),
    "an embedding": lambda: torch.nn.functional.embedding(torch.tensor([1]), numbers(3, 3)),
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_that_cuda_refuses_are_refused(device, mix):
    with pytest.raises(RuntimeError, match="on the same device, but found|same dtype"):
        MIXES[mix]()


def test_mixes_that_cuda_takes_are_taken(device):
    values = numbers(3)
    assert (values * torch.tensor(2.0)).tolist() == [2.0] * 3
    assert values[torch.tensor([0, 2])].device == CUDA and values[torch.tensor([True, False, True])].device == CUDA
    values[torch.tensor([0])] = torch.tensor(5.0)
    assert values.copy_(torch.tensor([5.0, 1.0, 1.0])).tolist() == [5.0, 1.0, 1.0]


# --- Attention


WINDOWS = {
    "causal": Sequences((33, 7), (33, 7), causal=True),
    "causal with a window": Sequences((33, 7), (33, 7), causal=True, left=8),
    "other keys": Sequences((7,), (33,), causal=False),
    "other keys with a window": Sequences((7,), (33,), causal=False, left=20),
}


def flash_tensors(sequences, device, dtype=torch.bfloat16):
    num_queries, num_keys = sum(sequences.q_lengths), sum(sequences.k_lengths)
    generator = torch.Generator().manual_seed(0)
    shapes = (num_queries, 4, 8), (num_keys, 2, 8), (num_keys, 2, 8)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]


def operators(tensors, sequences):
    """Shapes and dtypes of what both operators return, and of what the kernel makes of it."""
    out, lse = TorchFlashKernel().forward(*tensors, 0.3, sequences)
    gradients = TorchFlashKernel().backward(out, *tensors, out, lse, 0.3, sequences)
    return [(tuple(tensor.shape), tensor.dtype, tensor.device.type) for tensor in (out, lse, *gradients)]


@pytest.fixture
def fresh_offsets():
    """They are cached, and those of one kind of device are none of another."""
    kernels._offsets.cache_clear()
    yield kernels._offsets.cache_clear
    kernels._offsets.cache_clear()


@pytest.mark.parametrize("sequences", WINDOWS.values(), ids=WINDOWS)
def test_the_operators_of_the_device_return_what_pytorch_says_that_they_do(fresh_offsets, sequences):
    with FakeTensorMode():
        expected = operators(flash_tensors(sequences, CUDA), sequences)
    fresh_offsets()
    with fake_cuda():
        assert operators(flash_tensors(sequences, CUDA), sequences) == expected
    assert expected[1] == ((4, sum(sequences.q_lengths)), torch.float32, "cuda")


@pytest.mark.parametrize("head_dim", [8, 12])  # the second is filled up to 16
@pytest.mark.parametrize("window", [None, 8])
def test_attention_on_the_device_equals_the_definition(device, window, head_dim):
    rounded = [x.detach().bfloat16() for x in random_qkv(LAYOUT, head_dim=head_dim)]
    exact = [x.double().requires_grad_() for x in rounded]
    expected = reference.attention(*exact, LAYOUT, 0.3, window)
    wanted = torch.autograd.grad(expected.sum(), exact)
    leaves = [x.to(CUDA).requires_grad_() for x in rounded]
    out = packed_attention(*leaves, LAYOUT, 0.3, window, TorchFlashKernel())
    backward(out.sum())
    for got, exact in zip((out, *(x.grad for x in leaves)), (expected, *wanted), strict=True):
        assert got.device == CUDA and got.dtype == torch.bfloat16
        assert (got.cpu().double() - exact).norm() < 0.02 * exact.norm()
    # The row, then each group with a prefix: at once, or with a window branch by branch
    assert device.calls[aten._flash_attention_forward.default] == (3 if window is None else 6)
    assert device.calls[aten._flash_attention_backward.default] == (3 if window is None else 6)


def with_offsets(monkeypatch, change):
    """The kernels get offsets that are changed."""
    original = kernels._offsets
    monkeypatch.setattr(kernels, "_offsets", lambda *args: change(original(*args)))


WRONG_ARGUMENTS = {
    "offsets on the CPU": (lambda offsets: offsets.cpu(), torch.bfloat16),
    "offsets of 64 bits": (lambda offsets: offsets.long(), torch.bfloat16),
    "offsets of other sequences": (lambda offsets: offsets[:-1], torch.bfloat16),
    "float32": (lambda offsets: offsets, torch.float32),
}


@pytest.mark.parametrize(("change", "dtype"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments_of_the_operators_are_refused(device, monkeypatch, change, dtype):
    with_offsets(monkeypatch, change)
    with pytest.raises((RuntimeError, AssertionError)):
        TorchFlashKernel().forward(*flash_tensors(WINDOWS["causal"], CUDA, dtype), 0.3, WINDOWS["causal"])


# --- The loss


def loss_inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (11, 8), "weight": (40, 8), "teacher": (11, 6), "teacher_weight": (40, 6)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return tensors, torch.randint(40, (11,), generator=generator)


def terms_of(tensors, targets, kind):
    distillation = Distillation(tensors["teacher"], LMHead(tensors["teacher_weight"]), kind, 0.3)
    return token_terms(tensors["hidden"], LMHead(tensors["weight"]), targets, 0.9, distillation)


def weighted(terms):
    weights = torch.linspace(-1, 1, 11, device=terms.logps.device)
    return (terms.logps * weights + terms.divergences * weights.flip(0)).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_loss_and_gradients_on_the_device_equal_the_definition(device, kind, dtype):
    tensors, targets = loss_inputs(dtype)
    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    logits = reference.logits(exact["hidden"], exact["weight"], temperature=0.9)
    teacher_logits = reference.logits(exact["teacher"], exact["teacher_weight"], temperature=0.9).detach()
    logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    divergences = reference.divergence(logits, teacher_logits, kind, 0.3)
    weights = torch.linspace(-1, 1, 11, dtype=torch.float64)
    wanted = torch.autograd.grad(
        (logps * weights + divergences * weights.flip(0)).sum(), [exact["hidden"], exact["weight"]]
    )
    on_device = {
        name: tensor.to(CUDA).requires_grad_(name in ("hidden", "weight")) for name, tensor in tensors.items()
    }
    terms = terms_of(on_device, targets.to(CUDA), kind)
    backward(weighted(terms))
    got = terms.logps, terms.divergences, on_device["hidden"].grad, on_device["weight"].grad
    for value, expected in zip(got, (logps, divergences, *wanted), strict=True):
        assert value.device == CUDA
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        assert (value.cpu().double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("name", ["weight", "teacher", "teacher_weight", "targets"])
def test_a_loss_whose_tensors_are_apart_is_refused(device, name):
    tensors, targets = loss_inputs(torch.float32)
    tensors = {key: tensor if key == name else tensor.to(CUDA) for key, tensor in tensors.items()}
    with pytest.raises(RuntimeError, match="on the same device, but found"):
        terms_of(tensors, targets if name == "targets" else targets.to(CUDA), "reverse_kl")


# --- The trainer: what is sampled, packed, scored, regrouped, logged and drawn

PRECISIONS = {
    "float32": (torch.float32, {}),
    "float32 weights, bf16 autocast": (torch.float32, {"bf16": True}),
    "bf16 weights": (torch.bfloat16, {}),
}
OPTIONS = {
    "Qwen3": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},  # groups over micro-batches
    "Llama": {"max_tokens_per_micro_batch": 60, "gradient_checkpointing": True, "beta": 0.1},
}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.first is None:
            self.first = torch.cat([p.grad.detach().cpu().double().flatten() for p in model.parameters()])


def train(make_trainer, make_model, tokenizer, folder, kind="Qwen3", dtype=torch.float32, **options):
    """Logs and gradients of a step, by rollouts that are given."""
    student, saved = make_model(kind, num_hidden_layers=2).to(dtype), str(folder / "student")
    student.save_pretrained(saved)  # a reference model is loaded by name
    tokenizer.save_pretrained(saved)
    run = make_trainer(
        DGRPOTrainer,
        saved,
        teacher_model=make_model(kind, seed=1).to(dtype),
        model_init_kwargs={"dtype": dtype},
        **{
            "max_steps": 1,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "rollout_func": given_rollouts(tokenizer),
            "shared_prefix": "on",
            "log_completions": True,
            "log_heatmaps": True,
            **options,
        },
    )
    gradients = Gradients()
    run.add_callback(gradients)
    run.train()
    return run.state.log_history[0], gradients.first


@pytest.mark.parametrize(("dtype", "options"), PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_step_on_the_device_is_that_on_the_cpu(
    fresh_state, make_trainer, make_model, tokenizer, tmp_path, kind, dtype, options
):
    common = (make_trainer, make_model, tokenizer, tmp_path, kind, dtype)
    options = {**options, **OPTIONS[kind]}
    expected, wanted = train(*common, **options)
    fresh_state()
    with fake_cuda() as device:
        logs, gradients = train(*common, use_cpu=False, **options)
    is_rounded = dtype == torch.bfloat16 or "bf16" in options
    assert (gradients - wanted).norm() < (0.1 if is_rounded else 1e-4) * wanted.norm()
    for name in ("loss", "entropy", "distill/divergence", "distill/divergence_last_quarter", "distill/grpo_loss"):
        assert logs[name] == pytest.approx(expected[name], rel=0.05 if is_rounded else 1e-4, abs=1e-3)
    assert (device.calls[aten._flash_attention_backward.default] > 0) == is_rounded


def test_rollouts_are_sampled_scored_and_drawn_on_the_device(device, make_trainer, make_model, tokenizer, tmp_path):
    logs, gradients = train(
        make_trainer, make_model, tokenizer, tmp_path, use_cpu=False, bf16=True, rollout_func=None, max_steps=2
    )
    assert logs["completions/max_length"] > 0 and gradients.norm() > 0
    assert len(list(tmp_path.glob("out/**/step_*.html"))) == 2


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_checkpoints_on_the_host_change_no_gradient(
    fresh_state, make_trainer, make_model, tokenizer, tmp_path, max_tokens
):
    options = {"gradient_checkpointing": True, "max_tokens_per_micro_batch": max_tokens, "bf16": True}
    pinned, gradients = [], []
    for kwargs in ({}, {"offload": True}):
        fresh_state()
        with fake_cuda() as device:
            _, gradient = train(
                *(make_trainer, make_model, tokenizer, tmp_path),
                **{"use_cpu": False, "gradient_checkpointing_kwargs": {"use_reentrant": False, **kwargs}, **options},
            )
        gradients.append(gradient)
        pinned.append(device.pinned)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    size = 2 * 32  # layers x hidden
    assert pinned[0] == 0 and pinned[1] % size == 0
    # In parts each of them has its prompt, and copies once more when it is repeated
    assert (pinned[1] == 114 * size) if max_tokens is None else (pinned[1] > 2 * 114 * size)


def test_a_step_that_is_not_finite_is_skipped_on_the_device(
    device, make_trainer, make_model, tokenizer, tmp_path, monkeypatch, caplog
):
    def corrupt(states):
        return torch.full_like(states, float("nan"))

    elsewhere(monkeypatch, "teacher's states", change=corrupt)
    with pytest.raises(
        RuntimeError, match="1 consecutive optimizer steps were not finite; the last: the teacher term"
    ):
        train(make_trainer, make_model, tokenizer, tmp_path, use_cpu=False, max_nonfinite_steps=1)
    assert "divergence to the teacher), whose prompt ends" in caplog.text


def to_host(tensor):
    return tensor.cpu()


def changed(values, names, change):
    """A tensor, or a micro-batch or dataclass with some of its tensors, changed."""
    if isinstance(values, torch.Tensor):
        return change(values)
    if isinstance(values, dict):
        return {**values, **{name: change(values[name]) for name in names}}
    if isinstance(values, list):
        return [changed(value, names, change) for value in values]
    return replace(values, **{name: change(getattr(values, name)) for name in names})


# Where a function is found, and which of its results' tensors change
PLACES = {
    "positions of a packed row": (rollouts, "pack", ("position_ids",)),
    "places of the states that predict": (rollouts, "pack", ("state_index",)),
    "teacher's completions": (rollouts.Rollouts, "from_prompts", ("completion_ids",)),
    "teacher's states": (teacher.Teacher, "hidden_states", ()),
    "teacher's LM head": (teacher, "lm_head", ("weight",)),
    "masks of regrouped rows": (trainer, "regroup", ("completion_mask",)),
    "mask of the loss": (teacher_term, "loss_mask", ()),
    "offsets of sequences": (kernels, "_offsets", ()),
}


def elsewhere(monkeypatch, place, change=to_host):
    """Lets a function return tensors that are changed."""
    owner, name, names = PLACES[place]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: changed(original(*args, **kwargs), names, change))


@pytest.mark.parametrize("place", PLACES)
def test_a_step_with_a_tensor_elsewhere_is_refused(
    device, make_trainer, make_model, tokenizer, tmp_path, monkeypatch, place
):
    elsewhere(monkeypatch, place)
    with pytest.raises(RuntimeError, match="on the same device, but found"):
        train(make_trainer, make_model, tokenizer, tmp_path, use_cpu=False, bf16=True, shared_prefix_backend="torch")
