"""Two real processes against one, on the same global batch."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model
from safetensors.torch import load_file


ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PYTHONFAULTHANDLER": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # DeepSpeed looks for `ninja` there
}


def launch(tmp_path, name, launcher, **options):
    output = tmp_path / name
    command = [
        *launcher,
        *(str(ROOT / "tests" / "distributed_job.py"), str(output)),
        *(str(tmp_path / "student"), str(tmp_path / "teacher"), json.dumps(options)),
    ]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(output.with_suffix(".json").read_text()), load_file(output.with_suffix(".safetensors"))


ONE_PROCESS = (sys.executable,)
DDP = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def accelerate(config):
    path = ROOT / "recipes" / "accelerate_configs" / config
    port = ("--main_process_port", free_port())
    return (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *port)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None,
    reason="needs the deepspeed extra and a C++ compiler",
)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ddp", {"loss_type": "dapo"}),
        ("ddp", {"loss_type": "grpo", "shared_prefix": "off"}),
        ("ddp", {"max_tokens_per_micro_batch": 40}),
        ("cpu_fsdp2.yaml", {"max_tokens_per_micro_batch": 40}),
        pytest.param("cpu_zero3.yaml", {"shared_prefix": "on"}, marks=needs_deepspeed),
        pytest.param("cpu_zero3.yaml", {"max_tokens_per_micro_batch": 40}, marks=needs_deepspeed),
    ],
    ids=str,
)
def test_two_processes_equal_one_on_the_same_global_batch(tmp_path, tokenizer, engine, options):
    launcher = DDP if engine == "ddp" else accelerate(engine)
    for name, seed in (("student", 0), ("teacher", 1)):
        build_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    # One process runs every completion with its prompt, in whole micro-batches: the reference
    reference = {**options, "shared_prefix": "off", "max_tokens_per_micro_batch": None}
    common = {"gradient_accumulation_steps": 2}
    one, one_weights = launch(tmp_path, "one", ONE_PROCESS, per_device_train_batch_size=4, **common, **reference)
    two, two_weights = launch(tmp_path, "two", launcher, per_device_train_batch_size=2, **common, **options)
    for a, b in zip(one["log"][:-1], two["log"][:-1], strict=True):
        for metric in ("loss", "reward", "distill/loss", "distill/grpo_loss", "distill/divergence"):
            assert a[metric] == pytest.approx(b[metric], rel=1e-4, abs=1e-5), metric
    assert one["log"][-2]["num_tokens"] == two["log"][-2]["num_tokens"]
    start = build_model().state_dict()
    moved = torch.cat([(one_weights[name] - start[name]).flatten() for name in start]).norm()
    apart = torch.cat([(one_weights[name] - two_weights[name]).flatten() for name in start]).norm()
    assert moved > 1e-3 and apart < 1e-4 * moved
