"""The sbatch script, run by bash, with stand-ins for Slurm's commands; the launcher and the training are real."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, build_model
from distributed_runs import ENVIRONMENT, extensions, free_port, needs_deepspeed


SBATCH = ROOT / "recipes" / "slurm" / "train.sbatch"
# What Slurm's commands do here: `srun` runs what follows its options, `scontrol` names the nodes or writes down
STAND_INS = {
    "srun": 'echo "$@" >> "$CALLS/srun"\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=0 exec "$@"\n',
    "scontrol": 'if [ "$1" = show ]; then tr , "\\n" <<< "$3"; else echo "$@" >> "$CALLS/scontrol"; fi\n',
}
RECORDER = 'echo "$(basename "$0") $*" >> "$CALLS/launched"\n'


@pytest.fixture
def slurm(tmp_path):
    """An environment in which the stand-ins are found first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}")
        (folder / name).chmod(0o755)
    return {
        **ENVIRONMENT,
        "PATH": f"{folder}{os.pathsep}{ENVIRONMENT['PATH']}",
        "CALLS": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "a",
        "MAIN_PROCESS_PORT": free_port(),
    }


def record_launches(slurm):
    for name in ("accelerate", "trl"):
        path = Path(slurm["CALLS"]) / "bin" / name
        path.write_text(f"#!/bin/bash\n{RECORDER}")
        path.chmod(0o755)


def submit(slurm, *arguments, **kwargs):
    return subprocess.run(["bash", str(SBATCH), *arguments], env=slurm, capture_output=True, text=True, **kwargs)


def test_every_node_launches_with_its_place_and_the_addresses_of_the_job(slurm, tmp_path):
    record_launches(slurm)
    slurm |= {"SLURM_JOB_NODELIST": "n1,n2,n3"}
    result = submit(slurm, "scripts/train_dgrpo.py", "recipe.yaml", "--seed", "3 4")
    assert result.returncode == 0, result.stderr
    assert "--nodes=3 --ntasks=3 --nodelist=n1,n2,n3" in (tmp_path / "srun").read_text()
    launched = (tmp_path / "launched").read_text()
    assert "--config_file recipes/accelerate_configs/zero3_multinode.yaml --num_machines 3" in launched
    assert "--num_processes 24 --machine_rank 0 --main_process_ip n1" in launched
    assert launched.rstrip().endswith("scripts/train_dgrpo.py --config recipe.yaml --seed 3 4")
    assert not (tmp_path / "scontrol").exists()


def test_the_last_node_serves_where_that_is_asked_for(slurm, tmp_path):
    record_launches(slurm)
    slurm |= {"SLURM_JOB_NODELIST": "n1,n2", "VLLM_NODES": "1", "VLLM_MODEL": "student"}
    result = submit(slurm, "scripts/train_dgrpo.py", "recipe.yaml")
    assert result.returncode == 0, result.stderr
    launched = (tmp_path / "launched").read_text()
    assert "trl vllm-serve --model student --tensor_parallel_size 8" in launched
    assert "recipes/accelerate_configs/zero3.yaml --num_machines 1" in launched
    assert "--vllm_mode server --vllm_server_host n2" in launched
    assert "--nodelist=n2 trl" in (tmp_path / "srun").read_text()


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({}, ["scripts/train_dgrpo.py"], "usage:"),
        ({"VLLM_NODES": "1", "VLLM_MODEL": "m"}, ["a", "b"], "one at least must train"),
        ({"VLLM_NODES": "1", "SLURM_JOB_NODELIST": "a,b"}, ["a", "b"], "the model to serve"),
    ],
)
def test_what_cannot_be_run_is_refused(slurm, environment, arguments, message):
    result = submit({**slurm, **environment}, *arguments)
    assert result.returncode != 0 and message in result.stderr


def test_a_run_that_fails_is_not_put_back(slurm, tmp_path):
    path = tmp_path / "bin" / "accelerate"
    path.write_text("#!/bin/bash\nexit 3\n")
    path.chmod(0o755)
    assert submit(slurm, "scripts/train_dgrpo.py", "recipe.yaml").returncode == 3
    assert not (tmp_path / "scontrol").exists()


REWARDS = """
import faulthandler, os, signal, time
calls, signals = [], []
was_stopped = os.path.exists("stopped")
faulthandler.dump_traceback_later(420)  # of each rank, before the test gives up
def slow(completions, **kwargs):
    calls.append(1)
    if len(calls) == 1:
        handle = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *arguments: (handle(*arguments), signals.append(1)))
    if len(calls) == 2 and not was_stopped:
        open("second" + os.environ["RANK"], "w").close()
        while not signals:  # until the signal has come to this rank
            time.sleep(0.05)
        open("stopped", "w").close()
    return [float(len(c[0]["content"]) % 7) for c in completions]
"""


def exit_code(job):
    """`None` for a job that hangs, which is killed with all that it has started."""
    try:
        return job.wait(timeout=480)
    except subprocess.TimeoutExpired:
        for process in [*psutil.Process(job.pid).children(recursive=True), job]:
            process.kill()


@pytest.fixture
def deepspeed():
    with extensions():
        yield


@pytest.mark.distributed
@needs_deepspeed
def test_a_job_whose_time_is_up_is_put_back_with_a_checkpoint_and_goes_on(
    deepspeed, slurm, tokenizer, saved_teacher, tmp_path
):
    build_model().save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    rows = [{"prompt": [{"role": "user", "content": f"Number {i}?"}], "answer": str(i)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    slurm["ACCELERATE_CONFIG"] = str(ROOT / "recipes" / "accelerate_configs" / "cpu_zero3.yaml")
    slurm |= {"GPUS_PER_NODE": "2", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [
        *("bash", str(SBATCH), str(ROOT / "scripts" / "train_dgrpo.py")),
        str(ROOT / "recipes" / "smollm2-135m" / "dgrpo" / "demo.yaml"),
        *("--model_name_or_path", "student", "--teacher_model_name_or_path", saved_teacher),
        *("--dataset_name", "rows.jsonl", "--reward_funcs", "my_rewards.slow", "--output_dir", "out"),
        *("--max_steps", "4", "--bf16", "false", "--resume_from_checkpoint", "auto"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
    ]
    log = (tmp_path / "log").open("w")
    job = subprocess.Popen(command, cwd=tmp_path, env=slurm, stdout=log, stderr=log)
    deadline = time.monotonic() + 480
    while not all((tmp_path / f"second{rank}").exists() for rank in range(2)):
        assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGTERM)  # to the shell alone, as `--signal=B:TERM` does
    assert exit_code(job) == 0, (tmp_path / "log").read_text()[-20_000:]
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert (tmp_path / "out" / "checkpoint-2" / "complete.json").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    (tmp_path / "scontrol").unlink()
    again = subprocess.Popen(command, cwd=tmp_path, env=slurm, stdout=log, stderr=log)
    assert exit_code(again) == 0, (tmp_path / "log").read_text()[-20_000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "scontrol").exists()
