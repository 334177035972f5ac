"""What `DGRPOTrainer` settles before any weight loads: defaults, tokenizer, teacher; and what it refuses."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import DatasetDict, IterableDatasetDict
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .checks import image_problems, missing_reward_problems, raise_problems, run_findings
from .config import DGRPOConfig
from .data_loading import AnyDataset
from .models import read_models, refuse_adapter
from .row_checks import named_datasets
from .teacher import resolve_teacher
from .trl_compat import get_config_model_id, keep_to_one_gpu


if TYPE_CHECKING:
    from peft import PeftModel

logger = get_logger(__name__)

AnyDatasets: TypeAlias = AnyDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset]
ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin


@dataclass(frozen=True)
class PreparedRun:
    """The trainer's arguments, checked.

    Args:
        args ([`DGRPOConfig`]), processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Defaults filled in.
        reward_funcs (`list`):
            A copy, as TRL writes into it.
        teacher (`str` or [`~transformers.PreTrainedModel`], *optional*):
            `None` where none is used.
        positions (`dict[str, int | None]`):
            Of each model that reads prompts, by what messages call it.
        unshared_ids (`tuple[int, ...]`):
            Ids that are a token of student or teacher alone.
    """

    args: DGRPOConfig
    processing_class: ProcessingClass
    reward_funcs: list[Any]
    teacher: str | PreTrainedModel | None
    positions: dict[str, int | None]
    unshared_ids: tuple[int, ...]


def prepare(
    model: "str | PreTrainedModel | PeftModel",
    reward_funcs: Any,
    args: DGRPOConfig | None,
    train_dataset: AnyDataset | None,
    eval_dataset: AnyDatasets | None,
    processing_class: ProcessingClass | None,
    peft_config: Any,
    tools: list[Callable] | None,
    rollout_func: Callable | None,
    environment_factory: Callable | dict[str, Callable] | None,
    teacher_model: str | PreTrainedModel | None,
    is_subclass: bool = False,
) -> PreparedRun:
    """Checks the arguments of [`DGRPOTrainer`], or of a subclass of it.

    Raises:
        ValueError, TypeError, NotImplementedError: See [`DGRPOTrainer`].
    """
    args = _checked_args(args, model)
    has_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
    teacher = resolve_teacher(teacher_model, args, model, has_adapter)
    if teacher is not None and args.distill_coef == 0:
        logger.warning("`distill_coef` is 0: the teacher is not loaded, and training is plain GRPO.")
        teacher = None
    reward_funcs = _listed(reward_funcs)
    if not (reward_funcs or environment_factory or teacher is not None):
        raise ValueError(
            "No reward source provided. Pass `reward_funcs`, or an `environment_factory` whose environment defines a "
            "`get_reward` method; or a teacher, `teacher_model` with `distill_coef > 0`, to learn from it alone."
        )
    raise_problems(missing_reward_problems(args, bool(reward_funcs or environment_factory)))
    datasets = named_datasets(train_dataset, eval_dataset)
    if processing_class is None:
        processing_class = _load_processing_class(model, args)
    if teacher is not None and (problems := image_problems(datasets)):
        raise NotImplementedError(problems[0])
    models = read_models(model, teacher, args, getattr(processing_class, "tokenizer", processing_class))
    findings = run_findings(
        args,
        models,
        datasets,
        args.world_size,
        tools,
        needs_prompts=environment_factory is None,
        # What a `rollout_func` returns, and what a subclass adds, are columns too
        reward_funcs=reward_funcs if rollout_func is None and not is_subclass else (),
    )
    for warning in findings.warnings:
        logger.warning(warning)
    findings.raise_for_problems()
    if args.n_gpu > 1:
        logger.warning(
            f"This process sees {args.n_gpu} GPUs and trains on {args.device} alone. To use them all, start it with "
            "`accelerate launch` and a configuration from `recipes/accelerate_configs`."
        )
        keep_to_one_gpu(args, loads_model=isinstance(model, str))
    if not reward_funcs and teacher is not None:
        reward_funcs = [no_reward]
    return PreparedRun(args, processing_class, reward_funcs, teacher, models.positions(), models.unshared_ids)


def no_reward(completions: list, **kwargs: Any) -> list[float]:
    """Stands in where there is a teacher and no reward function: equal rewards, hence zero advantages."""
    return [0.0] * len(completions)


def _checked_args(args: DGRPOConfig | None, model: "str | PreTrainedModel | PeftModel") -> DGRPOConfig:
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return DGRPOConfig(f"{name.split('/')[-1]}-dGRPO")
    if not isinstance(args, DGRPOConfig):
        raise TypeError(f"`args` is a {type(args).__name__}. `DGRPOTrainer` needs the fields of a `DGRPOConfig`.")
    return args


def _listed(reward_funcs: Any) -> list[Any]:
    if isinstance(reward_funcs, list):
        return list(reward_funcs)
    return [] if reward_funcs is None else [reward_funcs]


def _load_processing_class(model: "str | PreTrainedModel | PeftModel", args: DGRPOConfig) -> ProcessingClass:
    if isinstance(model, str) and Path(model).is_dir():
        refuse_adapter(model)
    # With the arguments that the parent uses: it is passed on, so that it is loaded once
    loaded: ProcessingClass = AutoProcessor.from_pretrained(
        model if isinstance(model, str) else get_config_model_id(model.config),
        revision=(args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None,
        truncation_side="left",
        padding_side="left",
        trust_remote_code=args.trust_remote_code,
    )
    return loaded
