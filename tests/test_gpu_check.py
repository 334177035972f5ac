"""`scripts/gpu_check.py`: its checks with small sizes on the CPU, its table, its JSON and its exit code."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


sys.path.append(str(ROOT / "scripts"))

import gpu_check  # noqa: E402
from gpu_checks import Check, Failed, Skipped, attention, measures, report, training  # noqa: E402

from dgrpo_trl.shared_prefix.kernels import TorchCPUKernel, choose_kernel  # noqa: E402


def command(*flags):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    script = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), *map(str, flags)]
    return subprocess.run(script, env=environment, capture_output=True, text=True, timeout=1200)


def test_without_a_gpu_it_says_what_to_do_and_fails(tmp_path):
    done = command("--output_dir", tmp_path / "out")
    assert done.returncode == 2 and "sees no CUDA GPU" in done.stderr and "`make install-gpu`" in done.stderr
    assert not (tmp_path / "out").exists()


def passes(device):
    return {"error": 0.00123456, "each": {"seconds": 2.0}}


def fails(device):
    raise Failed("the gradient is off")


def is_skipped(device):
    raise Skipped("there is one GPU")


def breaks(device):
    raise torch.OutOfMemoryError("out of memory")


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The command, with checks that run in this process."""

    def run(**checks):
        monkeypatch.setattr(
            gpu_check, "CHECKS", {name.replace("_", " "): Check(check, 9) for name, check in checks.items()}
        )
        monkeypatch.setattr(
            gpu_check, "run_apart", lambda name, check, device, _: report.run_here(name, check, device)
        )
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--output_dir", str(tmp_path / "out")])
        code = gpu_check.main()
        return code, json.loads((tmp_path / "out" / "gpu_check.json").read_text())

    return run


def test_one_failure_hides_no_other_check_and_decides_the_exit_code(main, capsys):
    code, content = main(broken=breaks, wrong=fails, two_gpus=is_skipped, right=passes)
    assert code == 1
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines() if "  " in line}
    assert "FAILED" in lines["broken"] and "OutOfMemoryError: out of memory" in lines["broken"]
    assert "FAILED" in lines["wrong"] and lines["wrong"].endswith("the gradient is off")
    assert "skipped" in lines["two gpus"] and lines["two gpus"].endswith("there is one GPU")
    assert "passed" in lines["right"] and lines["right"].endswith("error 0.00123, each (seconds 2)")
    assert [check["status"] for check in content["checks"]] == ["failed", "failed", "skipped", "passed"]
    assert content["checks"][3]["figures"] == passes("cpu")
    assert content["environment"]["device"] == "CPU" and content["environment"]["torch"] == torch.__version__


def test_skipped_checks_are_no_failure(main):
    code, content = main(two_gpus=is_skipped, right=passes)
    assert code == 0 and len(content["checks"]) == 2


def test_a_check_that_hangs_is_ended_and_has_failed(tmp_path):
    result = report.run_apart("attention torch", Check(passes, 0), "cpu", tmp_path)
    assert result.status == "failed" and "it took more than 0 s" in result.reason


def test_a_check_whose_process_dies_has_failed(tmp_path):
    result = report.run_apart("no such check", Check(passes, 120), "cpu", tmp_path)
    assert result.status == "failed" and "it ended with 1: see" in result.reason
    assert "no such check" in (tmp_path / "no_such_check.log").read_text()


def test_a_check_runs_in_a_process_of_its_own(tmp_path):
    done = command("--device", "cpu", "--only", "attention torch", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (check,) = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert check["status"] == "passed" and 0 < check["figures"]["error"] < attention.TOLERANCE
    assert "flash_attention_for_cpu" in check["figures"]["small, no window"]["kernel"]


# --- The checks, and that they fail


class WrongOnLongRows(TorchCPUKernel):
    """Passes the comparison that every kernel has to pass before its first use."""

    def backward(self, grad, q, *args):
        dq, dk, dv = super().backward(grad, q, *args)
        return dq, dk * (1.1 if len(q) > 40 else 1.0), dv


@pytest.fixture
def wrong_kernel(monkeypatch):
    choose_kernel.cache_clear()
    monkeypatch.setattr("dgrpo_trl.shared_prefix.kernels.TorchCPUKernel", WrongOnLongRows)
    yield
    choose_kernel.cache_clear()


@pytest.mark.parametrize("backend", ["torch", "math"])
def test_attention_passes(backend):
    assert (
        report.run_here("attention", Check(gpu_check.CHECKS[f"attention {backend}"].run, 9), "cpu").status == "passed"
    )


def test_a_backend_for_another_device_is_skipped():
    result = report.run_here("attention", gpu_check.CHECKS["attention flash_attention_3"], "cpu")
    assert result.status == "skipped" and "it is for GPUs of compute capability 9.0" in result.reason


def test_a_wrong_kernel_fails(wrong_kernel):
    result = report.run_here("attention", gpu_check.CHECKS["attention torch"], "cpu")
    assert result.status == "failed" and "its dk is off by 0." in result.reason


@pytest.mark.parametrize("precision", training.PRECISIONS)
def test_a_step_passes(precision):
    figures = training.check_step(precision, "cpu")
    assert 0 < figures["error of the gradient"] < training.TOLERANCE


def test_offloading_passes():
    assert training.check_offload("cpu") == {"error of the gradient": 0.0}


def test_a_step_with_a_wrong_gradient_fails(monkeypatch):
    original = training._gradient

    def wrong(device, lengths, stored, dtype, autocast):
        loss, gradient = original(device, lengths, stored, dtype, autocast)
        return loss, gradient * (1.0 if dtype == torch.float32 and not autocast else 1.2)

    monkeypatch.setattr(training, "_gradient", wrong)
    with pytest.raises(Failed, match="the gradient is off by 0.2"):
        training.check_step("bf16 weights", "cpu")


def test_a_run_that_does_not_learn_fails(monkeypatch):
    log = [{"distill/divergence": value, "step_time": 1.0} for value in (1.0, 0.9)]
    monkeypatch.setattr(training, "_train", lambda *args, **kwargs: log)
    with pytest.raises(Failed, match="the divergence to the teacher does not fall"):
        training.check_training("cpu")


def test_a_loss_that_is_not_the_definition_fails(monkeypatch):
    monkeypatch.setitem(measures.loss.WAYS, "ours", lambda *inputs: 1.1 * measures.loss.naive(*inputs))
    with pytest.raises(Failed, match="by its definition"):
        measures.check_loss("cpu")


def test_vllm_and_what_is_not_installed_are_skipped(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("vllm", "two gpus"):
        result = report.run_here(name, gpu_check.CHECKS[name], "cpu")
        assert result.status == "skipped" and "is not installed: `make install-gpu`" in result.reason


@pytest.mark.slow
@pytest.mark.distributed
def test_all_checks_pass_on_the_cpu(tmp_path):
    done = command("--device", "cpu", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads((tmp_path / "gpu_check.json").read_text())["checks"]}
    skipped = {name for name, check in checks.items() if check["status"] == "skipped"}
    assert skipped <= {"attention flash_attention_3", "attention flash_attention_4", "vllm", "two gpus"}
    assert checks["prefix"]["figures"]["48 x 8"]["on student"] > 0
