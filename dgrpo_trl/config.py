"""Every key of a training recipe that is not TRL's: those of the trainer, of the data, and of the dry run.

TRL's own are the fields of `GRPOConfig` or `SFTConfig`, `ModelConfig` and `ScriptArguments`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from trl import GRPOConfig, ScriptArguments, SFTConfig

from .gpus import GPUS
from .losses import DIVERGENCES
from .schedule import SCHEDULES, Schedule, read_schedule
from .shared_prefix import BACKEND_CHOICES, check_backend


SHARED_PREFIX_MODES = ("auto", "on", "off")
GATES = ("all", "below_reward", "no_variance")
_KEEP_SPECIAL_TOKENS_HELP = (
    "Special tokens of the tokenizer that are meant where they stand in prompts, in what tools return and in what "
    "environments show; 'all' keeps all of them. Others are broken up, so that a document cannot end a turn. Give it "
    "to every stage of a model."
)


@dataclass
class DGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`DGRPOTrainer`].

    This class includes only the parameters that dGRPO adds to [`~trl.GRPOConfig`]; all of that class's parameters are
    accepted and keep their meaning. In particular `beta` stays the coefficient of the KL to the *reference* model; the
    paper's beta, the weight of the teacher, is `distill_coef`.

    The text of each parameter is its `help`, which `--help` of the training command shows as well. They control, in
    this order, the teacher model, the distillation, prompts, their lengths, the shared prefix, what is logged, and
    what happens when a step fails.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs", "distill_scheduler_kwargs"]

    # Parameters that control the teacher model
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or path of the teacher. 'base' makes the PEFT student with its adapter off the teacher, "
            "without a second copy of the weights. The argument `teacher_model` of the trainer may be given instead."
        },
    )
    teacher_model_revision: str | None = field(
        default=None,
        metadata={"help": "Revision of the teacher: a branch, a tag or a commit."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained` of the teacher. Its `dtype` "
            "defaults to bfloat16 with `bf16`, else to the student's; its `attn_implementation` to the student's."
        },
    )
    teacher_prompt_column: str | None = field(
        default="teacher_prompt",
        metadata={
            "help": "Column of the data set with a prompt that only the teacher reads. Where a row has one, the "
            "teacher scores the student's completion under it; elsewhere, and always if this is None, it reads the "
            "student's prompt, which is the paper's method. What an environment observes is not added to it."
        },
    )
    teacher_offload: str | None = field(
        default=None,
        metadata={
            "help": "'cpu' keeps the teacher, under ZeRO-3 each rank's shard of it, in the memory of the host while "
            "it has nothing to score: the student then has the device to itself. Costs its size in pinned memory, and "
            "one copy to the device per generation batch.",
            "choices": ["cpu"],
        },
    )

    # Parameters that control the distillation
    distill_coef: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the teacher term, added to the GRPO loss: the paper's beta. No unit, >= 0; 0 is plain "
            "GRPO and needs no teacher."
        },
    )
    distill_divergence: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence between student and teacher at every completion token, over the whole vocabulary: "
            "'reverse_kl' is KL(student || teacher), the paper's; 'forward_kl' is KL(teacher || student); 'jsd' is "
            "the generalized Jensen-Shannon divergence.",
            "choices": list(DIVERGENCES),
        },
    )
    distill_jsd_mixture: float = field(
        default=0.5,
        metadata={"help": "Weight of the teacher in the mixture of 'jsd', strictly between 0 and 1."},
    )
    distill_scheduler_type: str = field(
        default="constant",
        metadata={
            "help": "How the weight of the teacher term changes: 'constant', the paper's; 'linear' and 'cosine' "
            "anneal it; 'switch' ends it at a point of the run, and 'plateau' when a metric no longer rises. Once it "
            "is 0 for good, the teacher is not run, and its memory is freed.",
            "choices": list(SCHEDULES),
        },
    )
    distill_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the scheduler. All: `final_coef` (0). 'linear', 'cosine': `start` (0), `end` (1.0). "
            "'switch': `at`. These are optimizer steps if integers, shares of the run if written with a decimal "
            "point. 'plateau': `metric` ('reward'), which has not risen by `min_delta` (0.01) for `patience` (3) "
            "windows of `logging_steps`, or evaluations for a name with 'eval_'."
        },
    )
    reward_start: str | None = field(
        default=None,
        metadata={
            "help": "From where the reward term counts: an optimizer step, a share of the run (0.5), or 'switch' for "
            "that of 'switch' and 'plateau'. Before it advantages are 0. By default it counts from the start."
        },
    )
    distill_gate: str = field(
        default="all",
        metadata={
            "help": "Which rollouts the teacher teaches: 'all', those with a reward below `distill_gate_reward` "
            "('below_reward'), or those of groups whose rewards are all equal ('no_variance'), from which GRPO learns "
            "nothing. The others add 0 to the teacher term, whose normalizer stays that of the GRPO term.",
            "choices": list(GATES),
        },
    )
    distill_gate_reward: float | None = field(
        default=None, metadata={"help": "Of 'below_reward': rollouts with a total reward below it are taught."}
    )
    distill_clip: float | None = field(
        default=None,
        metadata={
            "help": "Largest divergence of one token, in nats, that counts; what lies above has no gradient. By "
            "default none is clipped."
        },
    )

    distill_mask_eos: bool = field(
        default=False,
        metadata={
            "help": "Leave the positions at which a completion ends out of the teacher term and its metrics: for a "
            "teacher that ends with another token than the student. The GRPO term keeps them, and the normalizer of "
            "both terms counts them."
        },
    )

    # Parameters that control prompts
    keep_special_tokens: list[str] = field(
        default_factory=list,
        metadata={"help": _KEEP_SPECIAL_TOKENS_HELP},
    )

    # Parameters that control lengths
    allow_extrapolation: bool = field(
        default=False,
        metadata={
            "help": "Train on prompts that, with the longest completion, have more tokens than the positions that a "
            "model was trained on: for models that extrapolate. Otherwise they are refused, as most models are "
            "silently wrong there."
        },
    )

    # Parameters that control the shared prefix
    shared_prefix: str = field(
        default="auto",
        metadata={
            "help": "Run each prompt of a micro-batch once for all its completions, in the student, the old policy, "
            "the reference model, the teacher and the prefill of generation. 'auto' does so for the models for which "
            "it is exact, and logs where it is not; 'on' raises where it is not, and lets "
            "rows of a prompt meet in one micro-batch across optimizer steps too; 'off' runs every completion with a "
            "copy of its prompt, as TRL does.",
            "choices": list(SHARED_PREFIX_MODES),
        },
    )
    shared_prefix_backend: str = field(
        default="auto",
        metadata={
            "help": "Attention kernels of packed rows: 'flash_attention_3' and 'flash_attention_4' are packages, "
            "'torch' what PyTorch is built with (FlashAttention 2 on CUDA), 'math' plain matrix products. 'auto' "
            "takes the fastest that can be used, and warns where a faster one is missing.",
            "choices": list(BACKEND_CHOICES),
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Where a micro-batch has more tokens than this, it is run in parts: the gradient is that of the "
            "whole, the memory that of a part, and the cost one more forward. Counts what is run: a shared prompt "
            "once, and without sharing the padding too."
        },
    )

    # Parameters that control what is logged
    log_heatmaps: bool = field(
        default=False,
        metadata={
            "help": "Write one completion at each logging step to `output_dir/heatmaps`, as a page that shows at "
            "which tokens the teacher disagreed: the one of the largest mean divergence on the main process. Sent to "
            "wandb too, if that is reported to."
        },
    )

    # Parameters that control what happens when a step fails
    max_nonfinite_steps: int = field(
        default=3,
        metadata={
            "help": "An optimizer step whose loss or gradient is NaN or infinite is skipped, and its rows are "
            "reported. Training stops after this many consecutive ones. Gradients that overflow in fp16 while the "
            "scale of the loss is searched for are not among them."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.shared_prefix, bool):  # what YAML makes of `on` and `off`
            self.shared_prefix = "on" if self.shared_prefix else "off"
        self.keep_special_tokens = _listed(self.keep_special_tokens)
        if not (math.isfinite(self.distill_coef) and self.distill_coef >= 0):
            raise ValueError(
                f"`distill_coef` must be a finite number >= 0, got {self.distill_coef}. It weighs a divergence to be "
                "minimized. Set it to 0 to train with plain GRPO."
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
        self.get_schedule()  # raises if it is none
        if self.distill_gate not in GATES:
            raise ValueError(
                f"`distill_gate` is {self.distill_gate!r}, which is not known. Choose one of {', '.join(GATES)}."
            )
        if (self.distill_gate == "below_reward") != (self.distill_gate_reward is not None):
            raise ValueError(
                f"`distill_gate` is {self.distill_gate!r} and `distill_gate_reward` {self.distill_gate_reward}. "
                "'below_reward' needs the reward below which a rollout is taught, and nothing else takes one."
            )
        if self.distill_clip is not None and not (math.isfinite(self.distill_clip) and self.distill_clip > 0):
            raise ValueError(
                f"`distill_clip` must be a finite number of nats > 0, got {self.distill_clip}. Leave it out to clip "
                "nothing."
            )
        if self.shared_prefix not in SHARED_PREFIX_MODES:
            raise ValueError(
                f"`shared_prefix` is {self.shared_prefix!r}, which is not known. Choose one of "
                f"{', '.join(SHARED_PREFIX_MODES)}."
            )
        check_backend(self.shared_prefix_backend)
        if self.max_tokens_per_micro_batch is not None and self.max_tokens_per_micro_batch < 1:
            raise ValueError(
                f"`max_tokens_per_micro_batch` must be at least 1, got {self.max_tokens_per_micro_batch}. It bounds "
                "the tokens of one forward. Leave it out for no bound."
            )
        if self.max_nonfinite_steps < 1:
            raise ValueError(
                f"`max_nonfinite_steps` must be at least 1, got {self.max_nonfinite_steps}. Training stops after "
                "this many consecutive failed steps. Set it to 1 to stop at the first."
            )
        if self.teacher_offload not in (None, "cpu"):
            raise ValueError(
                f"`teacher_offload` is {self.teacher_offload!r}, which is not known. Set it to 'cpu', or leave it out."
            )
        if self.log_heatmaps and self.distill_coef == 0:
            raise ValueError(
                "`log_heatmaps` is set, but `distill_coef` is 0, so there is no teacher to disagree. Set "
                "`log_heatmaps: false`, or give a teacher."
            )

    def get_schedule(self) -> Schedule:
        """The weights of the loss's terms over the run."""
        return read_schedule(
            self.distill_coef, self.distill_scheduler_type, self.distill_scheduler_kwargs, self.reward_start
        )


def _listed(value: list[str] | str | None) -> list[str]:
    """What YAML and Python give for a list, or for one item of it."""
    return [value] if isinstance(value, str) else list(value or ())


# --- The commands


@dataclass
class LongBlocksArguments(ScriptArguments):
    """
    TRL's script arguments, and what the paper's recipe does to the data: a budget of tokens, short rows mixed in,
    books restored from the reader's copy.

    `dataset_name` is a file, a folder or a Hub id. Its rows have the columns of LongBlocks (`id`, `document`,
    `question`, `answer`), or a `prompt`.
    """

    max_prompt_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt, in tokens of the student with its chat template. Longer rows are left out."
        },
    )
    short_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Short conversations to mix in: file, folder or Hub id, with a column `messages`."},
    )
    short_dataset_split: str = field(default="train", metadata={"help": "Split of the short conversations."})
    short_share: float = field(
        default=0.1, metadata={"help": "Share of short rows, below 1; the paper's is 0.1. 0 mixes none in."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set to evaluate on: file, folder or Hub id. Its split is `dataset_test_split`, or the only "
            "one that a file or a folder has. None takes `dataset_test_split` of `dataset_name`."
        },
    )
    test_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the documents that is held out for evaluation instead, by a hash of their id; 0 holds "
            "none out."
        },
    )
    books: str | None = field(
        default=None,
        metadata={"help": "Institutional Books, where rows of LongBlocks have no document: Hub id or local copy."},
    )
    books_cache: str | None = field(
        default=None, metadata={"help": "File that keeps the books found, so that the collection is read once."}
    )


@dataclass
class PreflightArguments:
    """The dry run of a training command."""

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Only check and estimate: lengths, positions, batches, memory and hours, without weights or GPU."
        },
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "Configuration that the run will be launched with, for `dry_run`."}
    )
    gpu: str = field(
        default="h100-80gb", metadata={"help": "GPU to estimate for, for `dry_run`.", "choices": sorted(GPUS)}
    )
    mfu: float = field(
        default=0.4, metadata={"help": "Share of the GPU's peak that training reaches, for `dry_run`; in (0, 1]."}
    )

    def __post_init__(self):
        if self.gpu not in GPUS:
            raise ValueError(f"`gpu` is {self.gpu!r}, which is not known. Choose one of {', '.join(sorted(GPUS))}.")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"`mfu` is {self.mfu}. It is a share of the peak. Choose one in (0, 1], such as 0.4.")


@dataclass
class TrainingRunArguments(LongBlocksArguments, PreflightArguments):
    """The data and the dry run, of every training command."""

    def allows_extrapolation(self, training_args: TrainingArguments) -> bool:
        """Whether rows may be longer than the positions that a model was trained on."""
        raise NotImplementedError

    def data_options(self, training_args: TrainingArguments) -> dict[str, Any]:
        """Arguments of [`~training_data.load_training_data`] that only this command has."""
        raise NotImplementedError


@dataclass
class DGRPOScriptArguments(TrainingRunArguments):
    """The data, the rewards, and the dry run."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: names from `dgrpo_trl.rewards` ('exact_match_reward', ...) or import paths "
            "('trl.rewards.think_format_reward', 'my_rewards.mine'). None trains with the teacher alone."
        },
    )
    judge_model: str | None = field(
        default=None,
        metadata={"help": "Also reward with this model's verdict on open answers, asked at `judge_base_url`."},
    )
    judge_base_url: str | None = field(
        default=None,
        metadata={"help": "URL of the judge's OpenAI-compatible server. The key is read from OPENAI_API_KEY."},
    )

    def allows_extrapolation(self, training_args: DGRPOConfig) -> bool:
        return training_args.allow_extrapolation

    def data_options(self, training_args: DGRPOConfig) -> dict[str, Any]:
        return {
            "chat_template_kwargs": training_args.chat_template_kwargs,
            "keep_special_tokens": training_args.keep_special_tokens,
        }


@dataclass
class SFTScriptArguments(TrainingRunArguments):
    """The data, which column to learn, and the dry run."""

    completion_column: str = field(
        default="answer",
        metadata={"help": "Column with the text to train on, for instance 'response_Qwen3.5-27B' of LongBlocks."},
    )

    allow_extrapolation: bool = field(
        default=False,
        metadata={"help": "Train on rows longer than the positions of the student: for models that extrapolate."},
    )

    keep_special_tokens: list[str] = field(
        default_factory=list,
        metadata={"help": _KEEP_SPECIAL_TOKENS_HELP},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keep_special_tokens = _listed(self.keep_special_tokens)

    def allows_extrapolation(self, training_args: SFTConfig) -> bool:
        return self.allow_extrapolation

    def data_options(self, training_args: SFTConfig) -> dict[str, Any]:
        return {
            "completion_column": self.completion_column,
            "max_length": training_args.max_length,
            "keep_special_tokens": self.keep_special_tokens,
        }
