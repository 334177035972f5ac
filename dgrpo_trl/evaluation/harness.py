"""Tasks of lm-evaluation-harness (extra `eval`; 0.4.13): checked before weights load, run on the loaded model.

What it adds to `lm_eval.simple_evaluate`, and why:

- Data sets are downloaded when a task is built, in the middle of a run. Here they are named and checked before.
- HumanEval runs code that the model wrote. The user has to allow it.
- RULER is refused: [`ruler`] makes its tasks offline, and counts the chat template in their lengths.
"""

import importlib.util
import inspect
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..extras import import_extra
from ..files import write_json
from .arguments import EvaluationArguments
from .generation import greedy_config


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


logger = logging.getLogger(__name__)

_LOCAL_FORMATS = {"json", "csv", "parquet", "text", "arrow"}
# Beyond what the extra `eval` installs: (beginning of a task's name, modules)
_MODULES = (
    ("ifeval", ("langdetect", "immutabledict", "nltk")),
    ("longbench", ("jieba", "fuzzywuzzy", "rouge")),
)
# Arguments of `simple_evaluate` that are set here
_RESERVED = {"model", "model_args", "tasks", "task_manager", "verbosity", "evaluation_tracker", "device"}


def prepare_harness(args: EvaluationArguments) -> "TaskManager":
    """Checks the harness tasks of a run before weights load. Nothing is downloaded; what will be is logged.

    Raises:
        ImportError: If the extra, or a module that a task needs, is missing.
        ValueError: If a task or an argument is unknown, a task is one of RULER, a data set is unreachable, or a task
            runs code that the model wrote and this is not allowed.
    """
    lm_eval = import_extra("lm_eval", "A task of `harness_tasks`", "eval")
    from lm_eval.tasks import TaskManager

    allowed = set(inspect.signature(lm_eval.simple_evaluate).parameters) - _RESERVED
    for name, kwargs in {"harness_kwargs": args.harness_kwargs, **args.harness_task_kwargs}.items():
        if unknown := sorted(set(kwargs) - allowed):
            raise ValueError(
                f"{name!r} has {', '.join(map(repr, unknown))}, which `lm_eval.simple_evaluate` does not take, or "
                f"which is set by other arguments. Choose from {', '.join(sorted(allowed))}."
            )
    if unknown := sorted(set(args.harness_task_kwargs) - set(args.harness_tasks or ())):
        raise ValueError(f"`harness_task_kwargs` has {unknown}, which are not in `harness_tasks`. Add them there.")
    metadata = {"pretrained": args.model_name_or_path}
    manager = TaskManager(metadata=metadata | args.harness_kwargs.get("metadata", {}))
    configs = {task: _leaf_configs(manager, task) for task in args.harness_tasks or ()}
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
    """Runs the harness tasks that have no file in `folder` yet; without a `model`, lm_eval loads its own in vLLM.

    The metrics are by task (of a group: each of its tasks too), and named `"<metric>,<filter>"`.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    results: dict[str, dict[str, float]] = {}
    for task in args.harness_tasks or ():
        path = folder / f"harness-{task}.json"
        if not path.exists():
            kwargs = {"bootstrap_iters": 0, **args.harness_kwargs, **args.harness_task_kwargs.get(task, {})}
            kwargs.pop("metadata", None)
            batch_size = kwargs.pop("batch_size", 1)
            if model is not None:
                model.generation_config = greedy_config(model.generation_config, tokenizer)
                lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
                found = simple_evaluate(model=lm, tasks=[task], task_manager=manager, log_samples=False, **kwargs)
            else:
                found = simple_evaluate(
                    **{"model": "vllm", "model_args": _vllm_args(args), "tasks": [task], "task_manager": manager},
                    **{"batch_size": batch_size, "log_samples": False, **kwargs},
                )
            write_json(path, _metrics(found))
        results |= json.loads(path.read_text(encoding="utf-8"))
    return results


def needs_model(args: EvaluationArguments, folder: Path) -> bool:
    """Whether a task of the harness is still to be run."""
    return any(not (folder / f"harness-{task}.json").exists() for task in args.harness_tasks or ())


def _vllm_args(args: EvaluationArguments) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"pretrained": args.model_name_or_path, "dtype": args.dtype}
    kwargs["revision"] = args.model_revision
    if args.chat_template_kwargs:
        kwargs["chat_template_args"] = args.chat_template_kwargs
    return {**kwargs, "trust_remote_code": args.trust_remote_code, **args.vllm_overrides(), **args.vllm_kwargs}


def _leaf_configs(manager: "TaskManager", name: str) -> list[dict[str, Any]]:
    """Configurations of a task, or of all tasks of a group or a tag; none of them is built."""
    entry = manager.task_index.get(name)
    if entry is None:
        raise ValueError(
            f"`harness_tasks` has {name!r}, which lm-evaluation-harness does not know. `lm-eval ls tasks` lists the "
            "known ones. Name one of these, or set `tasks` for those of this package."
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


def _check_task(args: EvaluationArguments, task: str, leaves: Sequence[dict[str, Any]]) -> None:
    names = [leaf["task"] for leaf in leaves]
    if ruler := next((name for name in (task, *names) if name.startswith(("ruler", "niah"))), None):
        raise ValueError(
            f"`harness_tasks` has {task!r}{'' if ruler == task else f' with {ruler!r}'}. RULER is not taken from "
            "lm-evaluation-harness: `tasks` has it, made offline, with the chat template counted in its lengths. Set "
            "`tasks: [all]` or some of their names, and `lengths`."
        )
    for prefix, modules in _MODULES:
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing and any(name.startswith(prefix) for name in names):
            raise ImportError(
                f"{task!r} needs {', '.join(missing)}, which is not installed. Install it: `pip install "
                "dgrpo-trl[eval]`."
            )
    kwargs = {**args.harness_kwargs, **args.harness_task_kwargs.get(task, {})}
    is_unsafe = any(leaf.get("unsafe_code") for leaf in leaves)
    if is_unsafe and not (kwargs.get("confirm_run_unsafe_code") and os.environ.get("HF_ALLOW_CODE_EVAL") == "1"):
        raise ValueError(
            f"{task!r} runs code that the model wrote, on this machine. Where that is safe (a container without "
            "secrets), set `confirm_run_unsafe_code: true` in `harness_kwargs` and HF_ALLOW_CODE_EVAL=1 in the "
            "environment. Its metric `code_eval` is downloaded from the Hub too."
        )


def _check_data(leaves: Sequence[dict[str, Any]]) -> None:
    """Names what will be downloaded, and checks that it can be."""
    sources: dict[str, str] = {}
    for leaf in leaves:
        path = str(leaf.get("dataset_path") or "")
        if path and path not in _LOCAL_FORMATS and not Path(path).exists():
            sources.setdefault(path, leaf["task"])
        if leaf.get("unsafe_code"):
            sources.setdefault("evaluate-metric/code_eval (a space)", leaf["task"])
    missing = {source: task for source, task in sources.items() if not _is_cached(source)}
    if not missing:
        return
    listed = ", ".join(f"{source} (for {task})" for source, task in missing.items())
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE") == "1":
        raise ValueError(
            f"The harness tasks need {listed}, but HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set and they are not in "
            "the cache. Run them once with a network, or set `tasks`, which need no data."
        )
    logger.warning("The harness tasks will download %s.", listed)
    for source, task in missing.items():
        if source.count("/") != 1 or " " in source:
            continue
        try:
            HfApi().auth_check(source, repo_type="dataset")
        except (OSError, HfHubHTTPError) as error:  # OSError: no network, or no such name
            raise ValueError(
                f"The data set {source!r} of {task!r} cannot be read: {error} It comes from the Hub. Check the "
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


def _metrics(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of `simple_evaluate`."""
    results = {
        task: {key: float(value) for key, value in values.items() if isinstance(value, int | float) and "," in key}
        for task, values in found["results"].items()
    }
    return {task: values for task, values in results.items() if values}
