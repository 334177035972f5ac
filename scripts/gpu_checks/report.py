"""Runs checks, each in a process of its own, and tells how they went."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import SCRIPTS, Check, Failed, Figures, Skipped


CPU_PATIENCE = 4  # DeepSpeed compiles an extension for CPUs, once
PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "vllm", "flash-attn-3", "flash-attn-4")


@dataclass(frozen=True)
class Result:
    """How a check went.

    Args:
        status (`str`):
            `"passed"`, `"skipped"` or `"failed"`.
        reason (`str`, *optional*, defaults to `""`):
            Why it did not pass.
    """

    name: str
    status: str
    reason: str = ""
    figures: Figures = field(default_factory=dict)
    seconds: float = 0.0


def run_here(name: str, check: Check, device: str) -> Result:
    """Runs a check in this process. What it raises becomes its result."""
    start = time.monotonic()
    try:
        status, reason, figures = "passed", "", check.run(device)
    except Skipped as error:
        status, reason, figures = "skipped", str(error), {}
    except Failed as error:
        status, reason, figures = "failed", str(error), {}
    except Exception as error:
        traceback.print_exc()
        status, reason, figures = "failed", f"{type(error).__name__}: {error}", {}
    return Result(name, status, reason, figures, time.monotonic() - start)


def run_apart(name: str, check: Check, device: str, folder: Path) -> Result:
    """Runs a check in a process of its own: one that hangs, or breaks its CUDA context, leaves the others alone."""
    result, log = (folder / f"{name.replace(' ', '_')}.{kind}" for kind in ("json", "log"))
    result.unlink(missing_ok=True)
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--only", name, "--device", device]
    limit = check.seconds * (1 if device == "cuda" else CPU_PATIENCE)
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--result", str(result)], stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    if result.exists():
        return Result(**json.loads(result.read_text()))
    how = f"took more than {limit} s" if code is None else f"ended with {code}"
    return Result(name, "failed", f"it {how}: see {log}", {}, time.monotonic() - start)


def _end(process: subprocess.Popen) -> None:
    """With the processes that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def environment(device: str) -> dict[str, str]:
    """The device and the versions that the figures are of."""
    found = {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "CUDA": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def table(results: list[Result]) -> str:
    """A line for each check: how it went, how long it took, and its figures or why it did not pass."""
    width = max(len(result.name) for result in results)
    lines = []
    for result in results:
        status = result.status.upper() if result.status == "failed" else result.status
        text = result.reason or ", ".join(f"{name} {shown(value)}" for name, value in result.figures.items())
        lines.append(f"{result.name:{width}}  {status:7}  {result.seconds:5.0f} s  {text}")
    return "\n".join(lines)


def shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {shown(inner)}" for name, inner in value.items()) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_json(path: Path, device: str, results: list[Result]) -> None:
    content = {"environment": environment(device), "checks": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=2) + "\n")
