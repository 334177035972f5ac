"""Commands that make one thing after another: what the demo and the reproduction are made of.

A stage whose outputs are complete for the same command and inputs is skipped, so that a second run costs nothing and
an interrupted one goes on where it stopped.
"""

import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dgrpo_trl.files import write_json


SCRIPTS = Path(__file__).resolve().parent


@dataclass
class Stage:
    """A command, and how to know whether it must run.

    Args:
        name (`str`):
            Short name, also of its marker file.
        purpose (`str`):
            What the reader of the log is told.
        command (`list[str]`):
            Command line.
        inputs (`list[Path]`):
            Files whose content decides the result.
        outputs (`list[Path]`):
            Files that exist when it is complete.
    """

    name: str
    purpose: str
    command: list[str]
    inputs: list[Path]
    outputs: list[Path]


def fingerprint(stage: Stage) -> str:
    """Hash of the command and of the content of its inputs."""
    digest = hashlib.sha256(json.dumps(stage.command).encode())
    for path in stage.inputs:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def run_stage(stage: Stage, number: str, markers: Path) -> float:
    """Run a stage, or skip it if its marker has the same fingerprint and its outputs are there.

    Returns:
        `float`: seconds that the stage took, now or when it ran.

    Raises:
        SystemExit: If the command fails, with its exit status.
    """
    marker = markers / f"{stage.name}.json"
    found = fingerprint(stage)
    if marker.exists() and all(path.exists() for path in stage.outputs):
        content = json.loads(marker.read_text(encoding="utf-8"))
        if content["fingerprint"] == found:
            print(f"[{number}] {stage.name}: done before in {content['seconds']:.0f} s, skipped", flush=True)
            return content["seconds"]
    marker.unlink(missing_ok=True)
    print(f"\n[{number}] {stage.name}: {stage.purpose}\n$ {shlex.join(stage.command)}", flush=True)
    start = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # `accelerate launch` would take 1
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SCRIPTS.parent), environment.get("PYTHONPATH")]))
    status = subprocess.run(stage.command, env=environment).returncode
    seconds = time.monotonic() - start
    if status != 0:
        print(f"[{number}] {stage.name} failed with exit status {status}", file=sys.stderr, flush=True)
        raise SystemExit(status)
    missing = [str(path) for path in stage.outputs if not path.exists()]
    if missing:
        raise SystemExit(f"[{number}] {stage.name} left no {', '.join(missing)}")
    write_json(marker, {"fingerprint": found, "seconds": seconds})
    print(f"[{number}] {stage.name}: {seconds:.0f} s; largest process so far {peak_gib():.1f} GiB", flush=True)
    return seconds


def run_stages(stages: Sequence[Stage], output_dir: Path) -> dict[str, float]:
    """Run stages in order; what is complete is remembered in `output_dir/stages`.

    Returns:
        `dict[str, float]`: seconds of each stage, now or when it ran.

    Raises:
        SystemExit: If a command fails, with its exit status.
    """
    markers = output_dir / "stages"
    markers.mkdir(parents=True, exist_ok=True)
    return {stage.name: run_stage(stage, f"{i}/{len(stages)}", markers) for i, stage in enumerate(stages, start=1)}


def peak_gib() -> float:
    """Peak resident memory of the largest process that a stage of this run has started."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def has_bf16_instructions() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware; where it does not, float32 is several times faster."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older PyTorch
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
