"""What a run knows of its models before their weights load: configurations, tokenizers, vocabularies."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, find_adapter_config_file
from trl import SFTConfig

from .config import DGRPOConfig
from .ends import Ends, read_ends
from .positions import POSITION_ARGUMENTS, trained_positions
from .trl_compat import base_model, get_config_model_id
from .vocabularies import unshared_ids


# As a teacher's name: the PEFT student with its adapter off
BASE_TEACHER = "base"


@dataclass(frozen=True)
class Models:
    """The models of a run, without weights.

    Args:
        student ([`~transformers.PreTrainedConfig`]):
            The student's configuration, as it is trained.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's.
        stored_student ([`~transformers.PreTrainedConfig`]):
            The student's configuration as it lies beside the weights.
        teacher ([`~transformers.PreTrainedConfig`], *optional*):
            The teacher's; for `"base"` the student's own. `None` without a teacher.
        teacher_vocab (`dict[str, int]`, *optional*):
            The teacher's tokens and their ids; `None` where they are not known.
        student_ends ([`Ends`], *optional*), teacher_ends ([`Ends`], *optional*):
            How they end a text, with a teacher that is not the student.
    """

    student: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    stored_student: PreTrainedConfig
    teacher: PreTrainedConfig | None = None
    teacher_vocab: dict[str, int] | None = None
    student_ends: Ends | None = None
    teacher_ends: Ends | None = None

    @property
    def unshared_ids(self) -> tuple[int, ...]:
        """Ids that are a token of one of the two models alone."""
        return unshared_ids(self.tokenizer.get_vocab(), self.teacher_vocab)

    def positions(self) -> dict[str, int | None]:
        """Positions of each model that reads prompts, by what messages call it."""
        models = {"the student": self.student, "the teacher": self.teacher}
        return {name: trained_positions(config) for name, config in models.items() if config is not None}


def read_models(
    student: str | nn.Module,
    teacher: str | PreTrainedModel | None,
    args: DGRPOConfig | SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Models:
    """What is known of models that are Hub ids, paths or loaded; the teacher `"base"` is the student itself.

    Raises:
        ValueError: If the teacher's configuration or tokenizer cannot be read.
    """
    if isinstance(student, str):
        kwargs = args.model_init_kwargs or {}
        hub_kwargs = {"revision": kwargs.get("revision"), "trust_remote_code": args.trust_remote_code}
        config = load_config(student, kwargs, **hub_kwargs)
        has_changes = any(kwargs.get(name) is not None for name in POSITION_ARGUMENTS)
        stored_config = load_config(student, **hub_kwargs) if has_changes else config
    else:
        config = stored_config = student.config
    if teacher is None:
        return Models(config, tokenizer, stored_config)
    if teacher == BASE_TEACHER:
        return Models(config, tokenizer, stored_config, config, tokenizer.get_vocab())
    teacher_config, teacher_tokenizer = load_teacher_config(teacher, args), load_teacher_tokenizer(teacher, args)
    template_kwargs = args.chat_template_kwargs if isinstance(args, DGRPOConfig) else None
    hub_kwargs = {"revision": (args.model_init_kwargs or {}).get("revision")}
    return Models(
        config,
        tokenizer,
        stored_config,
        teacher_config,
        None if teacher_tokenizer is None else teacher_tokenizer.get_vocab(),
        read_ends(tokenizer, config, _generation_config(student, **hub_kwargs), template_kwargs),
        read_ends(
            teacher_tokenizer,
            teacher_config,
            _generation_config(teacher, **teacher_hub_kwargs(args)),
            template_kwargs,
        ),
    )


def _generation_config(model: str | nn.Module, **hub_kwargs: Any) -> GenerationConfig | None:
    """That of a model; `None` where there is none beside its weights."""
    if not isinstance(model, str):
        return base_model(model).generation_config
    try:
        return GenerationConfig.from_pretrained(model, **hub_kwargs)
    except OSError:
        return None


def load_config(name_or_path: str, init_kwargs: dict[str, Any] | None = None, **hub_kwargs: Any) -> PreTrainedConfig:
    """A model's configuration, with the positions that `from_pretrained` would give it for these `init_kwargs`.

    `hub_kwargs` are `revision` and `trust_remote_code`.
    """
    given = init_kwargs or {}
    changes = {name: given[name] for name in POSITION_ARGUMENTS if given.get(name) is not None}
    try:
        return AutoConfig.from_pretrained(name_or_path, **hub_kwargs, **changes)
    except (OSError, ValueError):
        refuse_adapter(name_or_path, **hub_kwargs)
        raise


def refuse_adapter(name_or_path: str, **hub_kwargs: Any) -> None:
    """Raises [`ValueError`] for a folder, or a Hub id, that holds a PEFT adapter and no model.

    Where a model's configuration lies beside it, transformers loads both.
    """
    path = Path(name_or_path)
    if (path / CONFIG_NAME).exists():
        return
    found = find_adapter_config_file(name_or_path, revision=hub_kwargs.get("revision"))
    if found is None:
        return
    base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    merged = f"{name_or_path.rstrip('/')}-merged"
    tokenizer = base if path.is_dir() and not (path / "tokenizer_config.json").exists() else name_or_path
    raise ValueError(
        f"{name_or_path!r} is a PEFT adapter of {base!r}, and no model: the weights of the base are not in it. Merge "
        f"both, and name {merged!r}:\n"
        f"peft.AutoPeftModelForCausalLM.from_pretrained({name_or_path!r}).merge_and_unload()"
        f".save_pretrained({merged!r})\n"
        f"transformers.AutoTokenizer.from_pretrained({tokenizer!r}).save_pretrained({merged!r})\n"
        "A student that is to be trained on as an adapter is passed to the trainer as a `PeftModel`, loaded with "
        "`is_trainable=True`."
    )


def load_student_tokenizer(
    name_or_path: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The student's tokenizer.

    Raises:
        ValueError: If it cannot be read.
    """
    if Path(name_or_path).is_dir():
        refuse_adapter(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The student {name_or_path!r} cannot be read: {error} Check `model_name_or_path`; where it is the output "
            "of an earlier stage, run that first, or name the model that it starts from for a dry run."
        ) from error


def load_teacher_config(teacher: str | PreTrainedModel, args: DGRPOConfig) -> PreTrainedConfig:
    """The teacher's configuration.

    Raises:
        ValueError: If it cannot be read.
    """
    if not isinstance(teacher, str):
        return teacher.config
    if Path(teacher).is_dir():
        refuse_adapter(teacher)
    try:
        return load_config(teacher, teacher_init_kwargs(args), **teacher_hub_kwargs(args))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The teacher {teacher!r} cannot be read: {error} Check the id or the path in "
            "`teacher_model_name_or_path` or `teacher_model`, and that this machine may reach and access it."
        ) from error


def load_teacher_tokenizer(teacher: str | PreTrainedModel, args: DGRPOConfig) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer; `None` for a loaded model that has none beside its weights.

    Raises:
        ValueError: If a teacher that is not loaded has no tokenizer.
    """
    name = teacher if isinstance(teacher, str) else get_config_model_id(teacher.config)
    reason = "there is none."
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **teacher_hub_kwargs(args)) if name else None
    except (OSError, ValueError) as error:
        tokenizer, reason = None, str(error)
    # Where the files are missing, transformers builds a tokenizer of special tokens alone
    if tokenizer is not None and not set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        return tokenizer
    if not isinstance(teacher, str):
        return None
    raise ValueError(
        f"The teacher {name!r} has no tokenizer that can be read: {reason} Without it, nothing shows that its token "
        "ids mean what the student's mean. Save the tokenizer beside the weights."
    )


def teacher_hub_kwargs(args: DGRPOConfig) -> dict[str, Any]:
    """Where on the Hub the teacher's configuration, tokenizer and weights are, and whether their code may run."""
    kwargs: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if args.teacher_model_revision is not None:
        kwargs["revision"] = args.teacher_model_revision
    given = teacher_init_kwargs(args)
    return kwargs | {name: given[name] for name in ("trust_remote_code", "revision") if name in given}


def teacher_init_kwargs(args: DGRPOConfig) -> dict[str, Any]:
    """`teacher_model_init_kwargs`, which the configuration has parsed where it was JSON.

    Raises:
        ValueError: If it was a string, but no JSON object.
    """
    given = args.teacher_model_init_kwargs or {}
    if isinstance(given, str):
        raise ValueError(
            f"`teacher_model_init_kwargs` is {given!r}. It maps the arguments of `from_pretrained` to values. Write a "
            "JSON object."
        )
    return given


def teacher_dtype(args: DGRPOConfig, student_dtype: Any) -> Any:
    """The dtype that the teacher is loaded in: the one that is given, else bfloat16 for `bf16`, else the student's.

    The student's weights may be float32 for the optimizer; those of the teacher are not trained.
    """
    return teacher_init_kwargs(args).get("dtype") or ("bfloat16" if args.bf16 else student_dtype)
