"""What a run shows: one line, and none of the warnings that are known."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
from conftest import build_model
from test_recipes import ROOT

from dgrpo_trl import DGRPOTrainer
from dgrpo_trl.console import KNOWN_WARNINGS, quiet_known_warnings


def test_a_normal_run_shows_one_line_and_no_warnings(tokenizer, saved_teacher, tmp_path):
    build_model().save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    rows = [{"prompt": [{"role": "user", "content": f"Number {i}?"}], "answer": str(i)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *(sys.executable, str(ROOT / "scripts" / "train_dgrpo.py")),
        *("--config", str(ROOT / "recipes" / "smollm2-135m" / "dgrpo" / "demo.yaml")),
        *("--model_name_or_path", "student", "--teacher_model_name_or_path", saved_teacher),
        *("--dataset_name", "rows.jsonl", "--output_dir", "out", "--max_steps", "3", "--bf16", "false"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    shown = result.stdout + result.stderr
    assert "Warning" not in shown and "WARNING" not in shown
    assert "{'loss'" not in shown
    last = re.split(r"[\r\n]", shown.strip())
    bars = [line for line in last if "tokens/s=" in line]
    assert bars and all(name in bars[-1] for name in ("3/3", "loss=", "reward=", "divergence="))


def test_every_filter_names_its_source_and_hides_only_its_own():
    assert all(why for _, why in KNOWN_WARNINGS)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet_known_warnings()
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("`something_else` is deprecated", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["`something_else` is deprecated"]


def test_too_few_rows_for_a_step_are_an_error_and_no_empty_run(make_trainer, saved_teacher, dataset):
    options = {"teacher_model": saved_teacher, "train_dataset": dataset.select(range(3))}
    with pytest.raises(ValueError, match="has 3 rows, and a generation batch takes 4 prompts"):
        make_trainer(DGRPOTrainer, per_device_train_batch_size=16, **options)
    make_trainer(DGRPOTrainer, per_device_train_batch_size=12, **options)
