"""The command lines, run end to end on a tiny model: what they read, what they write, and that they resume."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, build_model
from datasets import Dataset
from safetensors.torch import load_file
from test_recipes import CONFIGS
from transformers import AutoModelForCausalLM

from dgrpo_trl.cli import train_dgrpo, train_sft


FLAGS = [
    *("--per_device_train_batch_size", "4", "--max_steps", "2", "--learning_rate", "0.01", "--optim", "sgd"),
    *("--gradient_accumulation_steps", "2", "--bf16", "false", "--use_cpu", "true", "--warmup_steps", "0"),
    *("--disable_tqdm", "true"),
]


@pytest.fixture
def student(tokenizer, tmp_path):
    build_model().save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return str(tmp_path / "student")


@pytest.fixture
def rows(tmp_path):
    prompts = [[{"role": "user", "content": f"The <|im_end|> ship has number {i}. Number?"}] for i in range(12)]
    dataset = Dataset.from_dict({"prompt": prompts, "answer": [str(i) for i in range(12)]})
    dataset.to_parquet(tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


def run_recipe(path, *flags):
    main = train_sft.main if path.parent.name == "sft" else train_dgrpo.main
    main(["--config", str(path), *FLAGS, *flags])


def run(method, *flags):
    run_recipe(ROOT / "recipes" / "smollm2-135m" / method / "demo.yaml", *flags)


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_train_dgrpo_resumes_from_the_last_checkpoint(student, saved_teacher, rows, tmp_path):
    flags = ["--model_name_or_path", student, "--teacher_model_name_or_path", saved_teacher, "--dataset_name", rows]
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--lr_scheduler_type", "constant"]
    run("dgrpo", *flags, "--output_dir", str(tmp_path / "straight"))
    stopped = ["--output_dir", str(tmp_path / "stopped")]
    run("dgrpo", *flags, *stopped, "--max_steps", "1")
    run("dgrpo", *flags, *stopped, "--resume_from_checkpoint", "true")
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    for name in straight:
        assert torch.equal(straight[name], resumed[name]), name


def test_train_sft_names_a_missing_column(student, rows, tmp_path):
    with pytest.raises(ValueError, match="no column 'response'"):
        run("sft", "--model_name_or_path", student, "--dataset_name", rows, "--completion_column", "response")


CPU_RECIPES = [path for path in CONFIGS if "use_cpu: true" in path.read_text()]


@pytest.mark.parametrize("path", CPU_RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_for_the_cpu_runs(path, student, saved_teacher, rows, tmp_path):
    output = tmp_path / "out"
    flags = ["--model_name_or_path", student, "--dataset_name", rows, "--output_dir", str(output)]
    teacher = yaml.safe_load(path.read_text()).get("teacher_model_name_or_path")
    if teacher not in (None, "base"):
        flags += ["--teacher_model_name_or_path", saved_teacher]
    run_recipe(path, *flags)
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    logged = {name: value for entry in state["log_history"] for name, value in entry.items()}
    assert ("distill/divergence" in logged) == (path.parent.name in ("dgrpo", "opd"))
    assert ("rewards/exact_match_reward/mean" in logged) == (path.parent.name in ("dgrpo", "grpo"))
    if "use_peft: true" in path.read_text():
        assert not (output / "model.safetensors").exists()
        adapter = load_file(output / "adapter_model.safetensors")
        is_trained = any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)  # zero at the start
    else:
        before, after = weights(student), weights(output)
        is_trained = any(not torch.equal(before[name], after[name]) for name in before)
    if teacher != "base" and path.parent.name != "grpo":  # a random model earns no reward, and is its own base
        assert is_trained and logged.get("distill/divergence", 1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", CPU_RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_for_the_cpu_runs_on_its_own_model(path, rows, tmp_path):
    """DGRPO_DEMO_MODEL names the folder of the model that `scripts/prepare_demo.py` makes."""
    if (model := os.environ.get("DGRPO_DEMO_MODEL")) is None:
        pytest.skip("DGRPO_DEMO_MODEL is not set")
    flags = ["--model_name_or_path", model, "--dataset_name", rows, "--output_dir", str(tmp_path / "out")]
    if yaml.safe_load(path.read_text()).get("teacher_model_name_or_path", "base") != "base":
        flags += ["--teacher_model_name_or_path", model]
    run_recipe(path, *flags)
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.slow
def test_the_benchmark_of_the_shared_prefix_prints_its_tables(tmp_path):
    figure = tmp_path / "figure.png"
    command = [sys.executable, str(ROOT / "scripts" / "benchmarks" / "shared_prefix.py"), "--lengths", "48x8"]
    options = ["--num_generations", "2", "--repeats", "1", "--evidence_tokens", "8", "--figure", str(figure)]
    output = subprocess.run(command + options, check=True, capture_output=True, text=True).stdout
    assert output.count("| 48 | 8 |") == 3 and "1.75" in output  # the ideal ratio: 2 x 56 tokens against 64
    assert figure.stat().st_size > 10_000
