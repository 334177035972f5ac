"""Launches of real processes on the CPU: one per engine, whose ranks run all cases of it one after another."""

import fcntl
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import collectives
import pytest
import torch
import yaml
from conftest import ROOT
from distributed_training import CASE_SECONDS
from safetensors.torch import load_file


ACCELERATE_CONFIGS = ROOT / "recipes" / "accelerate_configs"
NUM_PROCESSES = 2
# DeepSpeed compiles an operator at first use, for the paths of this Python, and again for others: so it is kept beside
# it, and a Python that is reached by a link is called by its own path
ENVIRONMENT_FOLDER = Path(sys.prefix).resolve()
PYTHON = str(ENVIRONMENT_FOLDER / "bin" / Path(sys.executable).name)
EXTENSIONS = ENVIRONMENT_FOLDER / "torch_extensions"
ENVIRONMENT = {
    **os.environ,
    "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PATH": f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}",  # DeepSpeed looks for `ninja` there
    # What is freed goes back at once, so that the memory of a process is what it holds
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None,
    reason="needs the deepspeed extra and a C++ compiler",
)


@contextmanager
def extensions() -> Iterator[None]:
    """For a launch that may compile DeepSpeed's operator: one at a time.

    A process that is killed while it compiles leaves a lock that all later ones would wait for.
    """
    EXTENSIONS.mkdir(exist_ok=True)
    with (EXTENSIONS / "in_use").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for lock in EXTENSIONS.glob("*/lock"):
            lock.unlink()
        yield


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def ddp_launcher(folder: Path) -> list[str]:
    return [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(NUM_PROCESSES)]


def accelerate_launcher(config: Path) -> list[str]:
    port = ("--main_process_port", free_port())
    return [PYTHON, "-m", "accelerate.commands.launch", "--config_file", str(config), *port]


def fsdp2_launcher(folder: Path) -> list[str]:
    return accelerate_launcher(ACCELERATE_CONFIGS / "cpu_fsdp2.yaml")


def zero3_launcher(folder: Path) -> list[str]:
    """That of the recipe for two processes."""
    deepspeed = {
        "zero_optimization": {
            "stage": 3,
            # By default DeepSpeed keeps parameters of less than 1e5 elements whole: tiny models would gather nothing.
            # Its other defaults are for models that are larger still than the large teacher of these tests
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 2e7,
            "stage3_prefetch_bucket_size": 1e6,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    config = yaml.safe_load((ACCELERATE_CONFIGS / "cpu_zero3.yaml").read_text())
    config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": True}
    del config["mixed_precision"]  # DeepSpeed's own file says it
    (folder / "zero3.yaml").write_text(yaml.safe_dump(config))
    return accelerate_launcher(folder / "zero3.yaml")


LAUNCHERS = {"ddp": ddp_launcher, "fsdp2": fsdp2_launcher, "zero3": zero3_launcher}


@dataclass
class Outcome:
    """What a case has left.

    Args:
        ranks: What each rank returned; `{"error": traceback}` where it raised, `None` where it did not get so far.
        calls: Collective calls of each rank, see `collectives.read_calls`.
        weights: The trained weights.
        stderr: Of the whole launch.
    """

    ranks: list[dict[str, Any] | None]
    calls: list[list[tuple[str, str]]]
    weights: dict[str, torch.Tensor]
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [rank["error"] for rank in self.ranks if rank is not None and "error" in rank]

    @property
    def has_ended(self) -> bool:
        return None not in self.ranks and not self.errors

    def log(self) -> list[dict[str, float]]:
        """The logged steps, of a case that has ended; else its test fails."""
        self.check()
        return [entry for entry in self.ranks[0]["log"] if "loss" in entry]

    def check(self) -> None:
        if not self.has_ended:
            pytest.fail("\n".join(self.errors) or f"A rank did not end:\n{self.stderr[-20_000:]}", pytrace=False)


def launch_cases(folder: Path, engine: str, cases: list[dict[str, Any]]) -> dict[str, Outcome]:
    """Runs cases in one launch; after a case that stops it, those that are left in another.

    Args:
        folder: Of what the cases leave.
        engine: Key of `LAUNCHERS`.
        cases: As `distributed_job.py` takes them.
    """
    folder.mkdir(exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    while left := [case for case in cases if case["name"] not in outcomes]:
        (folder / "cases.json").write_text(json.dumps(left))
        command = [*LAUNCHERS[engine](folder), str(ROOT / "tests" / "distributed_job.py"), str(folder)]
        seconds = 60 + CASE_SECONDS * len(left)
        with extensions() if engine == "zero3" else nullcontext():
            job = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds)
        for case in left:
            outcomes[case["name"]] = outcome = _outcome(folder, case["name"], job.stderr)
            if None in outcome.ranks or (outcome.errors and not case.get("fails")):
                break
        if not any(outcomes[left[0]["name"]].calls):  # no case can start
            outcomes |= {case["name"]: outcomes[left[0]["name"]] for case in left}
    return outcomes


def _outcome(folder: Path, name: str, stderr: str) -> Outcome:
    ranks = [folder / f"{name}.rank{rank}" for rank in range(NUM_PROCESSES)]
    results, calls = ([path.with_name(path.name + end) for path in ranks] for end in (".json", ".calls"))
    weights = folder / f"{name}.safetensors"
    return Outcome(
        [json.loads(path.read_text()) if path.exists() else None for path in results],
        [collectives.read_calls(path) if path.exists() else [] for path in calls],
        load_file(weights) if weights.exists() else {},
        stderr,
    )
