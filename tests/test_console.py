"""What a run shows: one line, and none of the warnings that are known."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT, build_model

from dgrpo_trl import DGRPOTrainer
from dgrpo_trl.run.console import KNOWN_WARNINGS, quiet_known_warnings


def run_script(name, tokenizer, tmp_path, *flags, report_to="none", **environment):
    """A training script in a process of its own, for three steps of its demo recipe; what it has shown."""
    build_model().save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    rows = [{"prompt": [{"role": "user", "content": f"Number {i}?"}], "answer": str(i)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = (ROOT / "recipes" / "smollm2-135m" / name / "demo.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe.replace("report_to: none", f"report_to: {report_to}"))
    command = [
        *(sys.executable, str(ROOT / "scripts" / f"train_{name}.py"), "--config", "recipe.yaml"),
        *("--model_name_or_path", "student", "--dataset_name", "rows.jsonl", "--output_dir", "out"),
        *("--max_steps", "3", "--bf16", "false", *flags),
    ]
    environment = {**{name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}, **environment}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", ["dgrpo", "sft"])
def test_a_normal_run_shows_one_line_and_no_warnings(name, tokenizer, saved_teacher, tmp_path):
    teacher = ["--teacher_model_name_or_path", saved_teacher] if name == "dgrpo" else []
    shown = run_script(name, tokenizer, tmp_path, *teacher)
    assert "Warning" not in shown and "WARNING" not in shown
    assert "{'loss'" not in shown
    last = re.split(r"[\r\n]", shown.strip())
    bars = [line for line in last if "tokens/s=" in line]
    figures = ("reward=", "divergence=") if name == "dgrpo" else ()
    assert bars and all(figure in bars[-1] for figure in ("3/3", "loss=", *figures))


READS_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps(SQLiteStorage.get_logs("ship", "first"), default=str))
"""


def test_tensorboard_and_trackio_get_what_is_logged(tokenizer, saved_teacher, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("trackio")
    flags = ["--teacher_model_name_or_path", saved_teacher, "--log_completions", "true"]
    flags += ["--project", "ship", "--run_name", "first"]
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    run_script("dgrpo", tokenizer, tmp_path, *flags, report_to="[tensorboard, trackio]", **environment)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    expected = [entry["distill/divergence"] for entry in history if "distill/divergence" in entry]
    assert len(expected) == 3
    events = accumulator.EventAccumulator(str(next((tmp_path / "out").rglob("events.*")).parent))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/distill/divergence")]
    assert logged == pytest.approx(expected)
    command = [sys.executable, "-c", READS_TRACKIO]
    output = subprocess.run(
        command, env={**os.environ, **environment}, check=True, capture_output=True, text=True
    ).stdout
    logs = json.loads(output.splitlines()[-1])
    assert [log["train/distill/divergence"] for log in logs if "train/distill/divergence" in log] == expected
    tables = [log["completions"] for log in logs if "completions" in log]
    assert tables and "divergence" in json.dumps(tables[0])


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
