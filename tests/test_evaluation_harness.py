"""lm-evaluation-harness: what is looked at before weights load, and one of its tasks offline, end to end."""

import importlib.util
import logging
from pathlib import Path

import pytest
from trl import TrlParser

from dgrpo_trl.evaluation import harness
from dgrpo_trl.evaluation.arguments import EvaluationArguments
from dgrpo_trl.evaluation.runs import EvaluationRun


lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def index(request):
    """The index of tasks, read once: it takes seconds."""
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager()

    class Once(lm_eval.tasks.TaskManager):
        def __init__(self, metadata=None):
            self.__dict__.update(manager.__dict__)
            self.metadata = metadata
            self._factory = type(manager._factory)(meta=metadata)

    original = lm_eval.tasks.TaskManager
    lm_eval.tasks.TaskManager = Once
    yield manager.task_index
    lm_eval.tasks.TaskManager = original


@pytest.fixture
def arguments(saved_model, tmp_path):
    def make(*tasks, **kwargs):
        values = {"model_name_or_path": saved_model, "output_dir": str(tmp_path / "run"), "lengths": [512, 1024]}
        return EvaluationArguments(harness_tasks=list(tasks), **{**values, **kwargs})

    return make


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    from conftest import build_model, build_tokenizer

    path = str(tmp_path_factory.mktemp("model"))
    build_model(max_position_embeddings=2048).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def test_lengths_of_ruler_beyond_the_positions_are_refused(index, arguments):
    with pytest.raises(ValueError, match="4,096 tokens, more than the 2,048 positions.*YaRN"):
        EvaluationRun(arguments("niah_single_1", lengths=[1024, 4096]))


@pytest.fixture
def no_modules_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_a_task_runs_offline_at_each_length_and_is_not_run_twice(index, arguments, monkeypatch, caplog):
    pytest.importorskip("wonderwords")
    args = arguments("niah_single_1", harness_kwargs={"limit": 2})
    seen = []
    evaluate = lm_eval.simple_evaluate

    def count(**kwargs):
        found = evaluate(**{**kwargs, "log_samples": True})
        seen.extend(sample["doc"]["max_length"] for sample in found["samples"]["niah_single_1"])
        return found

    monkeypatch.setattr(lm_eval, "simple_evaluate", count)
    monkeypatch.setattr(
        harness, "inspect", type("same", (), {"signature": lambda _: __import__("inspect").signature(evaluate)})
    )
    results = EvaluationRun(args).run()
    assert sorted(seen) == [512, 512, 1024, 1024]  # two of each length, not the first two rows
    assert results["harness"] == {"niah_single_1": {"512,none": 0.0, "1024,none": 0.0}}  # no row of 4096
    assert "No aggregation function" not in caplog.text
    assert EvaluationRun(args).run() == results and len(seen) == 4


def test_the_mean_of_a_group_is_of_the_lengths_that_were_asked_for():
    found = {
        "results": {
            "ruler": {"alias": "ruler", "4096,none": -1.0},
            "a": {"alias": "a", "4096,none": -1.0, "1024,none": 0.5, "1024_stderr,none": "N/A"},
            "b": {"alias": "b", "4096,none": -1.0, "1024,none": 1.0},
            "gsm8k": {"alias": "gsm8k", "sample_len": 2, "exact_match,strict-match": 0.25},
        },
        "group_subtasks": {"ruler": ["a", "b"], "gsm8k": []},
    }
    assert harness._metrics(found, [1024]) == {
        "ruler": {"1024,none": 0.75},
        "a": {"1024,none": 0.5},
        "b": {"1024,none": 1.0},
        "gsm8k": {"exact_match,strict-match": 0.25},
    }


@pytest.mark.parametrize("limit", [None, 3, 0.01])
def test_a_limit_counts_samples_of_each_length_of_ruler_and_rows_of_others(limit):
    assert harness._limited(limit, [{"task": "gsm8k"}], [512]) == {"limit": limit}
    found = harness._limited(limit, [{"task": "ruler_vt"}], [512, 1024])
    rows = {3: [0, 1, 2, 500, 501, 502], 0.01: [*range(5), *range(500, 505)]}
    assert found == ({"limit": None} if limit is None else {"samples": {"ruler_vt": rows[limit]}})


@pytest.mark.parametrize(
    ("task", "kwargs", "error", "message"),
    [
        ("no_such_task", {}, ValueError, "'no_such_task', which lm-evaluation-harness does not know"),
        ("ruler_vt", {}, ValueError, "`ruler_vt` .* does not end at 512 tokens"),
        ("niah_single_1", {"lengths": None}, ValueError, "Set `lengths`"),
        ("niah_single_1", {"harness_kwargs": {"limits": 3}}, ValueError, "'harness_kwargs' has 'limits'"),
        ("niah_single_1", {"harness_task_kwargs": {"gsm8k": {}}}, ValueError, "'gsm8k'.* not in `harness_tasks`"),
        ("gsm8k", {}, ValueError, r"fetch openai/gsm8k \(for gsm8k\), but HF_HUB_OFFLINE"),
        ("ruler", {"lengths": [4096]}, ValueError, "baber/paul_graham_essays.*SQuAD.*hotpotqa"),
        ("mmlu_pro", {}, ValueError, r"TIGER-Lab/MMLU-Pro \(for mmlu_pro_biology\)"),
        ("longbench", {}, ValueError, "Xnhyacinth/LongBench"),
        ("infinitebench", {}, ValueError, "xinrongzhang2022/InfiniteBench"),
        ("humaneval", {}, ValueError, "runs code that the model wrote.*HF_ALLOW_CODE_EVAL=1.*`code_eval` is fetched"),
    ],
)
def test_what_cannot_run_is_said_before_weights_load(
    index, arguments, monkeypatch, no_modules_missing, task, kwargs, error, message
):
    monkeypatch.setattr("dgrpo_trl.evaluation.runs.load_model", None)
    monkeypatch.setattr(harness.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(harness, "_is_cached", lambda source: False)
    with pytest.raises(error, match=message):
        EvaluationRun(arguments(task, **kwargs))


def test_code_of_the_model_runs_only_if_both_switches_are_on(index, arguments, monkeypatch):
    monkeypatch.setattr(harness, "_is_cached", lambda source: True)
    allowed = {"harness_task_kwargs": {"humaneval": {"confirm_run_unsafe_code": True}}}
    for kwargs, environment in ((allowed, "0"), ({}, "1")):
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", environment)
        with pytest.raises(ValueError, match="runs code"):
            harness.prepare_harness(arguments("humaneval", **kwargs))
    harness.prepare_harness(arguments("humaneval", **allowed))


def test_what_will_be_fetched_is_logged_and_looked_for(index, arguments, monkeypatch, caplog):
    asked = []

    def auth_check(self, repo, repo_type):
        asked.append((repo, repo_type))
        if repo == "Idavidrein/gpqa":
            raise OSError("gated")

    monkeypatch.setattr(harness.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(harness, "_is_cached", lambda source: False)
    monkeypatch.setattr(harness.HfApi, "auth_check", auth_check)
    with caplog.at_level(logging.WARNING):
        harness.prepare_harness(arguments("gsm8k"))
    assert asked == [("openai/gsm8k", "dataset")]
    assert "will fetch openai/gsm8k (for gsm8k)" in caplog.text
    with pytest.raises(ValueError, match="'Idavidrein/gpqa' .* cannot be read: gated.*accepted its terms"):
        harness.prepare_harness(arguments("gpqa_diamond_cot_zeroshot"))


def test_the_recipes_name_tasks_and_arguments_that_the_harness_knows(index, monkeypatch):
    monkeypatch.setattr(harness, "_check_data", lambda leaves: None)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    recipes = Path(__file__).parent.parent / "recipes" / "eval"
    checked = 0
    for path in recipes.glob("*.yaml"):
        (args,) = TrlParser((EvaluationArguments,)).parse_args_and_config(["--config", str(path)])
        if args.harness_tasks:
            args.harness_kwargs["confirm_run_unsafe_code"] = True
            args.harness_task_kwargs.pop("humaneval_instruct", None)
            harness.prepare_harness(args)
            checked += 1
    assert checked == 4


def test_a_missing_module_of_a_task_is_named(index, arguments, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wonderwords" else name)
    with pytest.raises(ImportError, match=r"'niah_single_1' needs wonderwords.*dgrpo-trl\[eval\]"):
        harness.prepare_harness(arguments("niah_single_1"))
