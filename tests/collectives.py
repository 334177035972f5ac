"""Which collective calls a rank issues, in which phase of a step: recorded in a job, compared between its ranks.

Recorded are the calls of Python: those of the trainer, of TRL, Accelerate, DeepSpeed and FSDP2. DDP reduces gradients
below Python.
"""

import faulthandler
import functools
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed._functional_collectives


_COLLECTIVE = re.compile(r"(all_|broadcast|reduce_scatter|reduce$|gather|scatter|barrier|monitored_barrier)")
_ROOTED = ("gather", "scatter")  # whose list of tensors one rank alone has


class Recorder:
    """Writes each call at once, so that of a rank that hangs the last is known too.

    Attributes:
        patience: Seconds after a call in which this rank must make the next one; else it ends with its stack.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self.patience: float | None = None

    def install(self) -> None:
        """Wraps the functions of `torch.distributed`; before the libraries are imported that take some by name."""
        distributed = torch.distributed
        for module in (distributed.distributed_c10d, distributed._functional_collectives):
            for name, function in [*vars(module).items()]:
                if _COLLECTIVE.match(name) and inspect.isfunction(function) and function.__module__ == module.__name__:
                    recorded = self._recorded(name, function)
                    setattr(module, name, recorded)
                    if getattr(distributed, name, None) is function:
                        setattr(distributed, name, recorded)

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            values = [*args, *kwargs.values()]
            tensors = list(_tensors(values[:1] if name in _ROOTED else values))
            sizes = " ".join(f"{str(tensor.dtype).removeprefix('torch.')}{[*tensor.shape]}" for tensor in tensors)
            self._write(f"{name} {sizes}".strip())
            return function(*args, **kwargs)

        return recorded

    def _write(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()
        if self.patience is not None:
            faulthandler.dump_traceback_later(self.patience, exit=True)

    @contextmanager
    def to(self, path: Path) -> Iterator[None]:
        with path.open("w") as self._file:
            yield
        self._file = None

    def mark(self, owner: type, method: str, phase: str) -> None:
        """Makes the calls of `owner.method` a phase."""
        function = getattr(owner, method)

        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self._write(f"> {phase}")
            try:
                return function(*args, **kwargs)
            finally:
                self._write("<")

        setattr(owner, method, marked)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


RECORDER = Recorder()


def read_calls(path: Path) -> list[tuple[str, str]]:
    """Phase and call, in order. A phase within another has its name behind a slash; its begin is a call too."""
    calls, phases = [], []
    for line in path.read_text().splitlines():
        if line.startswith("> "):
            phases.append(line[2:])
            calls.append(("/".join(phases), "begins"))
        elif line == "<":
            phases.pop()
        else:
            calls.append(("/".join(phases), line))
    return calls


def count_by_phase(calls: list[tuple[str, str]]) -> Counter[str]:
    """Collective calls of each phase, by its own name."""
    return Counter(phase.rpartition("/")[2] for phase, call in calls if call != "begins")


def assert_same_calls(ranks: list[list[tuple[str, str]]]) -> None:
    """Raises an `AssertionError` that names the first call in which ranks differ, and its phase."""
    for number, calls in enumerate(itertools.zip_longest(*ranks, fillvalue=("the end", "nothing"))):
        if len(set(calls)) > 1:
            lines = [f"rank {rank} in {phase or 'no phase'}: {call}" for rank, (phase, call) in enumerate(calls)]
            raise AssertionError(f"The ranks differ in their collective call {number}: " + "; ".join(lines))
