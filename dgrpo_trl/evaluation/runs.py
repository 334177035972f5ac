"""A run of the evaluation: one model over cells of task and length. A stopped run resumes at the next cell."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

import dgrpo_trl

from ..checks import position_problems, raise_problems
from ..files import sha256_of, write_json, write_text
from ..models import load_config, load_student_tokenizer
from ..positions import stated_positions, trained_positions
from .arguments import EvaluationArguments
from .generation import bind_chat_template_kwargs, generate_completions, generate_with_vllm, load_vllm
from .harness import needs_model, prepare_harness, run_harness
from .haystack import Haystack
from .overlap import check_overlap
from .questions import question_cells
from .results import FORMAT, plot_heatmap, results_table, score_cell
from .ruler import make_samples
from .samples import Cell, Sample
from .scores import QUESTION_METRICS


# A file of these decides what a local model answers
_MODEL_SUFFIXES = {".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt"}
_NOT_OF_THE_MODEL = {"training_args.bin", "trainer_state.json", "complete.json"}
# These do not change the scores of a cell. More tasks may be added to a run later
_NOT_IN_FINGERPRINT = {
    *("output_dir", "name", "overwrite", "max_batch_tokens", "tasks", "harness_tasks", "allow_extrapolation"),
}

# Completes samples, and calls its second argument with the number of those completed since the last call
Generate = Callable[[Sequence[Sample], Callable[[int], object]], list[str]]


class EvaluationRun:
    """A run, checked before weights load.

    Raises:
        ValueError: If the model or the data cannot be read, a length does not fit the task or the model, prompts share
            text with the training data, or `output_dir` holds another run.
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
        hub_kwargs = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
        self.config = load_config(args.model_name_or_path, args.model_init_kwargs, **hub_kwargs)
        self.cells = [*self._ruler_cells()]
        for (task, length), samples in question_cells(args, self.tokenizer).items():
            self.cells.append(Cell(task, length, args.questions_metric, partial(list, samples)))
        self.harness_manager = prepare_harness(args) if args.harness_tasks else None
        self._check_positions()
        if args.training_data is not None:
            check_overlap((sample for cell in self.cells for sample in cell.make()), args.training_data)
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
                make = partial(
                    make_samples,
                    *(task, length),
                    tokenizer=self.tokenizer,
                    seed=args.seed,
                    haystack=haystack,
                    system_message=args.system_message,
                )
                make(num_samples=1)  # raises if the length is too small for the task
                yield Cell(task, length, "string_match_all", partial(make, num_samples=args.num_samples))

    # --- Checks

    def _check_positions(self) -> None:
        positions = trained_positions(self.config)
        if positions is None or self.args.allow_extrapolation:
            return
        longest = 0
        for cell in self.cells:
            if cell.metric in QUESTION_METRICS:
                longest = max(longest, *(sample.num_tokens + sample.max_new_tokens for sample in cell.make()))
            else:
                longest = max(longest, cell.length)
        subject, reader = "With its completion the longest prompt", repr(self.args.model_name_or_path)
        raise_problems(
            position_problems(subject, longest, positions, reader, "Lower `lengths`", "`model_init_kwargs`")
        )

    def _settings(self) -> dict[str, Any]:
        settings = asdict(self.args)
        for name in ("questions", "haystack"):
            if (value := settings[name]) is not None:
                settings[f"{name}_sha256"] = _content_hash(Path(value), None)
        settings["model_sha256"] = _content_hash(Path(self.args.model_name_or_path), _MODEL_SUFFIXES)
        settings["model_commit"] = vars(self.config).get("_commit_hash")  # on the Hub
        return settings

    def _claim_output_dir(self) -> None:
        """Creates the folder, or resumes in it if it holds the same run."""
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

    def run(self, generate: Generate | None = None) -> dict[str, Any]:
        """Computes the cells that are missing, and writes `results.json`, `results.md` and `heatmap.png`.

        Samples are completed by `generate`, by default with the model. Returns what `results.json` holds.
        """
        folder, harness = self.output_dir / "cells", {}
        if any(not (folder / cell.file_name).exists() for cell in self.cells):
            self._fill_cells(folder, generate or self._load_generator())  # vLLM frees its memory when this returns
        if self.harness_manager is not None:
            model = self.model if self.args.backend == "transformers" and needs_model(self.args, folder) else None
            harness = run_harness(self.args, self.harness_manager, self.tokenizer, model, folder)
        return self._write_results(harness)

    def _fill_cells(self, folder: Path, generate: Generate) -> None:
        for number, cell in enumerate(self.cells, start=1):
            path = folder / cell.file_name
            if path.exists():
                continue
            samples = cell.make()
            description = f"{number}/{len(self.cells)} {cell.task} {cell.length}"
            with tqdm(total=len(samples), desc=description, unit="sample") as bar:
                start = time.monotonic()
                completions = generate(samples, bar.update)
                seconds = time.monotonic() - start
            write_json(path, score_cell(cell, samples, completions, seconds))

    @cached_property
    def model(self) -> transformers.PreTrainedModel:
        """The model of the arguments, loaded at first use."""
        return load_model(self.args)

    def _load_generator(self) -> Generate:
        """Loads the weights; returns what completes samples."""
        if self.args.backend == "vllm":
            return self._load_vllm_generator()

        def generate(samples: Sequence[Sample], on_progress: Callable[[int], object]) -> list[str]:
            return generate_completions(
                self.model,
                self.tokenizer,
                **_arguments(samples),
                shared_with=[sample.shared_with for sample in samples],
                max_batch_tokens=self.args.max_batch_tokens,
                description=None,
                on_progress=on_progress,
            )

        return generate

    def _load_vllm_generator(self) -> Generate:
        args = self.args
        longest = stated_positions(self.config) or max(cell.length for cell in self.cells)
        kwargs = {"trust_remote_code": args.trust_remote_code, **args.vllm_overrides(), **args.vllm_kwargs}
        llm = load_vllm(args.model_name_or_path, args.model_revision, args.dtype, longest, kwargs)

        def generate(samples: Sequence[Sample], on_progress: Callable[[int], object]) -> list[str]:
            completions = generate_with_vllm(llm, self.tokenizer, **_arguments(samples))
            on_progress(len(samples))
            return completions

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


def _arguments(samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "prompts": [sample.messages for sample in samples],
        "answer_prefixes": [sample.answer_prefix for sample in samples],
        "max_new_tokens": max(sample.max_new_tokens for sample in samples),
    }


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that decide the scores of a cell. Lengths do if they sort the questions into cells."""
    left_out = {*_NOT_IN_FINGERPRINT, *(() if settings["questions"] else ("lengths",))}
    if settings["model_sha256"] is not None:
        left_out.add("model_name_or_path")  # a folder that was moved is the same model
    return {key: value for key, value in settings.items() if key not in left_out}


def _content_hash(path: Path, suffixes: set[str] | None) -> str | None:
    """Hash of a file, or of the files of a folder; `None` if it is not on this machine."""
    if path.is_file():
        return sha256_of(path)[:16]
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.iterdir() if suffixes else path.rglob("*")):
        if file.is_file() and (suffixes is None or file.suffix in suffixes) and file.name not in _NOT_OF_THE_MODEL:
            digest.update(f"{file.relative_to(path)} {sha256_of(file)}\n".encode())
    return digest.hexdigest()[:16]
