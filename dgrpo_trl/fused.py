"""Functions of tiles that are compiled where memory bounds them: on CUDA, each of their steps would be a kernel that
reads and writes the tile. On a CPU, where a tile stays in the cache, they run as they are written."""

import functools
import logging
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


P = ParamSpec("P")
R = TypeVar("R")
logger = logging.getLogger(__name__)


class Fused(Generic[P, R]):
    """Decorator of a pure function of tensors of N tokens, V ids or both, which runs compiled on CUDA.

    The function may also take numbers and functions, for each of which it is compiled anew. Where it cannot be
    compiled, it and all others run as they are written, with one warning.

    Args:
        function (`Callable`):
            Takes tensors, possibly nested in tuples, and has no side effect.

    Attributes:
        is_possible (`bool`):
            Whether nothing has failed to compile yet in this process.
        device_type (`str`):
            Where functions run compiled.
    """

    is_possible = True
    device_type = "cuda"

    def __init__(self, function: Callable[P, R]):
        self.function = function
        # Not `dynamic=True`: it would pass numbers as float64 tensors, which Triton computes in float64
        self.compiled = torch.compile(function, fullgraph=True)
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_wanted = Fused.is_possible and tensors[0].device.type == Fused.device_type
        if not is_wanted or any(min(tensor.shape) < 2 for tensor in tensors):  # which would be compiled for themselves
            return self.function(*args, **kwargs)
        for tensor in tensors:  # one compilation serves the ragged tiles too
            torch._dynamo.maybe_mark_dynamic(tensor, list(range(tensor.dim())))
        try:
            return self.compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a fault of the function itself comes again below
            Fused.is_possible = False
            logger.warning(
                f"The loss runs uncompiled: with the same result, but bound by memory. `torch.compile` failed on "
                f"`{self.function.__name__}` ({type(error).__name__}: {' '.join(str(error).split())[:300]}). Install "
                "the Triton that belongs to this PyTorch, and a C compiler."
            )
            return self.function(*args, **kwargs)
