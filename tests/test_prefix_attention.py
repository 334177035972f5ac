"""Attention over packed rows against its definition, and the kernels that compute it."""

import importlib
import inspect
import logging
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from reference import attention as naive_attention
from torch.library import Library
from torch.nn.attention import current_flash_attention_impl
from torch.torch_version import TorchVersion

from dgrpo_trl.shared_prefix import (
    BACKENDS,
    Backend,
    Group,
    MathKernel,
    PrefixLayout,
    Sequences,
    attention,
    check_backend,
    check_kernel,
    choose_kernel,
    packed_attention,
)
from dgrpo_trl.shared_prefix.kernels import TorchCPUKernel, TorchFlashKernel


CPU = torch.device("cpu")
LAYOUT = PrefixLayout((Group(0, 37, (5, 1, 9)), Group(52, 0, (3,)), Group(55, 11, (12, 30))))


def random_qkv(layout, dtype=torch.float64, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(layout.num_tokens, heads, head_dim, generator=generator, dtype=dtype, requires_grad=True)
        for heads in (4, 2, 2)
    ]


@pytest.mark.parametrize("window", [None, 1, 2, 4, 8, 16, 40, 100])
@pytest.mark.parametrize("kernel", [MathKernel(), TorchCPUKernel()], ids=lambda kernel: type(kernel).__name__)
def test_attention_and_gradients_equal_the_definition(kernel, window):
    qkv = random_qkv(LAYOUT)
    out = packed_attention(*qkv, LAYOUT, 0.3, window, kernel)
    expected = naive_attention(*qkv, LAYOUT, 0.3, window)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    pairs = zip(torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_attention_passes_gradcheck():
    layout = PrefixLayout((Group(0, 5, (2, 3)),))

    def attention(q, k, v):
        return packed_attention(q, k, v, layout, 0.3, None, TorchCPUKernel())

    assert torch.autograd.gradcheck(attention, random_qkv(layout, head_dim=3))


@pytest.mark.parametrize("kernel", [MathKernel(), TorchCPUKernel()], ids=lambda kernel: type(kernel).__name__)
def test_bfloat16_attention_is_as_close_as_rounding_allows(kernel):
    qkv = random_qkv(LAYOUT)
    expected = naive_attention(*qkv, LAYOUT, 0.3, None)
    out = packed_attention(*(x.bfloat16() for x in qkv), LAYOUT, 0.3, None, kernel)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().mean() < 0.01 * expected.abs().mean()


@pytest.mark.parametrize("tile", [16, 17, 1024])
def test_the_math_kernel_does_not_depend_on_its_tiles(tile):
    kernel = MathKernel(max_scores=tile * 4 * 37)
    check_kernel(kernel, CPU, torch.float64, 8)
    qkv = random_qkv(LAYOUT)
    out = packed_attention(*qkv, LAYOUT, 0.3, 8, kernel)
    torch.testing.assert_close(out, naive_attention(*qkv, LAYOUT, 0.3, 8), rtol=0, atol=1e-13)


def test_parts_merged_in_chunks_are_the_same_bits(monkeypatch):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        qkv = random_qkv(LAYOUT, dtype)
        whole = packed_attention(*qkv, LAYOUT, 0.3, 8, TorchCPUKernel())
        for tokens in (1, 7):
            monkeypatch.setattr(attention, "MERGED_ELEMENTS", tokens * 4 * 8)
            assert torch.equal(packed_attention(*qkv, LAYOUT, 0.3, 8, TorchCPUKernel()), whole)
        monkeypatch.undo()


@pytest.fixture
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_no_mask_and_no_copy_of_the_prompt_is_made(one_thread):  # the kernel has a buffer for each thread
    large = {}
    for num_branches in (2, 8):
        layout = PrefixLayout((Group(0, 4096, (8,) * num_branches),))
        qkv = random_qkv(layout, torch.float32, head_dim=16)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            out = packed_attention(*qkv, layout, 0.3, None, TorchCPUKernel())
            out.sum().backward()
        sizes = [event.self_cpu_memory_usage for event in profile.events()]
        # Outputs and gradients are as large as the queries; 8 copies of the prompt's keys would be 4 times that
        assert max(sizes) < 1.5 * qkv[0].numel() * 4
        large[num_branches] = sum(size >= 4096 * 2 * 16 * 4 for size in sizes)
    assert large[2] == large[8]  # nor is there one copy after the other


# --- FlashAttention by PyTorch's operators, here with implementations for the CPU


@dataclass
class Handle:
    library: Library | None

    def remove(self):
        self.library = None


@pytest.fixture
def implementation():
    """A name for PyTorch's switch: the two operators then compute by the definition, on the CPU."""
    math = MathKernel()

    def sequences(arguments, window_size_left, window_size_right):
        q_lengths, k_lengths = (tuple(offsets.diff().tolist()) for offsets in arguments[:2])
        max_q, max_k, dropout_p, is_causal = arguments[2:]
        assert (max_q, max_k, dropout_p) == (max(q_lengths), max(k_lengths), 0)
        assert all(offsets.dtype == torch.int32 for offsets in arguments[:2])
        if window_size_left is None:
            return Sequences(q_lengths, k_lengths, is_causal)
        assert not is_causal and window_size_left >= 0 and window_size_right in (-1, 0)
        return Sequences(q_lengths, k_lengths, window_size_right == 0, window_size_left)

    def forward(q, k, v, *arguments, scale=None, window_size_left=None, window_size_right=None):
        *arguments, return_debug_mask = arguments
        assert not return_debug_mask and q.size(-1) % 8 == 0
        out, lse = math.forward(q, k, v, scale, sequences(arguments, window_size_left, window_size_right))
        state = torch.zeros(2, dtype=torch.uint64)
        return out, lse, state, state[0].clone(), q.new_empty(0)

    def backward(grad, q, k, v, out, lse, *arguments, scale=None, window_size_left=None, window_size_right=None):
        *arguments, rng_state, unused = arguments
        assert all(tensor.is_contiguous() for tensor in (grad, lse)) and rng_state.dtype == torch.uint64
        return math.backward(grad, q, k, v, out, lse, scale, sequences(arguments, window_size_left, window_size_right))

    def activate():
        library = Library("aten", "IMPL", "CPU")
        library.impl("_flash_attention_forward", forward)
        library.impl("_flash_attention_backward", backward)
        return Handle(library)

    torch.nn.attention.register_flash_attention_impl("on the CPU", register_fn=activate)
    return "on the CPU"


@pytest.mark.parametrize("head_dim", [8, 12])  # the second is filled up to 16
@pytest.mark.parametrize("window", [None, 8])
def test_attention_by_pytorchs_flash_operators_equals_the_definition(implementation, window, head_dim):
    kernel = TorchFlashKernel(implementation)
    check_kernel(kernel, CPU, torch.float64, head_dim)
    qkv = random_qkv(LAYOUT, head_dim=head_dim)
    out = packed_attention(*qkv, LAYOUT, 0.3, window, kernel)
    expected = naive_attention(*qkv, LAYOUT, 0.3, window)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    pairs = zip(torch.autograd.grad(out.sum(), qkv), torch.autograd.grad(expected.sum(), qkv), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_pytorchs_switch_is_on_for_packed_attention_alone(implementation):
    kernel, qkv = TorchFlashKernel(implementation), random_qkv(LAYOUT)
    seen = []
    for name in ("forward", "backward"):
        method = getattr(kernel, name)

        def recording(*args, method=method):
            seen.append(current_flash_attention_impl())
            return method(*args)

        setattr(kernel, name, recording)
    packed_attention(*qkv, LAYOUT, 0.3, None, kernel).sum().backward()
    assert len(seen) == 6 and set(seen) == {implementation}  # the row and the two groups with a prefix, both ways
    assert current_flash_attention_impl() is None
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):  # nothing is left on the CPU
        packed_attention(*qkv, LAYOUT, 0.3, None, TorchFlashKernel())


def test_pytorchs_switch_goes_back_to_what_it_was(implementation):
    torch.nn.attention.register_flash_attention_impl("the user's", register_fn=lambda: Handle(None))
    torch.nn.attention.activate_flash_attention_impl("the user's")
    try:
        with pytest.raises(KeyError), TorchFlashKernel(implementation).active():
            raise KeyError
        assert current_flash_attention_impl() == "the user's"
        with pytest.raises(ValueError, match="Unknown"), TorchFlashKernel("missing").active():
            pass
        assert current_flash_attention_impl() == "the user's"
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def test_pytorchs_flash_operators_have_the_arguments_that_are_passed():
    lengths = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    forward, backward = (
        getattr(torch.ops.aten, f"_flash_attention_{name}").default._schema for name in ("forward", "backward")
    )
    for schema, names in (
        (forward, ["query", "key", "value", *lengths, "return_debug_mask"]),
        (backward, ["grad_out", "query", "key", "value", "out", "logsumexp", *lengths, "rng_state", "unused"]),
    ):
        assert [argument.name for argument in schema.arguments if not argument.kwarg_only] == names
        options = {argument.name for argument in schema.arguments if argument.kwarg_only}
        assert options >= {"scale", "window_size_left", "window_size_right"}
    assert [result.name for result in forward.returns[:2]] == ["output", "softmax_logsumexp"]
    assert len(backward.returns) == 3
    # And their shapes, with windows and without
    q, k, v = (torch.empty(40, heads, 8, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2))
    for sequences in (
        Sequences((33, 7), (33, 7), causal=True),
        Sequences((33, 7), (33, 7), causal=True, left=8),
        Sequences((40,), (40,), causal=False, left=5),
    ):
        out, lse = TorchFlashKernel().forward(q, k, v, 0.3, sequences)
        assert out.shape == q.shape and lse.shape == (4, 40)
        gradients = TorchFlashKernel().backward(out, q, k, v, out, lse, 0.3, sequences)
        assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(("name", "package"), [("FA3", "flash_attn_interface"), ("FA4", "flash_attn.cute.interface")])
def test_the_packages_take_the_place_of_both_operators(monkeypatch, name, package):
    overrides = {}

    class RecordingLibrary:
        def __init__(self, *args):
            pass

        def impl(self, operator, function, *args):
            overrides[operator] = function

    module = SimpleNamespace(_flash_attn_fwd=None, _flash_attn_bwd=None)
    for part in (package, package.rpartition(".")[0], package.partition(".")[0]):
        monkeypatch.setitem(sys.modules, part, module)
    monkeypatch.setattr("torch.nn.attention._fa4._fa4_import_module", importlib.import_module)  # without its cache
    monkeypatch.setattr(f"torch.nn.attention._{name.lower()}.Library", RecordingLibrary)
    operators = Library("flash_attn_3", "FRAGMENT")  # what importing the package defines
    operators.define("fwd() -> ()")
    operators.define("bwd() -> ()")
    with TorchFlashKernel(name).active():
        assert current_flash_attention_impl() == name
    assert current_flash_attention_impl() is None
    for operator in ("_flash_attention_forward", "_flash_attention_backward"):
        schema = getattr(torch.ops.aten, operator).default._schema
        passed = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        parameters = inspect.signature(overrides[operator]).parameters
        assert list(parameters)[: len(passed)] == passed
        assert {"scale", "window_size_left", "window_size_right"} <= set(parameters)


# --- The choice of a backend


@pytest.fixture
def table(monkeypatch):
    """The table of backends, to be changed by `table(name, make)`: the backend of this name is for CPUs then."""
    choose_kernel.cache_clear()

    def replace(name, make):
        monkeypatch.setitem(BACKENDS, name, Backend("CPUs", lambda device: True, make))

    yield replace
    choose_kernel.cache_clear()


class BrokenKernel(MathKernel):
    def backward(self, *args):
        dq, dk, dv = super().backward(*args)
        return dq, dk * 1.1, dv


def test_a_kernel_that_is_wrong_is_not_used(table):
    with pytest.raises(RuntimeError, match="its dk is off by"):
        check_kernel(BrokenKernel(), CPU, torch.float32, 8)
    table("torch", lambda *args: BrokenKernel())
    assert type(choose_kernel("auto", CPU, torch.float32, 8)) is MathKernel
    with pytest.raises(ValueError, match="`shared_prefix_backend` is 'torch'.*its dk is off by.*Set it to 'auto'"):
        choose_kernel("torch", CPU, torch.float32, 8)


def test_a_backend_is_added_by_its_line_in_the_table(table):
    table("mine", lambda device, dtype, head_dim: MathKernel(max_scores=64))
    check_backend("mine")
    assert choose_kernel("mine", CPU, torch.float32, 8).max_scores == 64


def test_auto_warns_once_which_faster_backends_are_missing(table, caplog):
    def missing(*args):
        raise ImportError("flash-attn is not installed")

    caplog.set_level(logging.INFO, logger="dgrpo_trl")
    choose_kernel("auto", CPU, torch.float32, 64)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    caplog.clear()
    table("flash_attention_3", missing)
    table("flash_attention_4", missing)
    for _ in range(2):
        assert type(choose_kernel("auto", CPU, torch.float32, 8)) is TorchCPUKernel
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "by the backend 'torch' for torch.float32 on cpu" in record.getMessage()
    assert "flash_attention_3, flash_attention_4: flash-attn is not installed" in record.getMessage()


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (8, ["torch", "math"]),
        (9, ["flash_attention_3", "flash_attention_4", "torch", "math"]),
        (10, ["flash_attention_4", "torch", "math"]),
        (12, ["torch", "math"]),
    ],
)
def test_auto_tries_what_is_made_for_the_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    assert [name for name, backend in BACKENDS.items() if backend.fits(torch.device("cuda", 0))] == expected


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "message"),
    [
        ("flash_attention_3", torch.bfloat16, 64, "flash-attn-3 is not installed"),
        ("flash_attention_4", torch.bfloat16, 64, "flash-attn-4 is not installed"),
        ("flash_attention_3", torch.float32, 64, "float16 or bfloat16 is needed: set `bf16: true`"),
        ("torch", torch.float32, 64, "float16 or bfloat16 is needed: set `bf16: true`"),
        ("torch", torch.bfloat16, 512, "heads of at most 256"),
    ],
)
def test_what_a_backend_lacks_is_said_with_what_to_do(monkeypatch, backend, dtype, head_dim, message):
    for package in ("flash_attn_interface", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("torch.nn.attention._fa4._fa4_import_module", importlib.import_module)  # without its cache
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.0"))  # an older one lacks more
    with pytest.raises((ImportError, ValueError), match=message):
        BACKENDS[backend].make(torch.device("cuda", 0), dtype, head_dim)


def test_flash_attention_4_needs_a_pytorch_whose_backward_has_windows(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    with pytest.raises(ValueError, match="PyTorch 2.12 or newer is needed: 2.11.0"):
        BACKENDS["flash_attention_4"].make(torch.device("cuda", 0), torch.bfloat16, 64)


def test_a_backend_for_another_device_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="`shared_prefix_backend` is 'flash_attention_3'.*it is for GPUs of.*9.0"):
        choose_kernel("flash_attention_3", CPU, torch.float32, 8)
    with pytest.raises(ValueError, match="'flash_attention_2'.*built into PyTorch: set 'torch'"):
        choose_kernel("flash_attention_2", CPU, torch.float32, 8)
    with pytest.raises(ValueError, match="'triton'.*Choose one of auto, flash_attention_3"):
        check_backend("triton")


def test_the_cpu_uses_pytorchs_kernel():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert type(choose_kernel("auto", CPU, dtype, 64)) is TorchCPUKernel


def cuda_kernel(backend, head_dim):
    """The kernel of a backend on the first GPU; skips where the GPU is another or the package is not installed."""
    device = torch.device("cuda", 0)
    if not BACKENDS[backend].fits(device):
        pytest.skip(f"{backend} is for {BACKENDS[backend].runs_on}")
    try:
        BACKENDS[backend].make(device, torch.bfloat16, head_dim)
    except ImportError as error:
        pytest.skip(str(error))
    kernel = choose_kernel(backend, device, torch.bfloat16, head_dim)
    with kernel.active():
        assert current_flash_attention_impl() == getattr(kernel, "implementation", None)
    return kernel


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_attention_equals_the_definition(backend, window):
    kernel = cuda_kernel(backend, 64)
    qkv = random_qkv(LAYOUT, head_dim=64)
    expected = naive_attention(*qkv, LAYOUT, 0.125, window)
    rounded = [x.detach().cuda().bfloat16().requires_grad_() for x in qkv]
    out = packed_attention(*rounded, LAYOUT, 0.125, window, kernel)
    gradients = torch.autograd.grad(out, rounded, torch.ones_like(out))
    wanted = torch.autograd.grad(expected, qkv, torch.ones_like(expected))
    for a, b in zip((out, *gradients), (expected, *wanted), strict=True):
        assert (a.cpu().double() - b).norm() < 0.02 * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 1024])
@pytest.mark.parametrize("heads", [(16, 8), (64, 8)], ids=["Qwen3-1.7B", "Qwen3-32B"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "math"])
def test_cuda_attention_over_long_prompts_equals_the_definition(backend, heads, window):
    kernel = cuda_kernel(backend, 128)
    layout = PrefixLayout((Group(0, 8192, (700, 1, 300)), Group(9193, 500, (2000,))))
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = [
        torch.randn(layout.num_tokens, n, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
        for n in (heads[0], heads[1], heads[1])
    ]
    results = []
    for tensors, candidate in ((qkv, kernel), ([x.float() for x in qkv], MathKernel())):
        tensors = [x.requires_grad_() for x in tensors]
        out = packed_attention(*tensors, layout, 128**-0.5, window, candidate)
        results.append((out, *torch.autograd.grad(out, tensors, torch.ones_like(out))))
    for got, wanted in zip(*results, strict=True):
        assert (got.float() - wanted).norm() < 0.02 * wanted.norm()
