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


# Trains as the script does, then prints what trackio has
TRAINS_AND_READS_TRACKIO = """
import json, sys
from dgrpo_trl.cli import train_dgrpo
train_dgrpo.main(sys.argv[1:])
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps(SQLiteStorage.get_logs("ship", "first"), default=str))
"""


class Run:
    """A training script in a process of its own, for three steps of its demo recipe."""

    def __init__(self, folder, tokenizer, name, command, *flags, report_to="none"):
        self.folder = folder
        build_model().save_pretrained(folder / "student")
        tokenizer.save_pretrained(folder / "student")
        rows = [{"prompt": [{"role": "user", "content": f"Number {i}?"}], "answer": str(i)} for i in range(12)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = (ROOT / "recipes" / "smollm2-135m" / name / "demo.yaml").read_text()
        (folder / "recipe.yaml").write_text(recipe.replace("report_to: none", f"report_to: {report_to}"))
        arguments = [
            *("--config", "recipe.yaml", "--model_name_or_path", "student", "--dataset_name", "rows.jsonl"),
            *("--output_dir", "out", "--max_steps", "3", "--bf16", "false", *flags),
        ]
        environment = {variable: value for variable, value in os.environ.items() if variable != "DS_ACCELERATOR"}
        environment["TRACKIO_DIR"] = str(folder / "trackio")
        self.process = subprocess.Popen(
            [sys.executable, *command, *arguments],
            cwd=folder,
            env=environment,
            stdout=(folder / "stdout").open("w"),
            stderr=(folder / "stderr").open("w"),
        )

    def wait(self):
        """What it has shown."""
        code, stderr = self.process.wait(), (self.folder / "stderr").read_text()
        assert code == 0, stderr[-3000:]
        return (self.folder / "stdout").read_text() + stderr


@pytest.fixture(scope="module")
def runs(tokenizer, saved_teacher, tmp_path_factory):
    """Runs by name, side by side."""
    teacher = ("--teacher_model_name_or_path", saved_teacher)
    logs = ("--log_completions", "true", "--project", "ship", "--run_name", "first")
    runs = {
        "dgrpo": ("dgrpo", [str(ROOT / "scripts" / "train_dgrpo.py")], *teacher),
        "sft": ("sft", [str(ROOT / "scripts" / "train_sft.py")]),
        "logs": ("dgrpo", ["-c", TRAINS_AND_READS_TRACKIO], *teacher, *logs),
    }
    options = {"logs": {"report_to": "[tensorboard, trackio]"}}
    runs = {
        name: Run(tmp_path_factory.mktemp(name), tokenizer, *arguments, **options.get(name, {}))
        for name, arguments in runs.items()
    }
    yield runs
    for run in runs.values():
        run.process.kill()
        run.process.wait()


@pytest.mark.parametrize("name", ["dgrpo", "sft"])
def test_a_normal_run_shows_one_line_and_no_warnings(runs, name):
    shown = runs[name].wait()
    assert "Warning" not in shown and "WARNING" not in shown
    assert "{'loss'" not in shown
    last = re.split(r"[\r\n]", shown.strip())
    bars = [line for line in last if "tokens/s=" in line]
    figures = ("reward=", "divergence=") if name == "dgrpo" else ()
    assert bars and all(figure in bars[-1] for figure in ("3/3", "loss=", *figures))


def test_tensorboard_and_trackio_get_what_is_logged(runs):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("trackio")
    run = runs["logs"]
    run.wait()
    output = run.folder / "out"
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    expected = [entry["distill/divergence"] for entry in history if "distill/divergence" in entry]
    assert len(expected) == 3
    events = accumulator.EventAccumulator(str(next(output.rglob("events.*")).parent))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/distill/divergence")]
    assert logged == pytest.approx(expected)
    logs = json.loads((run.folder / "stdout").read_text().splitlines()[-1])
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
