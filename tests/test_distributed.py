"""Two real processes against one, on the same global batch: DDP, FSDP2 and DeepSpeed ZeRO-3, all on the CPU.

The one process is that of the tests.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import ROOT, build_model
from distributed_job import TIMEOUT_SECONDS, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dgrpo_trl.cli import train_sft
from dgrpo_trl.run.checkpoints import latest_checkpoint


ACCELERATE_CONFIGS = ROOT / "recipes" / "accelerate_configs"
# DeepSpeed compiles an operator at first use. In the home directory, a process killed meanwhile leaves a lock that all
# later ones wait for, and another checkout compiles it anew for itself
EXTENSIONS = tempfile.TemporaryDirectory(prefix="torch_extensions_")
ENVIRONMENT = {
    **os.environ,
    "TORCH_EXTENSIONS_DIR": EXTENSIONS.name,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # DeepSpeed looks for `ninja` there
    # What is freed goes back at once, so that the memory of a process is what it holds
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}

pytestmark = pytest.mark.distributed


def run(tmp_path, name, launcher, teacher="teacher", expected=0, **options):
    """Runs the job. Where a rank hangs, the job ends with the stack of every rank, which fails the test."""
    output = tmp_path / name
    teacher = teacher if teacher == "base" else str(tmp_path / teacher)
    command = [
        *launcher,
        *(str(ROOT / "tests" / "distributed_job.py"), str(output), str(tmp_path / "student"), teacher),
        json.dumps(options),
    ]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS + 60)
    assert result.returncode == expected, result.stderr[-20_000:]
    return output, result


def launch(tmp_path, name, launcher, **options):
    output, _ = run(tmp_path, name, launcher, **options)
    return json.loads(Path(f"{output}.rank0.json").read_text()), load_file(output.with_suffix(".safetensors"))


def in_one_process(tmp_path, teacher="teacher", **options):
    teacher = teacher if teacher == "base" else str(tmp_path / teacher)
    return train(str(tmp_path / "one"), str(tmp_path / "student"), teacher, options)


DDP = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def accelerate(config: Path):
    port = ("--main_process_port", free_port())
    return (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *port)


def zero3_launcher(tmp_path, **options):
    """That of the recipe for two processes, with `options` of ZeRO."""
    deepspeed = {
        "zero_optimization": {
            "stage": 3,
            # By default DeepSpeed keeps parameters of less than 1e5 elements whole: tiny models would gather nothing
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
            **options,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }
    (tmp_path / "deepspeed.json").write_text(json.dumps(deepspeed))
    config = yaml.safe_load((ACCELERATE_CONFIGS / "cpu_zero3.yaml").read_text())
    config["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "deepspeed.json"), "zero3_init_flag": True}
    del config["mixed_precision"]  # DeepSpeed's own file says it
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump(config))
    return accelerate(tmp_path / "zero3.yaml")


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None,
    reason="needs the deepspeed extra and a C++ compiler",
)


@pytest.fixture
def models(tmp_path, tokenizer):
    """A student, and a teacher of another width and depth."""
    wider = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    for name, model in (("student", build_model()), ("teacher", build_model(seed=1, **wider))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def zero3(**options):
    return pytest.param("zero3", options, marks=needs_deepspeed, id="zero3-" + "-".join(map(str, options)))


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ddp", {"loss_type": "dapo"}),
        ("ddp", {"loss_type": "grpo", "shared_prefix": "off"}),
        ("ddp", {"max_tokens_per_micro_batch": 40}),
        ("fsdp2", {"max_tokens_per_micro_batch": 40}),
        zero3(shared_prefix="on", evaluates=8),
        zero3(shared_prefix="off", tile_tokens=3, evaluates=1),  # one rank has no row of its own
        zero3(max_tokens_per_micro_batch=40, teacher_offload="cpu"),
        zero3(lora=True),
        zero3(lora=True, teacher="base"),
        # The teacher compares shared with plain forwards, of which one rank has no pair
        zero3(no_end=[1], mask_truncated_completions=True, max_tokens_per_micro_batch=40),
        zero3(no_end=[0, 1], mask_truncated_completions=True),
        zero3(optim="adamw_torch", learning_rate=1e-3, max_grad_norm=1.0),
    ],
    ids=str,
)
def test_two_processes_equal_one_on_the_same_global_batch(models, engine, options):
    launchers = {"ddp": lambda: DDP, "fsdp2": lambda: accelerate(ACCELERATE_CONFIGS / "cpu_fsdp2.yaml")}
    launcher = launchers.get(engine, lambda: zero3_launcher(models))()
    # One process runs every completion with its prompt, in whole micro-batches: the reference
    reference = {**options, "shared_prefix": "off"}
    reference |= dict.fromkeys(("max_tokens_per_micro_batch", "teacher_offload", "tile_tokens"))
    common = {"gradient_accumulation_steps": 2}
    sizes = [{"per_device_train_batch_size": n, "per_device_eval_batch_size": 2 * n} for n in (4, 2)]
    one, one_weights = in_one_process(models, **sizes[0], **common, **reference)
    two, two_weights = launch(models, "two", launcher, **sizes[1], **common, **options)
    steps = [[entry for entry in log if "loss" in entry] for log in (one["log"], two["log"])]
    assert len(steps[0]) == 3
    for a, b in zip(*steps, strict=True):
        for metric in ("loss", "grad_norm", "reward", "distill/loss", "distill/grpo_loss", "distill/divergence"):
            assert (metric in a) == (metric in b), metric
            if metric in a:
                assert a[metric] == pytest.approx(b[metric], rel=1e-4, abs=1e-5), metric
    assert steps[0][-1]["num_tokens"] == steps[1][-1]["num_tokens"]
    if options.get("evaluates"):
        for metric in ("eval_loss", "eval_distill/loss", "eval_distill/divergence", "eval_reward"):
            values = [job["evaluated"][metric] for job in (one, two)]
            # What a rank without a row of its own evaluates is a row again, with completions by its place
            assert options["evaluates"] == 1 or values[1] == pytest.approx(values[0], rel=1e-4, abs=1e-5), metric
            assert math.isfinite(values[1])
    start = build_model().state_dict()
    start |= {name: torch.zeros_like(weight) for name, weight in one_weights.items() if "lora_B" in name}
    names = [name for name in one_weights if name in start]
    moved = torch.cat([(one_weights[name] - start[name]).flatten() for name in names]).norm()
    apart = torch.cat([(one_weights[name] - two_weights[name]).flatten() for name in one_weights]).norm()
    if options.get("no_end") == [0, 1]:  # nothing to learn from, on any rank
        assert moved == 0 and apart == 0
    else:
        assert moved > 1e-3 and apart < 1e-4 * moved


@needs_deepspeed
def test_zero3_skips_a_step_that_is_not_finite_on_one_rank(models):
    common = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    _, after_one = launch(models, "first", zero3_launcher(models), max_steps=1, **common)
    _, after_two = launch(models, "corrupt", zero3_launcher(models), max_steps=2, corrupts=[2], **common)
    for name in after_one:
        torch.testing.assert_close(after_one[name], after_two[name], rtol=0, atol=0)
    _, result = run(
        models, "stops", zero3_launcher(models), corrupts=[1, 2], max_nonfinite_steps=2, expected=1, **common
    )
    assert "2 consecutive optimizer steps were not finite; the last: the teacher term" in result.stderr


@needs_deepspeed
def test_zero3_resumes_in_the_middle_of_an_epoch_and_saves_what_transformers_loads(models):
    options = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "max_steps": 4,
        "shuffle_dataset": True,
    }
    launcher = zero3_launcher(models)
    straight, expected = launch(models, "straight", launcher, saves=True, **options)
    run(models, "stopped", launcher, save_strategy="steps", save_steps=2, **{**options, "max_steps": 2})
    folder = models / "stopped_out"
    assert latest_checkpoint(folder) == str(folder / "checkpoint-2")
    resumed, weights = launch(models, "resumed", launcher, resume=str(folder), **options)
    steps = [[entry for entry in log["log"] if "loss" in entry] for log in (straight, resumed)]
    for a, b in zip(*steps, strict=True):
        assert a["num_tokens"] == b["num_tokens"] or a["step"] > 2  # TRL counts tokens from the resumption on
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6)
    for name in expected:
        torch.testing.assert_close(expected[name], weights[name], rtol=1e-6, atol=1e-7)
    saved = AutoModelForCausalLM.from_pretrained(models / "straight_out")
    model = build_model()
    model.load_state_dict(expected)
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)


@needs_deepspeed
def test_the_cold_start_equals_one_process_and_ends_where_a_rank_has_no_row_left(models, tokenizer):
    rows = [
        {"prompt": [{"role": "user", "content": f"{'The ship. ' * (i % 4)} Number {i}?"}], "answer": f"number {i}"}
        for i in range(9)
    ]
    (models / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    logs = []
    for num_processes in (1, 2):
        output = models / f"sft_{num_processes}"
        arguments = [
            *("--config", str(ROOT / "recipes" / "smollm2-135m" / "sft" / "demo.yaml")),
            *("--model_name_or_path", str(models / "student"), "--dataset_name", str(models / "rows.jsonl")),
            *("--output_dir", str(output), "--per_device_train_batch_size", str(4 // num_processes)),
            *("--max_steps", "-1", "--num_train_epochs", "1", "--bf16", "false", "--optim", "sgd"),
            *("--learning_rate", "0.5", "--max_grad_norm", "0", "--warmup_steps", "0"),
            *("--train_sampling_strategy", "random"),
        ]
        if num_processes == 1:
            train_sft.main(arguments)
        else:
            command = [*zero3_launcher(models), str(ROOT / "scripts" / "train_sft.py"), *arguments]
            result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
            assert result.returncode == 0, result.stderr[-20_000:]
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        logs.append([entry for entry in history if "loss" in entry])
    assert len(logs[0]) == len(logs[1]) == 3  # in the last step there is one row, for one of the ranks
    for a, b in list(zip(*logs, strict=True))[:2]:
        for metric in ("loss", "grad_norm"):
            assert a[metric] == pytest.approx(b[metric], rel=1e-4), metric
    assert logs[0][0]["loss"] - logs[0][1]["loss"] > 0.01
    assert AutoModelForCausalLM.from_pretrained(output).num_parameters() == build_model().num_parameters()


def test_a_job_that_hangs_ends_with_the_stack_of_every_rank(models):
    _, result = run(models, "hangs", DDP, expected=1, hangs=1, per_device_train_batch_size=4)
    # The other rank is ended by the launcher, or by the loss of its connection, whichever comes first
    assert len(re.findall(r'distributed_job.py", line \d+,? in main', result.stderr)) >= 2, result.stderr[-20_000:]
    assert result.stderr.count("in wait_for_ever") == 1


@needs_deepspeed
def test_no_rank_ever_holds_the_teacher_whole(models, tokenizer):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
    large = build_model(seed=1, num_key_value_heads=4, **{**sizes, "head_dim": 128})
    num_parameters = sum(parameter.numel() for parameter in large.parameters())
    large.save_pretrained(models / "large", max_shard_size="60MB")
    tokenizer.save_pretrained(models / "large")
    del large
    # DeepSpeed's defaults are for larger models still
    launcher = zero3_launcher(models, stage3_max_live_parameters=2e7, stage3_prefetch_bucket_size=1e6)
    options = {"teacher": "large", "measures": True, "max_steps": 2}
    output, _ = run(models, "job", launcher, per_device_train_batch_size=4, **options)
    whole_mib = 4 * num_parameters / 2**20
    for rank in range(2):
        seen = json.loads(Path(f"{output}.rank{rank}.json").read_text())
        assert seen["held"] == 0 and seen["sharded"] == pytest.approx(num_parameters / 2, rel=0.01)
        assert seen["built_mib"] < 0.75 * whole_mib, seen
        assert seen["trained_mib"] < whole_mib, seen  # its shard, the layers in use, the student and all else


@needs_deepspeed
def test_a_checkpoint_that_was_cut_off_by_a_kill_is_not_resumed_from(models):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "steps"}
    options |= {"save_steps": 1, "max_steps": 4}
    output = models / "killed"
    command = [
        *zero3_launcher(models),
        *(str(ROOT / "tests" / "distributed_job.py"), str(output), str(models / "student"), str(models / "teacher")),
        json.dumps({**options, "stalls": 3}),
    ]
    log = (models / "log").open("w")
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
    folder = models / "killed_out"
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (folder / "checkpoint-3" / "stalled").exists():  # its weights are there, the optimizer's states are not
        assert process.poll() is None and time.monotonic() < deadline, (models / "log").read_text()[-6000:]
        time.sleep(0.05)
    job = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in job:
        one.kill()
    psutil.wait_procs(job)
    assert list((folder / "checkpoint-3").glob("*.safetensors"))
    newest = latest_checkpoint(folder)
    assert newest == str(folder / "checkpoint-2")
    log, _ = launch(models, "again", zero3_launcher(models), resume=str(folder), **options)
    assert [entry["step"] for entry in log["log"] if "loss" in entry] == [1, 2, 3, 4]
