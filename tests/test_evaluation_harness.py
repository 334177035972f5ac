"""lm-evaluation-harness: what is checked before weights load, and a task of its own, offline, from end to end."""

import importlib.util
import json
import logging
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import yaml
from trl import TrlParser

from dgrpo_trl.evaluation.arguments import EvaluationArguments
from dgrpo_trl.evaluation.harness import prepare_harness
from dgrpo_trl.evaluation.runs import EvaluationRun


lm_eval_tasks = pytest.importorskip("lm_eval.tasks")


@pytest.fixture(scope="module")
def local_task(tmp_path_factory):
    """A folder with the task `ships`, which needs no download."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"What is the number of ship {i}?", "answer": str(i)} for i in range(5)]
    (folder / "ships.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        **{"task": "ships", "dataset_path": "json", "test_split": "test", "output_type": "generate_until"},
        **{"dataset_kwargs": {"data_files": {"test": str(folder / "ships.jsonl")}}},
        **{"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"},
        "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "ships.yaml").write_text(yaml.safe_dump(task))
    return str(folder)


# Folders of the tasks below: the index of all of them takes half a minute
FOLDERS = ["gpqa", "gsm8k", "hendrycks_math", "humaneval", "ifeval", "infinitebench", "longbench", "mmlu_pro", "ruler"]


@pytest.fixture(scope="module", autouse=True)
def index(local_task):
    """The task manager knows these tasks alone."""
    tasks = Path(lm_eval_tasks.__file__).parent

    class Few(lm_eval_tasks.TaskManager):
        def __init__(self, metadata=None):
            folders = [local_task, *(str(tasks / folder) for folder in FOLDERS)]
            super().__init__(include_path=folders, include_defaults=False, metadata=metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval_tasks, "TaskManager", Few)
        yield


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """Empty caches of the Hub, which is offline; gives a function that puts a data set into one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return lambda name: (tmp_path / "hub" / f"datasets--{name.replace('/', '--')}").mkdir(parents=True)


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


def test_a_task_runs_offline_and_is_not_run_twice(arguments):
    args = arguments("ships", harness_kwargs={"limit": 2})
    results = EvaluationRun(args).run()
    assert results["harness"] == {"ships": {"exact_match,none": 0.0}}
    (file,) = Path(args.output_dir, "cells").iterdir()
    assert file.name == "harness-ships.json"
    file.write_text(json.dumps({"ships": {"exact_match,none": 0.5}}))
    assert EvaluationRun(args).run()["harness"] == {"ships": {"exact_match,none": 0.5}}


@pytest.mark.parametrize(
    ("task", "named"),
    [
        *((task, f"`harness_tasks` has '{task}'. RULER") for task in ("ruler", "niah_single_1", "ruler_vt")),
        ("longcxt", "`harness_tasks` has 'longcxt' with 'niah_"),
    ],
)
def test_ruler_is_refused_with_where_it_is(arguments, task, named):
    with pytest.raises(ValueError, match=rf"{named}.*Set `tasks: \[all\]`.*`lengths`"):
        prepare_harness(arguments(task))


@pytest.mark.parametrize(
    ("task", "kwargs", "error", "message"),
    [
        ("no_such_task", {}, ValueError, "'no_such_task', which lm-evaluation-harness does not know"),
        ("ships", {"harness_kwargs": {"limits": 3}}, ValueError, "'harness_kwargs' has 'limits'"),
        ("ships", {"harness_task_kwargs": {"gsm8k": {}}}, ValueError, "'gsm8k'.* not in `harness_tasks`"),
        ("gsm8k", {}, ValueError, r"need openai/gsm8k \(for gsm8k\), but HF_HUB_OFFLINE"),
        ("mmlu_pro", {}, ValueError, r"TIGER-Lab/MMLU-Pro \(for mmlu_pro_biology\)"),
        ("longbench", {}, ValueError, "Xnhyacinth/LongBench"),
        ("infinitebench", {}, ValueError, "xinrongzhang2022/InfiniteBench"),
        (
            "humaneval",
            {},
            ValueError,
            "runs code that the model wrote.*HF_ALLOW_CODE_EVAL=1.*`code_eval` is downloaded",
        ),
    ],
)
def test_what_cannot_run_raises_before_weights_load(arguments, monkeypatch, hub_cache, task, kwargs, error, message):
    monkeypatch.setattr("dgrpo_trl.evaluation.runs.load_model", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # no module is missing
    with pytest.raises(error, match=message):
        EvaluationRun(arguments(task, **kwargs))


def test_code_of_the_model_runs_only_if_both_switches_are_on(arguments, monkeypatch, hub_cache):
    allowed = {"harness_task_kwargs": {"humaneval": {"confirm_run_unsafe_code": True}}}
    for kwargs, environment in ((allowed, "0"), ({}, "1")):
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", environment)
        with pytest.raises(ValueError, match="runs code"):
            prepare_harness(arguments("humaneval", **kwargs))
    hub_cache("openai/openai_humaneval")
    with pytest.raises(ValueError, match=r"need evaluate-metric/code_eval \(a space\)"):  # this far
        prepare_harness(arguments("humaneval", **allowed))


def test_data_in_the_cache_is_not_asked_for(arguments, hub_cache):
    hub_cache("openai/gsm8k")
    prepare_harness(arguments("gsm8k"))


def test_what_will_be_downloaded_is_logged_and_looked_for(arguments, monkeypatch, hub_cache, caplog):
    asked = []

    def auth_check(self, repo, repo_type):
        asked.append((repo, repo_type))
        if repo == "Idavidrein/gpqa":
            raise OSError("gated")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    with caplog.at_level(logging.WARNING):
        prepare_harness(arguments("gsm8k"))
    assert asked == [("openai/gsm8k", "dataset")]
    assert "will download openai/gsm8k (for gsm8k)" in caplog.text
    with pytest.raises(ValueError, match="'Idavidrein/gpqa' .* cannot be read: gated.*accepted its terms"):
        prepare_harness(arguments("gpqa_diamond_cot_zeroshot"))


def test_the_recipes_name_tasks_and_arguments_that_the_harness_knows(monkeypatch, hub_cache):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *args, **kwargs: None)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    recipes = Path(__file__).parent.parent / "recipes" / "eval"
    checked = 0
    for path in recipes.glob("*.yaml"):
        (args,) = TrlParser((EvaluationArguments,)).parse_args_and_config(["--config", str(path)])
        if args.harness_tasks:
            args.harness_kwargs["confirm_run_unsafe_code"] = True
            args.harness_task_kwargs.pop("humaneval_instruct", None)
            prepare_harness(args)
            checked += 1
    assert checked == 3


def test_a_missing_module_of_a_task_is_named(arguments, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "langdetect" else name)
    with pytest.raises(ImportError, match=r"'ifeval' needs langdetect.*dgrpo-trl\[eval\]"):
        prepare_harness(arguments("ifeval"))
