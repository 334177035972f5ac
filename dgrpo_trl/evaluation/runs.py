"""A run of the evaluation: one model over cells of task and length, which goes on where it was stopped."""

import hashlib
import json
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import dgrpo_trl

from ..checks import max_positions, trained_positions
from ..data_loading import load_rows
from ..files import sha256_of, write_json, write_text
from ..longblocks.load import load_longblocks
from ..training_data import load_student_tokenizer
from .accuracy import wilson_interval
from .generation import bind_chat_template_kwargs, generate_completions, generate_with_vllm, load_vllm
from .harness import makes_prompts_to_length, needs_model, prepare_harness, run_harness
from .metrics import METRICS, QUESTION_METRICS, mentioned
from .tasks import RULER_TASKS, Haystack, Sample, make_samples, question_samples, shared_ngrams


logger = logging.getLogger(__name__)

FORMAT = 1
_ANY_LENGTH = 1 << 40
# Prompts that are compared with the training data in one pass over it: a gigabyte of their pieces
_TOKENS_PER_PASS = 10_000_000
_POSITIONS = ("rope_parameters", "max_position_embeddings")
# A file of these decides what a local model answers
_MODEL_SUFFIXES = {".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt"}
_NOT_OF_THE_MODEL = {"training_args.bin", "trainer_state.json", "complete.json"}
# Of the place and the pace of a run, not of its results. A run may be given more tasks later
_NOT_IN_FINGERPRINT = {"output_dir", "name", "overwrite", "max_batch_tokens", "tasks", "harness_tasks"}


@dataclass
class EvaluationArguments:
    """What `scripts/evaluate.py` reads from a YAML and from the command line."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or path of the model."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "'bfloat16', 'float32', ..., or 'auto': as it is stored."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of transformers."})
    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "More arguments of `from_pretrained`, such as `rope_parameters` (YaRN) and "
            "`max_position_embeddings`; as JSON on the command line."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template, such as `enable_thinking: false`."}
    )
    system_message: str | None = field(default=None, metadata={"help": "System turn of the tasks made here."})
    backend: str = field(
        default="transformers", metadata={"help": "What generates.", "choices": ["transformers", "vllm"]}
    )
    vllm_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of `vllm.LLM`, such as `tensor_parallel_size`."}
    )
    max_batch_tokens: int = field(
        default=32768, metadata={"help": "Longest batch of transformers, in tokens, padding and completions included."}
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "RULER's tasks, made here: their names, or 'all'."}
    )
    lengths: list[int] | None = field(
        default=None,
        metadata={"help": "Tokens of prompt and longest completion together, with the chat template."},
    )
    num_samples: int | None = field(
        default=100, metadata={"help": "Samples of each task and length; of questions, at most so many."}
    )
    seed: int = field(default=0, metadata={"help": "Of the samples."})
    haystack: str | None = field(
        default=None, metadata={"help": "Text file to hide needles in, instead of lines of noise and essays."}
    )
    questions: str | None = field(
        default=None,
        metadata={"help": "Held-out rows of LongBlocks, or with `prompt` and `answer`: file, folder or Hub id."},
    )
    questions_split: str = field(default="train", metadata={"help": "Split of the questions."})
    prompt_column: str = field(
        default="prompt", metadata={"help": "Prompt of the questions; 'teacher_prompt' gives the teacher's accuracy."}
    )
    questions_metric: str = field(
        default="exact_match",
        metadata={
            "help": "Score of an answer: the reference alone, or 'mentioned', whatever else is said.",
            "choices": list(QUESTION_METRICS),
        },
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer to a question, in tokens."})
    training_data: str | None = field(
        default=None,
        metadata={"help": "Rows that the model was trained on: the run is refused if a prompt shares text with them."},
    )
    harness_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks or groups of lm-evaluation-harness (extra `eval`)."}
    )
    harness_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of `lm_eval.simple_evaluate` for all of them."}
    )
    harness_task_kwargs: dict | str | None = field(
        default=None, metadata={"help": "The same for single tasks: from their names to arguments."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run."})
    name: str | None = field(default=None, metadata={"help": "Name of the run; the folder's by default."})
    overwrite: bool = field(default=False, metadata={"help": "Delete what another run left in `output_dir`."})

    def __post_init__(self):
        for name in (
            *("model_init_kwargs", "chat_template_kwargs", "vllm_kwargs", "harness_kwargs", "harness_task_kwargs"),
        ):
            value = getattr(self, name)
            if isinstance(value, str):
                value = _parsed(name, value)
            setattr(self, name, value or {})
        if self.model_name_or_path is None:
            raise ValueError("`model_name_or_path` is missing. There is nothing to evaluate. Set it.")
        if self.output_dir is None:
            raise ValueError(
                "`output_dir` is missing. Results have no place. Set it, for instance to outputs/eval/NAME."
            )
        if self.backend not in ("transformers", "vllm"):
            raise ValueError(f"`backend` is {self.backend!r}. It generates. Choose 'transformers' or 'vllm'.")
        if self.questions_metric not in QUESTION_METRICS:
            raise ValueError(
                f"`questions_metric` is {self.questions_metric!r}. It scores answers. Choose from "
                f"{', '.join(QUESTION_METRICS)}."
            )
        if not (self.tasks or self.questions or self.harness_tasks):
            raise ValueError("There is nothing to ask. Set `tasks`, `questions` or `harness_tasks`.")
        if self.tasks == ["all"]:
            self.tasks = list(RULER_TASKS)
        if unknown := sorted(set(self.tasks or ()) - set(RULER_TASKS)):
            raise ValueError(
                f"`tasks` has {', '.join(map(repr, unknown))}, which nothing here makes. Choose from "
                f"{', '.join(RULER_TASKS)}; for others, set `harness_tasks`."
            )
        if self.tasks and not self.lengths:
            raise ValueError("`tasks` need `lengths`, in tokens. A sample has no length of its own. Set them.")
        for name in ("num_samples", "max_new_tokens", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}. It is a count. Choose 1 or more.")
        self.lengths = sorted(set(self.lengths or ()))

    def vllm_overrides(self) -> dict[str, Any]:
        """What `model_init_kwargs` says of the positions, as vLLM takes it."""
        overrides = {name: self.model_init_kwargs[name] for name in _POSITIONS if name in self.model_init_kwargs}
        return {"hf_overrides": overrides} if overrides else {}


def _parsed(name: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` is {text!r}, which is no JSON: {error}. Write {{'\"key\": value'}}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` is {text!r}. It maps names to values. Write a JSON object.")
    return value


@dataclass(frozen=True)
class Cell:
    """One number of the table: a task at a length.

    Args:
        task (`str`), length (`int`):
            What it is called.
        metric (`str`):
            Of `METRICS`.
        make (`Callable[[], list[Sample]]`):
            Its samples, the same whenever they are made.
    """

    task: str
    length: int
    metric: str
    make: Callable[[], list[Sample]]

    @property
    def file_name(self) -> str:
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{self.task}-{self.length}") + ".json"


Generate = Callable[[Sequence[Sample], Callable[[int], None]], list[str]]


class EvaluationRun:
    """A run, checked before weights load.

    Args:
        args ([`EvaluationArguments`]):
            What to evaluate.

    Raises:
        ValueError: If the model or the data cannot be read, a length fits neither task nor model, prompts share text
            with the training data, or `output_dir` holds another run.
        ImportError: If an extra is missing.
    """

    def __init__(self, args: EvaluationArguments):
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.tokenizer = load_student_tokenizer(
            args.model_name_or_path, args.model_revision, trust_remote_code=args.trust_remote_code
        )
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of {args.model_name_or_path!r} has no chat template. Prompts are conversational. Save "
                "one with the tokenizer (`tokenizer.chat_template`), or evaluate the model after its fine-tuning."
            )
        bind_chat_template_kwargs(self.tokenizer, args.chat_template_kwargs)
        self.config = _model_config(args)
        self.cells = [*self._ruler_cells(), *self._question_cells()]
        self.harness_manager = prepare_harness(args) if args.harness_tasks else None
        self._check_positions()
        if args.training_data is not None:
            self._check_overlap()
        self.settings = self._settings()
        text = json.dumps(_decisive(self.settings), sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._claim_output_dir()

    # --- Cells

    def _ruler_cells(self) -> Iterator[Cell]:
        args = self.args
        haystack = Haystack.from_file(args.haystack) if args.tasks and args.haystack else None
        for task in args.tasks or ():
            for length in args.lengths:

                def make(number: int = args.num_samples, task: str = task, length: int = length) -> list[Sample]:
                    return make_samples(
                        *(task, length, number, self.tokenizer),
                        seed=args.seed,
                        haystack=haystack,
                        system_message=args.system_message,
                    )

                make(1)  # raises where the length cannot hold the task
                yield Cell(task, length, "string_match_all", make)

    def _question_cells(self) -> Iterator[Cell]:
        args = self.args
        if args.questions is None:
            return
        rows = load_rows(args.questions, split=args.questions_split)
        if "prompt" not in rows.column_names:
            rows = load_longblocks(rows, tokenizer=self.tokenizer, system_message=args.system_message)
        if missing := {args.prompt_column, "answer"} - set(rows.column_names):
            raise ValueError(
                f"The questions {args.questions!r} have no column {', '.join(map(repr, sorted(missing)))}; they have "
                f"{rows.column_names}. Prompts are asked and answers compared. Rename one, or set `prompt_column`."
            )
        if "length_bin" in rows.column_names:
            by_length: dict[int, list[dict]] = {}
            for row in rows:
                by_length.setdefault(row["length_bin"], []).append(row)
            parts = [(length, part, [_ANY_LENGTH]) for length, part in by_length.items()]
        elif args.lengths:
            parts = [(None, list(rows), args.lengths)]
        else:
            raise ValueError("`questions` need `lengths`, in tokens, or a column 'length_bin'. Set `lengths`.")
        cells = {}
        for length_bin, part, lengths in parts:
            made = question_samples(
                *(part, lengths, self.tokenizer),
                num_samples=args.num_samples,
                prompt_column=args.prompt_column,
                max_new_tokens=args.max_new_tokens,
            )
            for (task, length), samples in made.items():
                cells[task, length_bin or length] = samples
        for (task, length), samples in sorted(cells.items()):
            yield Cell(task, length, args.questions_metric, lambda samples=samples: samples)

    # --- Checks

    def _check_positions(self) -> None:
        positions = trained_positions(self.config)
        if positions is None:
            return
        manager = self.harness_manager
        is_to_length = manager is not None and makes_prompts_to_length(manager, self.args.harness_tasks)
        longest = max(self.args.lengths) if is_to_length else 0
        for cell in self.cells:
            if cell.metric in QUESTION_METRICS:
                longest = max(longest, *(sample.num_tokens + sample.max_new_tokens for sample in cell.make()))
            else:
                longest = max(longest, cell.length)
        if longest > positions:
            raise ValueError(
                f"The longest prompt has, with its completion, up to {longest:,} tokens, more than the {positions:,} "
                f"positions of {self.args.model_name_or_path!r}. Beyond them a model is silently wrong. Lower "
                "`lengths`, or extend the positions by YaRN: `max_position_embeddings` and `rope_parameters` in "
                "`model_init_kwargs`, for Qwen3 to 131,072 `{rope_type: yarn, rope_theta: 1000000, factor: 4.0, "
                "original_max_position_embeddings: 32768}`."
            )

    def _check_overlap(self) -> None:
        rows = load_rows(self.args.training_data)
        for samples in _batches((sample for cell in self.cells for sample in cell.make()), _TOKENS_PER_PASS):
            if shared := shared_ngrams(samples, rows):
                raise ValueError(
                    f"{len(shared)} prompts of the evaluation share text with `training_data` "
                    f"{self.args.training_data!r}: {shared[0][0]!r} has {shared[0][1]!r}. The score would count what "
                    "was learnt by heart. Choose another haystack, or questions held out by document."
                )

    def _settings(self) -> dict[str, Any]:
        settings = asdict(self.args)
        for name in ("questions", "haystack"):
            if (value := settings[name]) is not None:
                settings[f"{name}_sha256"] = _content_hash(Path(value), None)
        settings["model_sha256"] = _content_hash(Path(self.args.model_name_or_path), _MODEL_SUFFIXES)
        settings["model_commit"] = vars(self.config).get("_commit_hash")  # of the Hub
        return settings

    def _claim_output_dir(self) -> None:
        """Makes the folder, or goes on in it if it holds the same run."""
        path = self.output_dir / "settings.json"
        if path.exists() and not self.args.overwrite:
            before = json.loads(path.read_text(encoding="utf-8"))
            old, new = _decisive(before["settings"]), _decisive(self.settings)
            if before["fingerprint"] != self.fingerprint:
                changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
                raise ValueError(
                    f"{str(self.output_dir)!r} holds a run with other settings: "
                    + ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed)
                    + ". Its cells would be mixed with others. Choose another `output_dir`, or set `overwrite: true`."
                )
        elif self.args.overwrite and path.exists():
            shutil.rmtree(self.output_dir / "cells", ignore_errors=True)
            for name in ("results.json", "results.md", "heatmap.png"):
                (self.output_dir / name).unlink(missing_ok=True)
        (self.output_dir / "cells").mkdir(parents=True, exist_ok=True)
        write_json(path, {"fingerprint": self.fingerprint, "settings": self.settings})

    # --- The run

    def run(self) -> dict[str, Any]:
        """Computes the cells that are missing, and writes `results.json`, `results.md` and `heatmap.png`.

        Returns:
            `dict[str, Any]`: what `results.json` holds.
        """
        generate, folder = None, self.output_dir / "cells"
        for number, cell in enumerate(self.cells, start=1):
            path = folder / cell.file_name
            if path.exists():
                continue
            if generate is None:
                generate = self._generator()
            samples = cell.make()
            description = f"{number}/{len(self.cells)} {cell.task} {cell.length}"
            with tqdm(total=len(samples), desc=description, unit="sample") as bar:
                start = time.monotonic()
                completions = generate(samples, bar.update)
                seconds = time.monotonic() - start
            write_json(path, score_cell(cell, samples, completions, seconds))
        generate, harness = None, {}  # vLLM gives its memory back
        if self.harness_manager is not None:
            model = self._model if self.args.backend == "transformers" and needs_model(self.args, folder) else None
            harness = run_harness(self.args, self.harness_manager, self.tokenizer, model, folder)
        return self._write_results(harness)

    @cached_property
    def _model(self) -> transformers.PreTrainedModel:
        return load_model(self.args)

    def _generator(self) -> Generate:
        """Loads the weights, and gives what makes completions of samples."""
        args, tokenizer = self.args, self.tokenizer
        if args.backend == "vllm":
            longest = max_positions(self.config) or max(cell.length for cell in self.cells)
            kwargs = {"trust_remote_code": args.trust_remote_code, **args.vllm_overrides(), **args.vllm_kwargs}
            llm = load_vllm(args.model_name_or_path, args.model_revision, args.dtype, longest, kwargs)

            def generate(samples: Sequence[Sample], on_progress: Callable[[int], None]) -> list[str]:
                completions = generate_with_vllm(llm, tokenizer, **_arguments(samples))
                on_progress(len(samples))
                return completions

            return generate

        def generate(samples: Sequence[Sample], on_progress: Callable[[int], None]) -> list[str]:
            return generate_completions(
                self._model,
                tokenizer,
                **_arguments(samples),
                shared_with=[sample.shared_with for sample in samples],
                max_batch_tokens=args.max_batch_tokens,
                description=None,
                on_progress=on_progress,
            )

        return generate

    def _write_results(self, harness: dict[str, dict]) -> dict[str, Any]:
        paths = [self.output_dir / "cells" / cell.file_name for cell in self.cells]
        args = self.args
        results = {
            "format": FORMAT,
            "name": args.name or self.output_dir.name,
            "model": args.model_name_or_path,
            "revision": args.model_revision,
            "seed": args.seed,
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "versions": {
                "dgrpo_trl": dgrpo_trl.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
            "cells": [json.loads(path.read_text(encoding="utf-8")) for path in paths],
            "harness": harness,
        }
        write_json(self.output_dir / "results.json", results)
        write_text(self.output_dir / "results.md", results_table(results))
        if results["cells"]:
            plot_heatmap(results, self.output_dir / "heatmap.png")
        return results


def load_model(args: EvaluationArguments) -> transformers.PreTrainedModel:
    """The model of the arguments, on a GPU if there is one, or where `device_map` says."""
    kwargs = {"dtype": args.dtype, "attn_implementation": args.attn_implementation, **args.model_init_kwargs}
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path, revision=args.model_revision, trust_remote_code=args.trust_remote_code, **kwargs
    )
    if "device_map" not in kwargs:
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


def _batches(samples: Iterable[Sample], max_tokens: int) -> Iterator[list[Sample]]:
    """The samples in batches of at most so many tokens, or of one sample."""
    batch, num_tokens = [], 0
    for sample in samples:
        if batch and num_tokens + sample.num_tokens > max_tokens:
            yield batch
            batch, num_tokens = [], 0
        batch.append(sample)
        num_tokens += sample.num_tokens
    if batch:
        yield batch


def _model_config(args: EvaluationArguments) -> PreTrainedConfig:
    changes = {name: args.model_init_kwargs[name] for name in _POSITIONS if name in args.model_init_kwargs}
    return AutoConfig.from_pretrained(
        args.model_name_or_path, revision=args.model_revision, trust_remote_code=args.trust_remote_code, **changes
    )


def _arguments(samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "prompts": [sample.messages for sample in samples],
        "answer_prefixes": [sample.answer_prefix for sample in samples],
        "max_new_tokens": max(sample.max_new_tokens for sample in samples),
    }


def score_cell(cell: Cell, samples: Sequence[Sample], completions: Sequence[str], seconds: float) -> dict[str, Any]:
    """A cell of `results.json`: mean score, its 95 % interval, and every sample with its score."""
    if len(samples) != len(completions):
        raise ValueError(f"Needs one completion for each sample, got {len(completions)} for {len(samples)} samples.")
    metric = METRICS[cell.metric]
    scores = [metric(text, sample.references) for text, sample in zip(completions, samples, strict=True)]
    result = {
        "task": cell.task,
        "length": cell.length,
        "metric": cell.metric,
        "num_samples": len(samples),
        "score": math.fsum(scores) / len(scores),
        "interval": list(score_interval(scores)),
    }
    if cell.metric in QUESTION_METRICS:
        said = [mentioned(text, sample.references) for text, sample in zip(completions, samples, strict=True)]
        result["mentioned"] = sum(said) / len(said)
    result["seconds"] = seconds
    result["samples"] = [
        {
            "id": sample.id,
            "score": score,
            "completion": text,
            "references": list(sample.references),
            "num_tokens": sample.num_tokens,
        }
        for sample, text, score in zip(samples, completions, scores, strict=True)
    ]
    return result


def score_interval(scores: Sequence[float], num_draws: int = 2000) -> tuple[float, float]:
    """95 % interval of a mean: Wilson's where all scores are 0 or 1, a percentile bootstrap (seed 0) else."""
    if all(score in (0, 1) for score in scores):
        return wilson_interval(sum(map(int, scores)), len(scores))
    draw = random.Random(0)
    means = sorted(math.fsum(draw.choices(scores, k=len(scores))) / len(scores) for _ in range(num_draws))
    return means[int(0.025 * num_draws)], means[int(0.975 * num_draws) - 1]


def results_table(results: dict[str, Any]) -> str:
    """The Markdown of a run: a row a task and a column a length, in per cent with 95 % intervals."""
    cells = {(cell["task"], cell["length"]): cell for cell in results["cells"]}
    lengths = sorted({length for _, length in cells})
    tasks = list(dict.fromkeys(task for task, _ in cells))

    def row(name: str, values: Sequence[str]) -> str:
        return f"| {' | '.join([name.replace('|', chr(92) + '|'), *values])} |\n"

    text = f"# {results['name']}\n\nModel `{results['model']}`, fingerprint `{results['fingerprint']}`.\n"
    if cells:
        text += "\nScores in %, with 95 % intervals, by length in tokens.\n\n"
        text += row("task", [f"{length:,}" for length in lengths]) + row("---", ["---"] * len(lengths))
        for task in tasks:
            text += row(task, [_percent(cells.get((task, length))) for length in lengths])
        means = [_mean([cells.get((task, length)) for task in tasks]) for length in lengths]
        if len(tasks) > 1 and any(means):
            text += row("mean", means)
    if results["harness"]:
        text += "\nBy lm-evaluation-harness:\n\n" + row("task", ["metric", "value"]) + row("---", ["---", "---"])
        for task, metrics in results["harness"].items():
            for metric, value in metrics.items():
                text += row(task, [metric, f"{value:.4g}"])
    return text


def _percent(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    low, high = cell["interval"]
    return f"{100 * cell['score']:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def _mean(cells: Sequence[dict[str, Any] | None]) -> str:
    """Of all tasks; a length at which one is missing has none, as it would be of other tasks."""
    if any(cell is None for cell in cells):
        return ""
    return f"{100 * math.fsum(cell['score'] for cell in cells) / len(cells):.1f}"


def plot_heatmap(results: dict[str, Any], path: Path) -> None:
    """Draws task by length as a PNG; without matplotlib, logs that it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No heat map is drawn: matplotlib is missing. Install it with `pip install dgrpo-trl[demo]`.")
        return
    cells = {(cell["task"], cell["length"]): cell["score"] for cell in results["cells"]}
    tasks = list(dict.fromkeys(task for task, _ in cells))
    lengths = sorted({length for _, length in cells})
    values = [[100 * cells.get((task, length), math.nan) for length in lengths] for task in tasks]
    figure = Figure(figsize=(2.5 + 0.8 * len(lengths), 1.6 + 0.35 * len(tasks)))
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if not math.isnan(value):
                axes.text(j, i, f"{value:.0f}", ha="center", va="center")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(xlabel="length (tokens)", title=results["name"])
    figure.colorbar(image, label="score (%)")
    figure.tight_layout()
    unfinished = path.with_suffix(".tmp.png")
    figure.savefig(unfinished, dpi=110)
    os.replace(unfinished, path)


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that decide the score of a cell. Lengths do where they sort the questions into cells."""
    left_out = {*_NOT_IN_FINGERPRINT, *(() if settings["questions"] else ("lengths",))}
    if settings["model_sha256"] is not None:
        left_out.add("model_name_or_path")  # a folder that was moved is the same model
    return {key: value for key, value in settings.items() if key not in left_out}


def _content_hash(path: Path, suffixes: set[str] | None) -> str | None:
    """Hash of a file, or of the files of a folder; `None` for what is not on this machine."""
    if path.is_file():
        return sha256_of(path)[:16]
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.iterdir() if suffixes else path.rglob("*")):
        if file.is_file() and (suffixes is None or file.suffix in suffixes) and file.name not in _NOT_OF_THE_MODEL:
            digest.update(f"{file.relative_to(path)} {sha256_of(file)}\n".encode())
    return digest.hexdigest()[:16]
