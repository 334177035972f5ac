"""A run: what it refuses, how it resumes, what it writes; the command from end to end with a tiny model."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from dgrpo_trl.cli.evaluate import main
from dgrpo_trl.evaluation import runs
from dgrpo_trl.evaluation.arguments import EvaluationArguments
from dgrpo_trl.evaluation.results import results_table, score_cell
from dgrpo_trl.evaluation.runs import EvaluationRun
from dgrpo_trl.evaluation.samples import Cell, Sample


TASKS = ["niah_single_1", "cwe"]
LENGTHS = [2048, 2560]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    from conftest import build_model, build_tokenizer

    path = str(tmp_path_factory.mktemp("model"))
    build_model(max_position_embeddings=4096).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Two documents with two questions each, and one of its own; the answer to every one of them is its number."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = []
    for i in range(5):
        document = f"The ship number {i // 2} sails from Venice. " * (4 + 40 * (i == 4))
        rows.append(
            {
                "id": f"row{i}",
                "document_sha256": str(i // 2),
                "task": "sum" if i % 2 else "lookup",
                "prompt": [{"role": "user", "content": f"{document}What is the number of the mill, {i}?"}],
                "teacher_prompt": [{"role": "user", "content": f"The number of the mill is {4820 + i}."}],
                "answer": str(4820 + i),
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(saved_model, tmp_path):
    def make(**kwargs):
        values = {"model_name_or_path": saved_model, "output_dir": str(tmp_path / "run"), "num_samples": 2}
        return EvaluationArguments(**{**values, **kwargs})

    return make


class Answers:
    """A function of a sample in the place of a model; keeps the samples that it was asked."""

    def __init__(self, answer, stop_before=None):
        self.answer, self.asked, self.stop_before = answer, [], stop_before

    def __call__(self, samples, on_progress):
        if self.stop_before is not None and len(self.asked) >= self.stop_before:
            raise Stopped
        self.asked.extend(samples)
        on_progress(len(samples))
        return [self.answer(sample) for sample in samples]


class Stopped(Exception):
    pass


def silent(sample):
    return ""


def cells_of(results):
    return {(cell["task"], cell["length"]): cell for cell in results["cells"]}


def test_a_perfect_model_scores_100_in_every_cell(arguments, questions):
    run = EvaluationRun(arguments(tasks=TASKS, lengths=LENGTHS, questions=str(questions)))
    results = run.run(Answers(lambda sample: ", ".join(sample.references)))
    assert {cell["score"] for cell in results["cells"]} == {1.0}
    assert set(cells_of(results)) == {(t, n) for t in TASKS for n in LENGTHS} | {("lookup", 2048), ("sum", 2048)}
    assert "| niah_single_1 | 100 (34-100) | 100 (34-100) |" in results_table(results)


def test_a_model_that_says_nothing_scores_0(arguments, questions):
    run = EvaluationRun(arguments(tasks=TASKS, lengths=LENGTHS, questions=str(questions)))
    assert {cell["score"] for cell in run.run(Answers(silent))["cells"]} == {0.0}


def test_a_model_that_repeats_the_prompt_has_all_of_ruler_and_no_question(arguments, questions):
    args = arguments(tasks=TASKS, lengths=[2048], questions=str(questions), prompt_column="teacher_prompt")
    results = EvaluationRun(args).run(Answers(lambda sample: sample.messages[-1]["content"]))
    scores = {task: (cell["score"], cell.get("mentioned")) for (task, _), cell in cells_of(results).items()}
    # Substrings are what RULER counts; a question wants the answer alone, and tells beside it whether it was mentioned
    assert scores == {"niah_single_1": (1.0, None), "cwe": (1.0, None), "lookup": (0.0, 1.0), "sum": (0.0, 1.0)}


def test_a_stopped_run_resumes_at_the_next_cell_and_ends_alike(arguments):
    args = arguments(tasks=TASKS, lengths=LENGTHS)
    first, second = LENGTHS
    with pytest.raises(Stopped):
        EvaluationRun(args).run(Answers(lambda sample: sample.references[0], stop_before=4))
    cells = sorted(path.name for path in Path(args.output_dir, "cells").iterdir())
    assert cells == [f"niah_single_1-{first}.json", f"niah_single_1-{second}.json"]
    assert not Path(args.output_dir, "results.json").exists()
    resumed = Answers(lambda sample: sample.references[0])
    results = EvaluationRun(args).run(resumed)
    assert [sample.id for sample in resumed.asked] == [f"cwe-{n}-0-{i}" for n in LENGTHS for i in (0, 1)]
    again = Answers(lambda sample: sample.references[0])
    whole = EvaluationRun(arguments(tasks=TASKS, lengths=LENGTHS, output_dir=args.output_dir + "2")).run(again)

    def without_times(run):
        return [{key: value for key, value in cell.items() if key != "seconds"} for cell in run["cells"]]

    assert len(again.asked) == 8 and without_times(whole) == without_times(results)
    assert EvaluationRun(args).run() == results  # complete: nothing is asked, no weights are read


def test_an_incomplete_cell_is_not_read(arguments, monkeypatch):
    run = EvaluationRun(arguments(tasks=TASKS[:1], lengths=[2048]))

    def fail(*_):
        raise Stopped

    monkeypatch.setattr(os, "replace", fail)  # killed before the file has its name
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(Stopped):
        run.run(Answers(silent))
    assert not list(Path(run.output_dir, "cells").glob("*.json"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"num_samples": 1}, "num_samples 2 -> 1"),
        ({"system_message": "Be short."}, "system_message None -> 'Be short.'"),
        ({"dtype": "bfloat16"}, "dtype 'auto' -> 'bfloat16'"),
    ],
)
def test_a_folder_of_other_settings_is_refused_unless_overwritten(arguments, changed, named):
    first = EvaluationRun(arguments(tasks=TASKS[:1], lengths=[2048])).run(Answers(silent))
    with pytest.raises(ValueError, match=f"other settings: {re.escape(named)}.*overwrite: true"):
        EvaluationRun(arguments(tasks=TASKS[:1], lengths=[2048], **changed))
    answers = Answers(silent)
    again = EvaluationRun(arguments(tasks=TASKS[:1], lengths=[2048], overwrite=True, **changed)).run(answers)
    assert answers.asked and again["fingerprint"] != first["fingerprint"]


def test_a_run_may_get_more_tasks_and_another_pace(arguments):
    EvaluationRun(arguments(tasks=TASKS[:1], lengths=[2048])).run(Answers(silent))
    answers = Answers(silent)
    more = arguments(tasks=TASKS, lengths=LENGTHS, max_batch_tokens=1, name="more")
    assert len(EvaluationRun(more).run(answers)["cells"]) == 4 and len(answers.asked) == 6


def test_other_weights_under_the_same_path_are_another_run(make_model, tokenizer, tmp_path):
    path = tmp_path / "trained"
    args = EvaluationArguments(
        str(path), output_dir=str(tmp_path / "run"), tasks=TASKS[:1], lengths=[2048], num_samples=1
    )
    for seed in (0, 1):
        make_model(seed=seed, max_position_embeddings=4096).save_pretrained(path)
        tokenizer.save_pretrained(path)
        if seed == 0:
            EvaluationRun(args).run(Answers(silent))
    with pytest.raises(ValueError, match="model_sha256"):
        EvaluationRun(args)


def test_other_questions_under_the_same_path_are_another_run(arguments, questions, tmp_path):
    copied = tmp_path / "questions.jsonl"
    copied.write_text(questions.read_text())
    EvaluationRun(arguments(questions=str(copied), lengths=[2048])).run(Answers(silent))
    copied.write_text(questions.read_text().replace("Venice", "Genoa"))
    with pytest.raises(ValueError, match="questions_sha256"):
        EvaluationRun(arguments(questions=str(copied), lengths=[2048]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "nothing to ask"),
        ({"tasks": ["niah"], "lengths": [512]}, "'niah'.* does not make.*niah_single_1"),
        ({"tasks": TASKS}, "`tasks` need `lengths`"),
        ({"tasks": TASKS, "lengths": [512], "num_samples": 0}, "`num_samples` is 0"),
        ({"tasks": TASKS, "lengths": [512], "num_samples": None}, "`tasks` need `num_samples`"),
        ({"tasks": TASKS, "lengths": [512], "backend": "tgi"}, "`backend` is 'tgi'"),
        ({"tasks": TASKS, "lengths": [512], "model_init_kwargs": "{"}, "`model_init_kwargs` .* not JSON"),
        ({"tasks": TASKS, "lengths": [512], "vllm_kwargs": "[1]"}, "`vllm_kwargs` .* JSON object"),
        ({"tasks": TASKS, "lengths": [512], "output_dir": ""}, "`output_dir` is missing"),
        ({"tasks": TASKS, "lengths": [512], "model_name_or_path": ""}, "`model_name_or_path` is missing"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, kwargs, message):
    with pytest.raises(ValueError, match=message):
        arguments(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tasks": TASKS, "lengths": [64]}, "64"),
        ({"tasks": TASKS, "lengths": [2048, 8192]}, "8,192 tokens, more than the 4,096 positions.*YaRN"),
        ({"questions": "QUESTIONS"}, "`questions` need `lengths`"),
        ({"questions": "QUESTIONS", "lengths": [64]}, "All 5 rows are dropped"),
        ({"questions": "QUESTIONS", "lengths": [2048], "prompt_column": "asked"}, "no column 'asked'"),
        ({"questions": "nowhere.jsonl", "lengths": [2048]}, "'nowhere.jsonl' cannot be read"),
        (
            {"questions": "QUESTIONS", "lengths": [2048], "training_data": "QUESTIONS"},
            "share text .*'lookup-row\\d' has 'the ship",
        ),
        ({"tasks": TASKS, "lengths": [2048], "model_name_or_path": "nowhere"}, "'nowhere' cannot be read"),
    ],
)
def test_what_cannot_run_raises_before_weights_load(arguments, questions, kwargs, message):
    values = {key: str(questions) if value == "QUESTIONS" else value for key, value in kwargs.items()}
    with pytest.raises(ValueError, match=message):
        EvaluationRun(arguments(**values))


def test_yarn_in_the_arguments_counts_as_positions_and_reaches_the_model(arguments):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096}
    args = arguments(
        **{"tasks": ["niah_single_1"], "lengths": [8192], "num_samples": 1},
        model_init_kwargs=json.dumps({"rope_parameters": rope, "max_position_embeddings": 16384}),
    )
    run = EvaluationRun(args)
    assert run.cells[0].length == 8192 and run.model.config.rope_parameters["factor"] == 4.0
    assert args.vllm_overrides()["hf_overrides"]["max_position_embeddings"] == 16384


def test_qwen3_has_the_positions_it_was_trained_on_not_those_it_states(arguments, tmp_path):
    from conftest import build_model, build_tokenizer

    path = str(tmp_path / "qwen3")
    build_model(max_position_embeddings=40960).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    values = {"model_name_or_path": path, "tasks": ["niah_single_1"], "num_samples": 1}
    with pytest.raises(ValueError, match="36,000 tokens, more than the 32,768 positions.*YaRN"):
        EvaluationRun(arguments(**values, lengths=[36000]))
    assert EvaluationRun(arguments(**values, lengths=[32768])).cells[0].length == 32768


def test_a_tokenizer_without_a_template_is_refused(make_model, tokenizer, tmp_path):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    make_model().save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        EvaluationRun(EvaluationArguments(str(tmp_path), output_dir=str(tmp_path), tasks=TASKS, lengths=[2048]))


def test_a_length_bin_of_the_rows_decides_the_cell(arguments, questions, tmp_path):
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    path = tmp_path / "binned.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "length_bin": 128 + 32 * (i % 3)}) + "\n" for i, row in enumerate(rows))
    )
    found = cells_of(EvaluationRun(arguments(questions=str(path))).run(Answers(silent)))
    assert {key: [sample["id"] for sample in cell["samples"]] for key, cell in found.items()} == {
        ("lookup", 128): ["lookup-row0"],
        ("lookup", 160): ["lookup-row4"],
        ("lookup", 192): ["lookup-row2"],
        ("sum", 128): ["sum-row3"],
        ("sum", 160): ["sum-row1"],
    }


def test_the_teacher_reads_its_own_prompt(arguments, questions):
    answers = Answers(silent)
    EvaluationRun(arguments(questions=str(questions), lengths=[2048], prompt_column="teacher_prompt")).run(answers)
    assert all(sample.messages[0]["content"].startswith("The number of the mill") for sample in answers.asked)


def sample(references=("a",), number=0):
    return Sample(f"s{number}", [], "", tuple(references), 4, 10, None)


def test_the_score_of_a_cell_is_the_mean_of_its_samples():
    cell = Cell("vt", 512, "string_match_all", list)
    samples = [sample(("ab", "cd"), 0), sample(("ef",), 1)]
    found = score_cell(cell, samples, ["it is AB", "ef"], 1.5)
    assert [s["score"] for s in found["samples"]] == [0.5, 1.0]
    assert found["score"] == 0.75 and found["seconds"] == 1.5 and "mentioned" not in found
    assert found["samples"][0] == {
        **{"id": "s0", "score": 0.5, "completion": "it is AB"},
        **{"references": ["ab", "cd"], "num_tokens": 10},
    }


def test_a_cell_needs_one_completion_per_sample():
    with pytest.raises(ValueError, match="one completion per sample, got 1 for 2"):
        score_cell(Cell("vt", 512, "string_match_all", list), [sample(), sample()], ["a"], 0.0)


def test_the_mean_of_a_length_is_over_samples_and_needs_all_tasks():
    def cell(task, length, completions):
        samples = [sample(number=i) for i in range(len(completions))]
        return score_cell(Cell(task, length, "exact_match", list), samples, completions, 0.0)

    cells = [cell("sum", 128, ["a", "b"]), cell("lookup", 128, ["a"] * 6), cell("sum", 256, ["a"])]
    table = results_table({"name": "x", "model": "m", "fingerprint": "0", "cells": cells, "harness": {}})
    assert "| mean | 87.5 |  |" in table  # 7 of 8; over cells it would be 75.0


def test_the_command_writes_json_table_and_heat_map(saved_model, questions, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    config, out = tmp_path / "eval.yaml", tmp_path / "run"
    config.write_text(
        f"tasks: [niah_single_1, cwe]\nlengths: [2048, 2560]\nnum_samples: 2\nmax_new_tokens: 4\n"
        f"questions: {questions}\n"
    )
    main(["--config", str(config), "--model_name_or_path", saved_model, "--output_dir", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert {key: results[key] for key in ("format", "name", "model", "revision", "seed")} == {
        **{"format": 1, "name": "run", "model": saved_model, "revision": None, "seed": 0}
    }
    assert len(results["fingerprint"]) == 16 and set(results["versions"]) == {"dgrpo_trl", "transformers", "torch"}
    assert results["settings"]["lengths"] == [2048, 2560] and results["harness"] == {}
    assert set(cells_of(results)) == {(t, n) for t in TASKS for n in LENGTHS} | {("lookup", 2048), ("sum", 2048)}
    for cell in results["cells"]:
        assert isinstance(cell["length"], int) and len(cell["samples"]) == cell["num_samples"] == 2
        assert cell["interval"][0] <= cell["score"] <= cell["interval"][1] <= 1
        assert all(s["num_tokens"] <= cell["length"] for s in cell["samples"])
        assert ("mentioned" in cell) == (cell["metric"] == "exact_match")
    table = (out / "results.md").read_text()
    assert table in capsys.readouterr().out
    assert "| task | 2,048 | 2,560 |" in table and "| lookup |" in table
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.tmp*"))


def test_an_unknown_key_is_an_error(saved_model, tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text("tasks: [vt]\nlength: [2048]\n")
    with pytest.raises(ValueError, match="length"):
        main(["--config", str(config), "--model_name_or_path", saved_model, "--output_dir", str(tmp_path / "run")])


def test_vllm_gets_the_samples_and_the_longest_length(arguments, monkeypatch):
    calls = {}

    def load(name, revision, dtype, max_length, kwargs):
        calls.update(name=name, max_length=max_length, **kwargs)
        return "llm"

    def generate(llm, tokenizer, prompts, max_new_tokens, answer_prefixes):
        assert llm == "llm"
        return [prompt[-1]["content"] for prompt in prompts]

    monkeypatch.setattr(runs, "load_vllm", load)
    monkeypatch.setattr(runs, "generate_with_vllm", generate)
    args = arguments(tasks=TASKS[:1], lengths=[2048], backend="vllm", vllm_kwargs={"tensor_parallel_size": 2})
    (cell,) = EvaluationRun(args).run()["cells"]
    assert cell["score"] == 1.0 and calls["tensor_parallel_size"] == 2 and calls["max_length"] == 4096


def test_the_model_is_loaded_as_the_arguments_say(arguments):
    model = runs.load_model(arguments(tasks=TASKS, lengths=[2048], dtype="bfloat16", attn_implementation="eager"))
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager" and not model.training
