"""What an evaluation reads from a YAML file and from the command line."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.hf_argparser import HfArg

from ..positions import POSITION_ARGUMENTS
from .ruler import RULER_TASKS
from .scores import QUESTION_METRICS


# On a command line a text of JSON; after `__post_init__` always a mapping
if TYPE_CHECKING:
    JsonObject = dict[str, Any]
else:
    JsonObject = dict | str | None


@dataclass
class EvaluationArguments:
    """What `scripts/evaluate.py` reads from a YAML file and from the command line."""

    model_name_or_path: str = HfArg(default="", help="Hub id or path of the model.")
    model_revision: str | None = HfArg(default=None, help="Branch, tag or commit on the Hub.")
    dtype: str = HfArg(default="auto", help="'bfloat16', 'float32', ..., or 'auto': as stored.")
    attn_implementation: str | None = HfArg(default=None, help="Attention implementation of transformers.")
    model_init_kwargs: JsonObject = HfArg(
        default_factory=dict,
        help="More arguments of `from_pretrained`, such as `rope_parameters` (YaRN) and "
        "`max_position_embeddings`; as JSON on the command line.",
    )
    allow_extrapolation: bool = HfArg(
        default=False,
        help="Evaluate beyond the positions that the model was trained on: for models that extrapolate.",
    )
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with the model.")
    chat_template_kwargs: JsonObject = HfArg(
        default_factory=dict, help="Arguments of the chat template, such as `enable_thinking: false`."
    )
    system_message: str | None = HfArg(default=None, help="System turn of `tasks`, and of questions without a prompt.")
    backend: str = HfArg(
        default="transformers", help="What generates the completions.", metadata={"choices": ["transformers", "vllm"]}
    )
    vllm_kwargs: JsonObject = HfArg(
        default_factory=dict, help="Arguments of `vllm.LLM`, such as `tensor_parallel_size`."
    )
    max_batch_tokens: int = HfArg(
        default=32768, help="Largest batch of transformers, in tokens, padding and completions included."
    )
    tasks: list[str] | None = HfArg(default=None, help="RULER's tasks, made without downloads: names, or 'all'.")
    lengths: list[int] = HfArg(
        default_factory=list, help="Tokens of prompt and longest completion together, with the chat template."
    )
    num_samples: int | None = HfArg(
        default=100, help="Samples per task and length; of questions, the most per task and length."
    )
    seed: int = HfArg(default=0, help="Seed of the samples of `tasks`.")
    haystack: str | None = HfArg(default=None, help="Text file to hide needles in, instead of repeated noise.")
    questions: str | None = HfArg(
        default=None, help="Held-out rows of LongBlocks, or with `prompt` and `answer`: file, folder or Hub id."
    )
    questions_split: str = HfArg(default="train", help="Split of the questions.")
    prompt_column: str = HfArg(
        default="prompt", help="Prompt of the questions; 'teacher_prompt' gives the teacher's accuracy."
    )
    questions_metric: str = HfArg(
        default="exact_match",
        help="Score of an answer: 'exact_match' wants the reference alone, 'mentioned' wants it anywhere.",
        metadata={"choices": list(QUESTION_METRICS)},
    )
    max_new_tokens: int = HfArg(default=32, help="Longest answer to a question, in tokens.")
    training_data: str | None = HfArg(
        default=None, help="Rows that the model was trained on: an error if a prompt shares text with them."
    )
    harness_tasks: list[str] | None = HfArg(
        default=None, help="Tasks or groups of lm-evaluation-harness (extra `eval`)."
    )
    harness_kwargs: JsonObject = HfArg(
        default_factory=dict, help="Arguments of `lm_eval.simple_evaluate` for all `harness_tasks`."
    )
    harness_task_kwargs: JsonObject = HfArg(
        default_factory=dict, help="The same for single tasks: from task names to arguments."
    )
    output_dir: str = HfArg(default="", help="Folder of the run.")
    name: str | None = HfArg(default=None, help="Name of the run; default: that of `output_dir`.")
    overwrite: bool = HfArg(default=False, help="Delete the results of another run in `output_dir`.")

    def __post_init__(self) -> None:
        for name in (
            *("model_init_kwargs", "chat_template_kwargs", "vllm_kwargs", "harness_kwargs", "harness_task_kwargs"),
        ):
            value = getattr(self, name)
            setattr(self, name, _parsed(name, value) if isinstance(value, str) else value or {})
        if self.tasks == ["all"]:
            self.tasks = list(RULER_TASKS)
        self.lengths = sorted(set(self.lengths or ()))
        self._check_model_and_output()
        self._check_tasks()
        for name in ("num_samples", "max_new_tokens", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}. It is a count. Choose 1 or more.")

    def _check_model_and_output(self) -> None:
        if not self.model_name_or_path:
            raise ValueError("`model_name_or_path` is missing. There is nothing to evaluate. Set it.")
        if not self.output_dir:
            raise ValueError(
                "`output_dir` is missing. Results are written to it. Set it, for instance to outputs/eval/NAME."
            )
        if self.backend not in ("transformers", "vllm"):
            raise ValueError(
                f"`backend` is {self.backend!r}. It generates the completions. Choose 'transformers' or 'vllm'."
            )

    def _check_tasks(self) -> None:
        if not (self.tasks or self.questions or self.harness_tasks):
            raise ValueError("There is nothing to ask. Set `tasks`, `questions` or `harness_tasks`.")
        if unknown := sorted(set(self.tasks or ()) - set(RULER_TASKS)):
            raise ValueError(
                f"`tasks` has {', '.join(map(repr, unknown))}, which this package does not make. "
                f"Choose from {', '.join(RULER_TASKS)}; for others, set `harness_tasks`."
            )
        if self.tasks and not self.lengths:
            raise ValueError("`tasks` need `lengths`, in tokens. Their prompts are made to a length. Set `lengths`.")
        if self.tasks and self.num_samples is None:
            raise ValueError("`tasks` need `num_samples`. Their samples are made. Set a number.")
        if self.questions_metric not in QUESTION_METRICS:
            raise ValueError(
                f"`questions_metric` is {self.questions_metric!r}. It scores answers. Choose from "
                f"{', '.join(QUESTION_METRICS)}."
            )

    def vllm_overrides(self) -> dict[str, Any]:
        """The positions of `model_init_kwargs`, as vLLM takes them."""
        overrides = {
            name: self.model_init_kwargs[name] for name in POSITION_ARGUMENTS if name in self.model_init_kwargs
        }
        return {"hf_overrides": overrides} if overrides else {}


def _parsed(name: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` is {text!r}, which is not JSON: {error}. Write {{'\"key\": value'}}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` is {text!r}. It maps names to values. Write a JSON object.")
    return value
