"""A CUDA device that is not there: its tensors are computed on the CPU, and refuse to meet tensors of the CPU.

Within [`fake_cuda`], tensors are made on, and moved to, the device `cuda:0`. Every operator checks, as CUDA does,
that its tensors are on one device, and then runs on the CPU. So code for a GPU runs with true values, and a mix-up of
devices raises where it happens. Operators that only CUDA has are in `CUDA_ONLY`, with what they ask of arguments.

The engine of autograd needs the true device, so [`backward`] walks the graph instead.
"""

import ctypes
import os
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from dgrpo_trl.fused import Fused
from dgrpo_trl.shared_prefix import MathKernel, Sequences


aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parent.parent
COPIES = (aten.copy_.default, aten._foreach_copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
TAKES_NO_NUMBER = (aten.cat.default, aten.stack.default)


class FakeCudaTensor(Tensor):
    """Says that it is on `cuda:0`, and holds its values in `host`, a tensor on the CPU."""

    @staticmethod
    def __new__(cls, host: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, host.size(), host.stride(), host.storage_offset(), dtype=host.dtype, device=CUDA
        )

    def __init__(self, host: Tensor):
        self.host = host
        self.is_on_host = False  # as a parameter may be, whose data was replaced

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.is_on_host else CUDA

    @property
    def data(self) -> Tensor:
        return self.host.detach() if self.is_on_host else self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.is_on_host = value.device.type == "cpu"
        self.host = getattr(value, "host", value)

    def __repr__(self):
        return f"FakeCudaTensor({self.host})"

    def tolist(self):  # is refused to subclasses
        return self.cpu().tolist()


class FakeCudaMode(TorchDispatchMode):
    """What happens on the device while it is active.

    Its random numbers come from a generator of its own.

    Attributes:
        calls (`Counter`):
            Operators that ran on the device.
        waits (`Counter`):
            Lines of this project that read values from the device, each of which waits for it.
        pinned (`int`):
            Elements of pinned memory that were asked for.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.waits = Counter(), Counter()
        self.pinned = 0
        self.random_state = torch.Generator().manual_seed(0).get_state()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, self)

    @contextmanager
    def own_generator(self) -> Iterator[None]:
        state = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        try:
            yield
        finally:
            self.random_state = torch.get_rng_state()
            torch.set_rng_state(state)

    def set_random_state(self, state: Tensor, *_) -> None:
        self.random_state = state


def run(func, args, kwargs, mode: FakeCudaMode | None = None):
    """Runs an operator on the CPU, and says that its results are where CUDA would have put them."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device, is_pinned = common_device(func, args, tensors), False
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        if func is aten._to_copy.default and device.type == "meta":
            device = CUDA  # "cuda" without an index: PyTorch asks the guard, which is that of `meta`
        kwargs = {**kwargs, "device": torch.device("cpu")}
        is_pinned = kwargs.pop("pin_memory", False)
    copies = (aten._to_copy.default, aten.copy_.default)
    is_read = func is aten._local_scalar_dense.default or (func in copies and device.type == "cpu")
    is_from_cuda = any(tensor.device == CUDA for tensor in tensors)
    if mode is not None and is_from_cuda and is_read:
        mode.waits[calling_line()] += 1
    if mode is not None and device.type == "cuda":
        mode.calls[func] += 1
    real_args, real_kwargs = tree_map_only(FakeCudaTensor, lambda tensor: tensor.host, (args, kwargs))
    with mode.own_generator() if mode is not None and device.type == "cuda" else nullcontext():
        outputs = CUDA_ONLY.get(func, func)(*real_args, **real_kwargs)
    if device.type != "cuda":
        if mode is not None and is_pinned:
            mode.pinned += outputs.numel()
        return outputs
    wrapped = tree_map_only(Tensor, lambda tensor: FakeCudaTensor(tensor), outputs)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def common_device(func, args, tensors: list[Tensor]) -> torch.device:
    """Where the results of an operator are, unless it is told.

    A number on the CPU may meet tensors of any device, but is not put together with them; an index on the CPU may
    choose from any, one on the device not from the CPU.
    """
    if not tensors:
        return torch.device("cpu")
    if func in COPIES:
        return tensors[0].device
    if func in INDEXING and args[0].device == CUDA:
        tensors = [leaf for leaf in tree_leaves((args[0], args[2:])) if isinstance(leaf, Tensor)]
    devices = {
        tensor.device for tensor in tensors if tensor.dim() > 0 or tensor.device == CUDA or func in TAKES_NO_NUMBER
    }
    if len(devices) > 1:
        found = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors of {func} to be on the same device, but found {found}")
    return devices.pop() if devices else tensors[0].device


def calling_line() -> str:
    frames = [frame for frame in traceback.extract_stack() if f"{ROOT}/dgrpo_trl" in frame.filename]
    return f"{Path(frames[-1].filename).name}: {frames[-1].name}" if frames else "elsewhere"


# --- Operators that only CUDA has


def mm_with_dtype(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    assert a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16) and out_dtype in (torch.float32, a.dtype)
    return (a.to(out_dtype) @ b.to(out_dtype)).to(out_dtype)


def addmm_with_dtype(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert total.dtype == out.dtype == out_dtype
    return out.copy_(total + mm_with_dtype(a, b, out_dtype))


def flash_sequences(q, k, cum_q, cum_k, max_q, max_k, causal, window_size_left, window_size_right) -> Sequences:
    q_lengths, k_lengths = (tuple(cum.diff().tolist()) for cum in (cum_q, cum_k))
    assert (sum(q_lengths), sum(k_lengths)) == (q.size(0), k.size(0))  # CUDA would read what lies beyond
    assert cum_q.dtype == cum_k.dtype == torch.int32 and (max_q, max_k) == (max(q_lengths), max(k_lengths))
    causal = causal or window_size_right == 0
    return Sequences(q_lengths, k_lengths, causal, window_size_left)


def check_flash_tensors(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype in (torch.bfloat16, torch.float16) and tensor.stride(-1) == 1, tensor.dtype
        assert tensor.size(-1) % 8 == 0 and tensor.size(-1) <= 256, tensor.shape


def flash_forward(
    q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, return_mask, *, scale, window_size_left=None,
    window_size_right=None,
):  # fmt: skip
    check_flash_tensors(q, k, v)
    assert dropout == 0.0 and not return_mask
    sequences = flash_sequences(q, k, cum_q, cum_k, max_q, max_k, causal, window_size_left, window_size_right)
    out, lse = MathKernel().forward(q, k, v, scale, sequences)
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def flash_backward(
    grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, state, unused, *, scale,
    window_size_left=None, window_size_right=None,
):  # fmt: skip
    check_flash_tensors(grad, q, k, v, out)
    assert dropout == 0.0 and lse.dtype == torch.float32 and lse.is_contiguous() and grad.is_contiguous()
    assert lse.shape == (q.size(1), q.size(0))
    sequences = flash_sequences(q, k, cum_q, cum_k, max_q, max_k, causal, window_size_left, window_size_right)
    return MathKernel().backward(grad, q, k, v, out, lse, scale, sequences)


CUDA_ONLY = {
    aten.mm.dtype: mm_with_dtype,
    aten.addmm.dtype_out: addmm_with_dtype,
    aten._flash_attention_forward.default: flash_forward,
    aten._flash_attention_backward.default: flash_backward,
    aten._fused_sdp_choice.default: lambda *args, **kwargs: 0,  # plain matrix products
}


# --- The device


@contextmanager
def fake_cuda(num_devices: int = 1) -> Iterator[FakeCudaMode]:
    """A process that sees CUDA devices of compute capability 8.0, of which the first can be used."""
    _register_device()
    mode = FakeCudaMode()
    properties = {
        "is_available": True,
        "is_initialized": True,
        "device_count": num_devices,
        "current_device": 0,
        "get_device_capability": (8, 0),
        "is_bf16_supported": True,
        "synchronize": None,
        "set_device": None,
        "device": nullcontext(),
        "get_device_name": "a GPU",
        "get_device_properties": SimpleNamespace(
            name="a GPU", total_memory=80 * 2**30, major=8, minor=0, multi_processor_count=108
        ),
        "mem_get_info": (80 * 2**30, 80 * 2**30),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "empty_cache": None,
    }
    functions = {name: lambda *args, value=value, **kwargs: value for name, value in properties.items()}
    functions |= {"get_rng_state": lambda *_: mode.random_state, "set_rng_state": mode.set_random_state}
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch("torch.cuda._initialized", True))
        stack.enter_context(mock.patch("torch.accelerator.current_accelerator", lambda *_, **__: torch.device("cuda")))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # whether or not there is a Triton
        stack.enter_context(mock.patch.object(Fused, "is_possible", True))  # and after a test that must fail
        stack.enter_context(mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))  # no mode in other threads
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch.object(Tensor, "backward", backward))
        # The repetition of a checkpoint is kept for the time of one walk of the engine
        stack.enter_context(mock.patch("torch._C._current_graph_task_id", lambda: 0))
        # `torch.tensor` makes its tensor on the CPU, and moves it by an operator that the mode sees
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        # A parameter on the CPU cannot hold the data of another class
        stack.callback(
            torch.__future__.set_swap_module_params_on_conversion,
            torch.__future__.get_swap_module_params_on_conversion(),
        )
        torch.__future__.set_swap_module_params_on_conversion(True)
        yield stack.enter_context(mode)


def _register_device() -> None:
    """Lends the CUDA device the guard of `meta`, which does nothing: without any, autograd ends the process."""
    cuda, meta = 1, 14  # of c10::DeviceType
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[cuda] is None:
        guards[cuda] = guards[meta]


@torch.no_grad()
def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    """`loss.backward()`, which adds to the `grad` of all leaves."""
    consumers = Counter()  # of each node, how many hand it a gradient
    nodes = [loss.grad_fn]
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None:
                if following not in consumers:
                    nodes.append(following)
                consumers[following] += 1
    gradients = defaultdict(dict)
    gradients[loss.grad_fn][0] = torch.ones_like(loss) if gradient is None else gradient
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        given = gradients.pop(node, {})
        if hasattr(node, "variable"):
            for value in given.values():
                node.variable.grad = value if node.variable.grad is None else node.variable.grad + value
            continue
        for (following, i), result in _run_node(node, [given.get(i) for i in range(len(node._input_metadata))]):
            if result is not None:
                result = _as_the_engine_takes_it(result, following._input_metadata[i], node)
                into = gradients[following]
                into[i] = result if i not in into else into[i] + result
            consumers[following] -= 1
            if consumers[following] == 0:
                ready.append(following)


def _run_node(node, given: list[Tensor | None]) -> list[tuple]:
    """Its edges to nodes that need a gradient, each with its gradient."""
    edges = list(node.next_functions)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        # There are edges of the tensors alone, and results for all arguments
        needed = [value for value, needs in zip(node.apply(*given), node.needs_input_grad, strict=True) if needs]
        return list(zip([edge for edge in edges if edge[0] is not None], needed, strict=True))
    results = node(*given)
    results = results if isinstance(results, tuple) else (results,)
    return [(edge, value) for edge, value in zip(edges, results, strict=True) if edge[0] is not None]


def _as_the_engine_takes_it(gradient: Tensor, expected, node) -> Tensor:
    if gradient.device != expected.device:
        raise RuntimeError(f"{node.name()} returned a gradient on {gradient.device}, not {expected.device}")
    return gradient.sum_to_size(expected.shape).to(expected.dtype)
