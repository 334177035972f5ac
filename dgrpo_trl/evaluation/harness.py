"""Tasks of lm-evaluation-harness (extra `eval`; 0.4.13): checked before weights load, run on the model that is loaded.

What it does around `lm_eval.simple_evaluate`, and why:

- RULER gives each length a metric of that name, and scores 4096 with -1 where it was not asked for. Lengths that were
  asked for are kept, and their mean over a group is taken here: the library's is of 4096 alone.
- `limit` takes the first rows, which are all of RULER's first length. Here it is samples of each length.
- `ruler_vt` below 1024 tokens does not end. It is refused.
- Data sets are fetched when a task is built, in the middle of a run. They are named and looked for before.
- HumanEval runs what the model wrote. The user has to say so.
"""

import importlib.util
import inspect
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import write_json
from .arguments import EvaluationArguments
from .generation import greedy_config


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


logger = logging.getLogger(__name__)

_MISSING = (
    "lm-evaluation-harness is not installed, but `harness_tasks` are set. Install it: `pip install dgrpo-trl[eval]`."
)
# Their YAML names no data set, but their code fetches one
_ESSAYS = ("baber/paul_graham_essays", "punkt_tab of nltk")
_FETCHED_BY_CODE = {
    **dict.fromkeys(
        ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"), _ESSAYS
    ),
    "ruler_qa_squad": ("https://rajpurkar.github.io (SQuAD)",),
    "ruler_qa_hotpot": ("hotpotqa/hotpot_qa",),
}
_LOCAL_FORMATS = {"json", "csv", "parquet", "text", "arrow"}
# Beside what comes with the extra: (beginning of a task's name, modules)
_MODULES = (
    (("ruler", "niah"), ("nltk", "wonderwords", "scipy")),
    (("ifeval",), ("langdetect", "immutabledict", "nltk")),
    (("longbench",), ("jieba", "fuzzywuzzy", "rouge")),
)
_OURS = {"model", "model_args", "tasks", "task_manager", "verbosity", "evaluation_tracker", "device"}
_RULER_VT_MIN_LENGTH = 1024
_RULER_SAMPLES = 500  # of each length, one length after the other


def prepare_harness(args: EvaluationArguments) -> "TaskManager":
    """Looks at the harness tasks of a run before weights load. Nothing is fetched; what will be is logged.

    Args:
        args ([`EvaluationArguments`]):
            The run. `lengths` are those of RULER.

    Returns:
        `lm_eval.tasks.TaskManager`: knows the tasks, and tells RULER lengths and tokenizer.

    Raises:
        ImportError: If the extra, or a module that a task needs, is missing.
        ValueError: If a task or an argument is unknown, a task would not end, a data set cannot be reached, or a task
            runs what the model wrote and nobody said that it may.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(_MISSING) from error
    allowed = set(inspect.signature(simple_evaluate).parameters) - _OURS
    for name, kwargs in {"harness_kwargs": args.harness_kwargs, **args.harness_task_kwargs}.items():
        if unknown := sorted(set(kwargs) - allowed):
            raise ValueError(
                f"{name!r} has {', '.join(map(repr, unknown))}, which `lm_eval.simple_evaluate` does not take, or "
                f"which is set here. Choose from {', '.join(sorted(allowed))}."
            )
    if unknown := sorted(set(args.harness_task_kwargs) - set(args.harness_tasks)):
        raise ValueError(f"`harness_task_kwargs` has {unknown}, which are not in `harness_tasks`. Add them there.")
    metadata = {"pretrained": args.model_name_or_path, "max_seq_lengths": args.lengths}
    manager = TaskManager(metadata=metadata | args.harness_kwargs.get("metadata", {}))
    configs = {task: _leaf_configs(manager, task) for task in args.harness_tasks}
    for task, leaves in configs.items():
        _check_task(args, task, leaves)
    _check_data([leaf for leaves in configs.values() for leaf in leaves])
    return manager


def run_harness(
    args: EvaluationArguments,
    manager: "TaskManager",
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None,
    folder: Path,
) -> dict[str, dict[str, float]]:
    """Runs the harness tasks that have no file in `folder` yet.

    Args:
        args ([`EvaluationArguments`]):
            The run.
        manager (`lm_eval.tasks.TaskManager`):
            What [`prepare_harness`] gave.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's.
        model ([`~transformers.PreTrainedModel`], *optional*):
            The model; without it lm_eval loads its own in vLLM.
        folder (`Path`):
            Keeps a file a task.

    Returns:
        `dict[str, dict[str, float]]`: from task (of a group: each of its tasks too) to metrics, named
        `"<metric>,<filter>"`; of RULER `"<length>,none"`.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval.evaluator_utils").addFilter(_is_news)
    results: dict[str, dict[str, float]] = {}
    for task in args.harness_tasks:
        path = folder / f"harness-{task}.json"
        if not path.exists():
            kwargs = {"bootstrap_iters": 0, **args.harness_kwargs, **args.harness_task_kwargs.get(task, {})}
            kwargs.pop("metadata", None)
            batch_size = kwargs.pop("batch_size", 1)
            kwargs |= _limited(kwargs.pop("limit", None), _leaf_configs(manager, task), args.lengths)
            if model is not None:
                model.generation_config = greedy_config(model.generation_config, tokenizer)
                lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
                found = simple_evaluate(model=lm, tasks=[task], task_manager=manager, log_samples=False, **kwargs)
            else:
                found = simple_evaluate(
                    **{"model": "vllm", "model_args": _vllm_args(args), "tasks": [task], "task_manager": manager},
                    **{"batch_size": batch_size, "log_samples": False, **kwargs},
                )
            write_json(path, _metrics(found, args.lengths))
        results |= json.loads(path.read_text(encoding="utf-8"))
    return results


def needs_model(args: EvaluationArguments, folder: Path) -> bool:
    """Whether a task of the harness is still to be run."""
    return any(not (folder / f"harness-{task}.json").exists() for task in args.harness_tasks or ())


def makes_prompts_to_length(manager: "TaskManager", tasks: Sequence[str]) -> bool:
    """Whether one of the tasks is of RULER, whose prompts are as long as `lengths` say."""
    return any(_is_ruler(leaf["task"]) for task in tasks for leaf in _leaf_configs(manager, task))


def _vllm_args(args: EvaluationArguments) -> dict[str, Any]:
    kwargs = {"pretrained": args.model_name_or_path, "dtype": args.dtype, "revision": args.model_revision}
    if args.chat_template_kwargs:
        kwargs["chat_template_args"] = args.chat_template_kwargs
    return {**kwargs, "trust_remote_code": args.trust_remote_code, **args.vllm_overrides(), **args.vllm_kwargs}


def _leaf_configs(manager: "TaskManager", name: str) -> list[dict[str, Any]]:
    """Configurations of a task, or of all tasks of a group or a tag; none of them is built."""
    entry = manager.task_index.get(name)
    if entry is None:
        raise ValueError(
            f"`harness_tasks` has {name!r}, which lm-evaluation-harness does not know. `lm-eval ls tasks` lists what "
            "it does. Name one of these, or set `tasks` for those made here."
        )
    if entry.kind.name == "TAG":
        return [leaf for child in sorted(entry.tags) for leaf in _leaf_configs(manager, child)]
    if entry.kind.name != "GROUP":
        return [{**(entry.cfg or {}), "task": name}]
    leaves = []
    for child in entry.cfg["task"]:
        child = child if isinstance(child, str) else child.get("task") or child.get("group")
        leaves += _leaf_configs(manager, child) if child in manager.task_index else []
    return leaves


def _is_ruler(name: str) -> bool:
    return name.startswith(("ruler", "niah_"))


def _limited(limit: float | None, leaves: Sequence[dict[str, Any]], lengths: Sequence[int]) -> dict[str, Any]:
    """`limit` as `simple_evaluate` takes it; of RULER's tasks, by the numbers of the rows."""
    names = [leaf["task"] for leaf in leaves]
    if limit is None or not all(map(_is_ruler, names)):
        return {"limit": limit}
    number = math.ceil(limit * _RULER_SAMPLES) if limit < 1 else min(int(limit), _RULER_SAMPLES)
    rows = [_RULER_SAMPLES * i + j for i in range(len(lengths)) for j in range(number)]
    return {"samples": {name: rows for name in names}}


def _check_task(args: EvaluationArguments, task: str, leaves: Sequence[dict[str, Any]]) -> None:
    names = [leaf["task"] for leaf in leaves]
    for prefixes, modules in _MODULES:
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing and any(name.startswith(prefixes) for name in names):
            raise ImportError(
                f"{task!r} needs {', '.join(missing)}, which is not installed. Install it: `pip install "
                "dgrpo-trl[eval]`."
            )
    if any(map(_is_ruler, names)) and not args.lengths:
        raise ValueError(f"{task!r} makes its prompts to a length. Set `lengths`, in tokens, for instance to 4096.")
    if "ruler_vt" in names and min(args.lengths) < _RULER_VT_MIN_LENGTH:
        raise ValueError(
            f"`ruler_vt` of lm-evaluation-harness does not end at {min(args.lengths)} tokens. Raise `lengths` to "
            f"{_RULER_VT_MIN_LENGTH} or more, or take 'vt' of `tasks`, which is made here."
        )
    kwargs = {**args.harness_kwargs, **args.harness_task_kwargs.get(task, {})}
    is_unsafe = any(leaf.get("unsafe_code") for leaf in leaves)
    if is_unsafe and not (kwargs.get("confirm_run_unsafe_code") and os.environ.get("HF_ALLOW_CODE_EVAL") == "1"):
        raise ValueError(
            f"{task!r} runs code that the model wrote, on this machine. Where that is safe (a container without "
            "secrets), set `confirm_run_unsafe_code: true` in `harness_kwargs` and HF_ALLOW_CODE_EVAL=1 in the "
            "environment. Its metric `code_eval` is fetched from the Hub too."
        )


def _check_data(leaves: Sequence[dict[str, Any]]) -> None:
    """Names what will be fetched, and looks whether it can be."""
    sources: dict[str, str] = {}
    for leaf in leaves:
        path = str(leaf.get("dataset_path") or "")
        fetched = () if path in _LOCAL_FORMATS or Path(path).exists() or not path else (path,)
        code_eval = ("evaluate-metric/code_eval (a space)",) if leaf.get("unsafe_code") else ()
        for source in (*fetched, *_FETCHED_BY_CODE.get(leaf["task"], ()), *code_eval):
            sources.setdefault(source, leaf["task"])
    missing = {source: task for source, task in sources.items() if not _is_cached(source)}
    if not missing:
        return
    listed = ", ".join(f"{source} (for {task})" for source, task in missing.items())
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE") == "1":
        raise ValueError(
            f"The harness tasks fetch {listed}, but HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set and they are not in "
            "the cache. Run it once with a network, or take tasks that make their data: niah_single_1, "
            "niah_multikey_2, niah_multikey_3, ruler_vt, ruler_cwe, ruler_fwe, or any of `tasks`."
        )
    logger.warning("The harness tasks will fetch %s.", listed)
    for source, task in missing.items():
        if source.count("/") != 1 or " " in source:
            continue
        try:
            HfApi().auth_check(source, repo_type="dataset")
        except (OSError, HfHubHTTPError) as error:  # OSError: no network, or no such name
            raise ValueError(
                f"The data set {source!r} of {task!r} cannot be read: {error} It is fetched from the Hub. Check the "
                "network, and for a gated set that you accepted its terms and are logged in (`hf auth login`)."
            ) from error


def _is_cached(source: str) -> bool:
    from datasets import config

    names = (
        Path(constants.HF_HUB_CACHE) / f"datasets--{source.replace('/', '--')}",
        Path(config.HF_DATASETS_CACHE) / source.replace("/", "___").lower(),
        Path(config.HF_DATASETS_CACHE) / source.replace("/", "___"),
    )
    return "/" in source and any(name.exists() for name in names)


def _metrics(found: dict[str, Any], lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """The numbers of `simple_evaluate`, those of RULER at the lengths that were asked for."""
    results = {}
    for task, values in found["results"].items():
        results[task] = {
            key: float(value)
            for key, value in values.items()
            if isinstance(value, int | float) and "," in key and not _is_of_another_length(key, value, lengths)
        }
    for group, children in found.get("group_subtasks", {}).items():
        keys = [f"{length},none" for length in lengths]
        scores = {key: [results[child][key] for child in children if key in results.get(child, {})] for key in keys}
        if children and all(scores.values()):
            results[group] = {key: math.fsum(values) / len(values) for key, values in scores.items()}
    return {task: values for task, values in results.items() if values}


def _is_of_another_length(key: str, value: float, lengths: Sequence[int]) -> bool:
    """-1 is what RULER's tasks say at a length at which there is no sample."""
    name = key.split(",")[0].removesuffix("_stderr")
    return name.isdigit() and (int(name) not in lengths or value == -1)


def _is_news(record: logging.LogRecord) -> bool:
    """Not so the warning of each length of RULER that is not among those of its YAML: a mean is what is wanted."""
    return "No aggregation function defined" not in record.getMessage()
