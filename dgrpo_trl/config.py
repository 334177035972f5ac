"""`DGRPOConfig`: TRL's `GRPOConfig` and the few fields that dGRPO adds."""

import math
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from .losses import DIVERGENCES


@dataclass
class DGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`DGRPOTrainer`].

    This class includes only the parameters that dGRPO adds to [`~trl.GRPOConfig`]; all of that class's parameters are
    accepted and keep their meaning. In particular `beta` stays the coefficient of the KL to the *reference* model; the
    paper's beta, the weight of the teacher, is `distill_coef`.

    Parameters:
        > Parameters that control the teacher model

        teacher_model_name_or_path (`str`, *optional*):
            Hub id or path of the teacher. `"base"` makes the PEFT student with its adapter off the teacher, without a
            second copy of the weights. May be given as the `teacher_model` argument of the trainer instead.
        teacher_model_revision (`str`, *optional*):
            Revision of the teacher: a branch, a tag or a commit.
        teacher_model_init_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for `AutoModelForCausalLM.from_pretrained` of the teacher. Its `dtype` and its
            `attn_implementation` default to the student's.
        teacher_prompt_column (`str`, *optional*, defaults to `"teacher_prompt"`):
            Column of the data set with a prompt for the teacher's eyes only. Where a row has one, the teacher scores
            the student's completion under it; elsewhere, and always if this is `None`, it reads the student's prompt,
            which is the paper's method.

        > Parameters that control the distillation

        distill_coef (`float`, *optional*, defaults to `0.5`):
            Weight of the teacher term, added to the GRPO loss: the paper's beta. `0` is plain GRPO and needs no
            teacher.
        distill_divergence (`str`, *optional*, defaults to `"reverse_kl"`):
            Divergence at every completion token, over the whole vocabulary: `"reverse_kl"` is KL(student || teacher),
            the paper's; `"forward_kl"` is KL(teacher || student); `"jsd"` is the generalised Jensen-Shannon
            divergence.
        distill_jsd_mixture (`float`, *optional*, defaults to `0.5`):
            Weight of the teacher in the mixture of `"jsd"`, between 0 and 1.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    # Parameters that control the teacher model
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or path of the teacher, or 'base' for the PEFT student with its adapter off."},
    )
    teacher_model_revision: str | None = field(
        default=None,
        metadata={"help": "Revision of the teacher: a branch, a tag or a commit."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained` of the teacher. Its dtype and "
            "attention implementation default to the student's."
        },
    )
    teacher_prompt_column: str | None = field(
        default="teacher_prompt",
        metadata={
            "help": "Data-set column with a prompt for the teacher alone. Rows without one, and all rows if this is "
            "None, are scored under the student's prompt."
        },
    )

    # Parameters that control the distillation
    distill_coef: float = field(
        default=0.5,
        metadata={"help": "Weight of the teacher term added to the GRPO loss. No unit, >= 0; 0 is plain GRPO."},
    )
    distill_divergence: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence between student and teacher at every completion token.",
            "choices": list(DIVERGENCES),
        },
    )
    distill_jsd_mixture: float = field(
        default=0.5,
        metadata={"help": "Weight of the teacher in the mixture of the Jensen-Shannon divergence, in (0, 1)."},
    )

    def __post_init__(self):
        super().__post_init__()
        if not (math.isfinite(self.distill_coef) and self.distill_coef >= 0):
            raise ValueError(
                f"`distill_coef` must be a finite number >= 0, got {self.distill_coef}. It weighs a divergence to be "
                "minimised. Set it to 0 to train with plain GRPO."
            )
        if self.distill_divergence not in DIVERGENCES:
            raise ValueError(
                f"`distill_divergence` is {self.distill_divergence!r}, which is not known. Choose one of "
                f"{', '.join(DIVERGENCES)}."
            )
        if not 0 < self.distill_jsd_mixture < 1:
            raise ValueError(
                f"`distill_jsd_mixture` must lie strictly between 0 and 1, got {self.distill_jsd_mixture}. At 0 and 1 "
                "the divergence vanishes: set `distill_divergence` to 'reverse_kl' or 'forward_kl' instead."
            )
