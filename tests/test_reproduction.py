"""The demo and the comparison of methods: equal conditions, and stages that fit each other and run once."""

import json
import sys

import pytest
import yaml
from conftest import ROOT, build_model


SMOLLM2 = ROOT / "recipes" / "smollm2-135m"


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    """Python puts the folder of a script on the path; its neighbours are imported from there."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def recipe(name, size):
    return yaml.safe_load((SMOLLM2 / f"{name}_{size}.yaml").read_text())


def differing(one, other):
    return {key for key in {*one, *other} if one.get(key) != other.get(key)}


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_methods_differ_in_teacher_and_reward_alone(size):
    method = recipe("dgrpo/reproduce", size)
    teacher = {"teacher_model_name_or_path", "teacher_prompt_column", "distill_coef", "output_dir"}
    assert differing(method, recipe("dgrpo/reproduce_evidence", size)) == {
        *("teacher_prompt_column", "output_dir"),
    }
    assert differing(method, recipe("opd/reproduce", size)) == {"reward_funcs", "distill_coef", "output_dir"}
    assert differing(method, recipe("grpo/reproduce", size)) == teacher - {"teacher_prompt_column"} | {
        "distill_divergence"
    }
    sft = recipe("sft/reproduce", size)
    assert (
        differing(sft, method) & {"max_steps", "model_name_or_path", "dataset_name", "dtype", "bf16", "seed"} == set()
    )
    num_prompts = method["per_device_train_batch_size"] * method["gradient_accumulation_steps"]
    num_prompts //= method["num_generations"]
    assert sft["per_device_train_batch_size"] * sft["gradient_accumulation_steps"] == num_prompts


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_every_file_of_questions_holds_what_its_recipe_asks_for(size):
    import prepare_reproduction

    num_rows = prepare_reproduction.NUM_ROWS[size]
    for name, stem in (
        ("cold_start", "reproduce_cold_start"),
        ("teacher", "reproduce_teacher"),
        ("train", "reproduce"),
    ):
        sft = recipe(f"sft/{stem}", size)
        batch = sft["per_device_train_batch_size"] * sft["gradient_accumulation_steps"]
        assert sft["max_steps"] * batch <= num_rows[name]
        assert sft["dataset_name"].endswith(f"/{name}.jsonl")
    build = yaml.safe_load((ROOT / "recipes" / "longblocks" / f"reproduce_{size}_train.yaml").read_text())
    assert build["mixing"]["max_rows"] == sum(num_rows.values())
    test = yaml.safe_load((ROOT / "recipes" / "longblocks" / f"reproduce_{size}_test.yaml").read_text())
    assert (build["questions"]["split"], test["questions"]["split"]) == ("train", "test")
    assert not set(build["sources"][0]["members"]) & set(test["sources"][0]["members"])
    assert max(test["questions"]["lengths"]) > max(build["questions"]["lengths"])


def test_short_questions_have_certain_answers():
    import prepare_reproduction

    rows = prepare_reproduction.short_rows(seed=0)
    assert len({row["id"] for row in rows}) == len({row["prompt"][-1]["content"] for row in rows}) == len(rows) == 60
    for row in rows:
        question = row["prompt"][-1]["content"]
        if row["task"] == "short_sum":
            a, b = (int(word.strip("?")) for word in question.split() if word.strip("?").isdigit())
            assert row["answer"] == str(a + b)
    answers = {row["prompt"][-1]["content"]: row["answer"] for row in rows}
    assert answers["What is the capital of Norway?"] == "Oslo"
    assert prepare_reproduction.short_rows(seed=1) != rows


def assert_fit_each_other(stages, folder):
    """Each stage reads only what an earlier one writes, or what is in the repository."""
    assert len({stage.name for stage in stages}) == len(stages)
    written = set()
    for stage in stages:
        for path in stage.inputs:
            assert path in written if path.is_relative_to(folder) else path.exists(), (stage.name, path)
        written.update(stage.outputs)


def test_the_stages_of_the_demo_fit_each_other_and_end_with_its_comparison(tmp_path):
    import demo

    stages = demo.make_stages(tmp_path, seed=0, bf16=False)
    assert_fit_each_other(stages, tmp_path)
    assert stages[-1].outputs[-1] == tmp_path / "comparison" / "comparison.html"
    assert [stage.name for stage in stages if stage.name.startswith("train_")] == ["train_sft", "train_dgrpo"]
    command = " ".join(stages[-1].command)
    assert all(f"{label}={tmp_path}/eval_{name}" in command for name, label in demo.MODELS.items())


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_stages_of_the_comparison_fit_each_other(size, tmp_path):
    import reproduce

    stages = reproduce.Comparison(size, tmp_path, seeds=3, ablation_seeds=1, bf16=True).stages()
    assert_fit_each_other(stages, tmp_path)
    trained = [stage for stage in stages if stage.name.startswith("train_")]
    assert len(trained) == 2 + 3 * len(reproduce.METHODS) + len(reproduce.ABLATIONS)
    for stage in trained:
        command = " ".join(stage.command)
        assert f"_{size}.yaml" in command and ("train.jsonl" in command) == stage.name[-1].isdigit()


def stage(tmp_path, code="import sys; open(sys.argv[2], 'a').write(open(sys.argv[1]).read())"):
    from stages import Stage

    source, output = tmp_path / "in", tmp_path / "out"
    if not source.exists():
        source.write_text("a")
    return Stage("copy", "copies", [sys.executable, "-c", code, str(source), str(output)], [source], [output])


def test_a_stage_runs_once_for_the_same_inputs(tmp_path):
    from stages import run_stages

    for _ in range(2):
        assert set(run_stages([stage(tmp_path)], tmp_path)) == {"copy"}
    assert (tmp_path / "out").read_text() == "a"
    (tmp_path / "in").write_text("b")
    run_stages([stage(tmp_path)], tmp_path)
    assert (tmp_path / "out").read_text() == "ab"
    (tmp_path / "out").unlink()
    run_stages([stage(tmp_path)], tmp_path)
    assert (tmp_path / "out").read_text() == "b"


def test_a_stage_that_fails_or_writes_nothing_ends_the_run(tmp_path):
    from stages import run_stages

    with pytest.raises(SystemExit) as ended:
        run_stages([stage(tmp_path, "raise SystemExit(7)")], tmp_path)
    assert ended.value.code == 7
    with pytest.raises(SystemExit, match="did not write .*out"):
        run_stages([stage(tmp_path, "pass")], tmp_path)
    assert not list((tmp_path / "stages").glob("*.json"))


@pytest.mark.slow
def test_the_comparison_runs_from_cold_start_to_page(tokenizer, tmp_path):
    import prepare_reproduction
    import reproduce

    model = tmp_path / "model"
    build_model().save_pretrained(model)
    tokenizer.save_pretrained(model)
    (model / "complete.json").write_text("{}")  # as `prepare_reproduction.py` leaves it
    (tmp_path / "data").mkdir()
    rows = prepare_reproduction.short_rows(seed=0)
    for row in rows:
        row["teacher_prompt"] = row["prompt"]
    for name in ("cold_start", "teacher", "train", "test", "short"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 5))
    for name in ("test", "short"):  # each question once
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = reproduce.Comparison("cpu", tmp_path, seeds=1, ablation_seeds=0, bf16=False).stages()[1:]
    reproduce.run_stages(stages, tmp_path)
    comparison = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    text = json.dumps(comparison)
    for method in reproduce.METHODS.values():
        assert method.label in text
    reproduce.plot_curves(comparison, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "divergence" in text and (tmp_path / "short" / "comparison.html").stat().st_size > 5000
