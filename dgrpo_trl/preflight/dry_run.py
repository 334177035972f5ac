"""The dry run: everything about a run that can be known without weights and without a GPU."""

import math
import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..chat import num_prompt_tokens, num_row_tokens
from ..checks import (
    image_problems,
    missing_reward_problems,
    packing_warnings,
    run_findings,
    schedule_problems,
    supervised_findings,
)
from ..config import DGRPOConfig
from ..gpus import Gpu
from ..models import Models, read_models
from ..positions import rope_scaling, stated_positions, trained_positions
from ..row_checks import named_datasets
from ..shared_prefix import unsupported_reason
from ..teacher import resolve_teacher
from .engine import Engine
from .estimates import GIB, Estimates, Rows
from .report import Report
from .shape import Shape


# Rows tokenized for the statistics of lengths, and of the longest by bytes
SAMPLED_ROWS, LONGEST_ROWS = 2000, 200
# Beyond this share of its memory a GPU runs out of it in practice: fragments, kernels, communication
USABLE_SHARE = 0.92

_MEMORY = "Memory of a GPU in GiB, at the longest prompt"


def preflight(
    args: TrainingArguments,
    student: str,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    gpu: Gpu,
    mfu: float = 0.4,
    peft_config: Any = None,
    eval_dataset: Dataset | None = None,
    reward_funcs: Sequence[Any] = (),
    allow_extrapolation: bool = False,
    keep_special_tokens: Collection[str] = (),
) -> Report:
    """Checks a run of dGRPO, or of SFT, before it starts, and estimates its memory and its time.

    Args:
        args ([`DGRPOConfig`] or [`~trl.SFTConfig`]):
            The run. Its `model_init_kwargs` say how the student's configuration is changed.
        student (`str`):
            Hub id or path.
        dataset ([`~datasets.Dataset`]):
            Rows to train on, with `prompt`; for SFT with `completion` too. A stream has no length and is refused.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's.
        engine ([`Engine`]), gpu ([`Gpu`]):
            How it is distributed, and every device.
        mfu (`float`, *optional*, defaults to `0.4`):
            Share of the GPU's peak that training reaches: an assumption.
        peft_config (*optional*):
            LoRA.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Rows to evaluate on, which are checked too.
        reward_funcs (`Sequence`, *optional*):
            Reward functions, whose columns the rows must have.
        allow_extrapolation (`bool`, *optional*, defaults to `False`):
            Whether rows for SFT may be longer than the student's positions; a `DGRPOConfig` says so itself.
        keep_special_tokens (`Collection[str]`, *optional*):
            Special tokens that rows for SFT keep; a `DGRPOConfig` says so itself.

    Raises:
        ValueError: If a configuration or the teacher's tokenizer cannot be read, or `dataset` is a stream.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError("A dry run counts rows and tokens, and a stream has no end. Set `dataset_streaming: false`.")
    is_dgrpo = isinstance(args, DGRPOConfig)
    teacher = resolve_teacher(None, args, student, peft_config is not None) if is_dgrpo else None
    if not is_dgrpo or args.distill_coef == 0:
        teacher = None
    models = read_models(student, teacher, args, tokenizer)
    shape = Shape.of(models.student, peft_config, args.trust_remote_code)
    teacher_shape = None
    if models.teacher is not None:
        is_base = models.teacher is models.student
        teacher_shape = shape if is_base else Shape.of(models.teacher, trust_remote_code=args.trust_remote_code)
    estimates = Estimates(args, shape, teacher_shape, engine, gpu, mfu)
    dry_run = Preflight(args, models, named_datasets(dataset, eval_dataset), estimates, reward_funcs)
    if is_dgrpo:
        dry_run.rollouts()
    else:
        dry_run.supervised(allow_extrapolation, keep_special_tokens)
    return dry_run.report


class Preflight:
    """A dry run, which fills its `report`. The estimates are left out where rows cannot be read."""

    def __init__(
        self,
        args: TrainingArguments,
        models: Models,
        datasets: Mapping[str, Dataset],
        estimates: Estimates,
        reward_funcs: Sequence[Any] = (),
    ):
        self.args = args
        self.models = models
        self.datasets = datasets
        self.dataset = datasets["train_dataset"]
        self.reward_funcs = reward_funcs
        self.estimates = estimates
        self.engine = estimates.engine
        self.report = Report()

    # --- dGRPO, GRPO and on-policy distillation

    def rollouts(self) -> None:
        args, models = self.args, self.models
        findings = run_findings(args, models, self.datasets, self.engine.num_processes, reward_funcs=self.reward_funcs)
        images = image_problems(self.datasets) if models.teacher else []
        rewards = missing_reward_problems(args, bool(self.reward_funcs))
        self.report.problems += [*images, *rewards, *findings.problems]
        self.report.warnings += findings.warnings
        if not findings.rows_are_readable:
            return
        steps = self._rollout_batches()
        if args.max_steps <= 0:
            self.report.problems += schedule_problems(args, steps)
        own = args.teacher_prompt_column
        if models.teacher is None or own is None or own not in self.dataset.column_names:
            reader = "the student" if models.teacher is None else "the student and the teacher"
            lengths = teacher_lengths = self._prompt_lengths("prompt", reader)
        else:
            lengths = self._prompt_lengths("prompt", "the student")
            teacher_lengths = self._prompt_lengths(own, "the teacher")
        self._positions()
        completion = args.max_completion_length or 0
        epoch_tokens = (statistics.mean(lengths) + args.num_generations * completion) * len(self.dataset)
        reason = "so configured" if args.shared_prefix == "off" else unsupported_reason(models.student)
        add = partial(self.report.add, "Batches")
        add("tokens per epoch", f"{epoch_tokens / 1e6:,.1f} million at most, prompts once")
        add("shared prefix", "on" if reason is None else f"off: {reason}")
        self._rollout_memory(Rows(max(lengths), max(teacher_lengths), completion, reason is None))
        mean, teacher_mean = statistics.mean(lengths), statistics.mean(teacher_lengths)
        self._rollout_time(Rows(mean, teacher_mean, completion, reason is None), steps)

    def _rollout_batches(self) -> int:
        """Reports the batches, and returns the number of steps."""
        args, num_processes = self.args, self.engine.num_processes
        group, rows = args.num_generations, args.per_device_train_batch_size
        completions = self._rows_per_step()
        steps_per_epoch = len(self.dataset) * group * args.num_iterations / completions
        steps = self._num_steps(steps_per_epoch)
        add = partial(self.report.add, "Batches")
        add(
            "an optimizer step",
            f"{num_processes} processes x {rows} x {args.gradient_accumulation_steps} = {completions} completions = "
            f"{completions / group:g} prompts x {group}",
        )
        add(
            "a generation batch",
            f"{num_processes * rows * args.steps_per_generation} completions in {args.steps_per_generation} "
            "micro-batches",
        )
        add("steps", f"{steps:,}, {steps / steps_per_epoch:.2f} epochs of {len(self.dataset):,} prompts")
        if rows % group and args.shared_prefix != "off":
            self.report.warnings.append(
                f"`per_device_train_batch_size` ({rows}) is no multiple of `num_generations` ({group}): groups are "
                "split over micro-batches, and their prompts run more than once."
            )
        return steps

    def _rows_per_step(self) -> int:
        args = self.args
        return self.engine.num_processes * args.per_device_train_batch_size * args.gradient_accumulation_steps

    def _num_steps(self, steps_per_epoch: float) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(steps_per_epoch * self.args.num_train_epochs)

    def _prompt_lengths(self, column: str, reader: str) -> list[int]:
        """Reports the lengths of the prompts that `reader` reads, in tokens, and returns them sorted."""
        chosen, sample = _sample(self.dataset, column)
        tokenizer, kwargs = self.models.tokenizer, self.args.chat_template_kwargs
        keep = self.args.keep_special_tokens
        lengths = sorted(
            num_prompt_tokens(prompt, tokenizer, kwargs, keep_special_tokens=keep)
            for prompt in chosen
            if prompt is not None
        ) or [0]
        self.report.add(
            "Lengths in tokens",
            f"`{column}`, read by {reader}",
            f"least {lengths[0]:,}, median {lengths[len(lengths) // 2]:,}, "
            f"95 % {lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]:,}, most {lengths[-1]:,} ({sample})",
        )
        return lengths

    def _positions(self) -> None:
        add = partial(self.report.add, "Positions")
        for name, config in (("the student", self.models.student), ("the teacher", self.models.teacher)):
            if config is None:
                continue
            stated, trained = stated_positions(config), trained_positions(config)
            limit = "unlimited" if trained is None else f"{trained:,}"
            but_stated = "" if stated == trained else f" ({stated:,} are stated, it was trained on fewer)"
            add(name, f"{limit}{but_stated}, RoPE {rope_scaling(config) or 'unscaled'}")

    def _rollout_memory(self, longest: Rows) -> None:
        self._memory(self.estimates.rollout_memory(longest))
        self._host_memory(self.estimates.rollout_host_checkpoints(longest))
        if longest.shares_prefix:
            plain, shared = (
                self.estimates.training_activations(rows) / GIB
                for rows in (replace(longest, shares_prefix=False), longest)
            )
            self.report.add(_MEMORY, "activations without sharing", f"{plain:.1f} instead of {shared:.1f}")

    def _memory(self, phases: dict[str, dict[str, float]]) -> None:
        add, gpu = partial(self.report.add, _MEMORY), self.estimates.gpu
        for phase, items in phases.items():
            in_gib = {name: value / GIB for name, value in items.items() if value > 0}
            self.report.memory_gib[phase] = in_gib
            parts = ", ".join(f"{name} {value:.1f}" for name, value in in_gib.items())
            add(f"while {phase}", f"{sum(in_gib.values()):.1f} = {parts}")
        most = max(sum(items.values()) for items in self.report.memory_gib.values())
        usable = USABLE_SHARE * gpu.memory_gib
        add("of the GPU", f"{gpu.memory_gib:.1f}, of which {usable:.1f} can be used")
        if most > usable:
            self.report.warnings.append(
                f"The estimate of {most:.1f} GiB exceeds the {usable:.1f} that can be used of a GPU by "
                f"{most - usable:.1f}. In this order: " + "; ".join(self.estimates.memory_remedies()) + "."
            )

    def _host_memory(self, checkpoints: float) -> None:
        if checkpoints > 0:
            self.report.host_gib["checkpoints"] = each = checkpoints / GIB
            value = f"{each:.1f} for each process, {each * self.engine.num_processes:.1f} for all"
            self.report.add(_MEMORY, "of the host, for checkpoints", value)

    def _rollout_time(self, mean: Rows, steps: int) -> None:
        estimates = self.estimates
        prompts = self._rows_per_step() / self.args.num_generations
        work, seconds, decode = {}, {}, estimates.decode_seconds(mean)
        for shares in (True, False):
            per_prompt = estimates.rollout_flops(replace(mean, shares_prefix=shares))
            work[shares] = {name: value * prompts for name, value in per_prompt.items()}
            seconds[shares] = estimates.seconds(sum(work[shares].values())) + decode
        self.report.step_seconds = {"shared": seconds[True], "plain": seconds[False], "decode": decode}
        flops, total = work[mean.shares_prefix], seconds[mean.shares_prefix]
        parts = ", ".join(f"{name} {value / 1e15:,.2f}" for name, value in flops.items())
        add = partial(
            self.report.add, f"Time, an estimate: {estimates.mfu:.0%} of the peak assumed, at the mean prompt"
        )
        add("10^15 operations of a step", f"{sum(flops.values()) / 1e15:,.2f} = {parts}")
        add(
            "seconds of a step", f"{total:,.1f}, of which {decode:,.1f} decoding, bound by the bandwidth of the memory"
        )
        schedule = self.args.get_schedule()
        without_teacher = steps * (1 - schedule.teacher_share(steps)) if "teacher" in flops else 0
        saved = {shares: without_teacher * estimates.seconds(work[shares].get("teacher", 0)) for shares in work}
        hours = {shares: (steps * seconds[shares] - saved[shares]) / 3600 for shares in work}
        add("hours of the run", f"{hours[mean.shares_prefix]:,.1f}")
        if schedule.kind == "plateau":
            add("the teacher ends", "when its metric stops rising; the hours are those of a run where it never does")
        elif without_teacher:
            add("the teacher ends", f"after {steps - without_teacher:,.0f} of {steps:,} steps")
        if mean.shares_prefix:
            plain = seconds[False]
            add(
                "without the shared prefix",
                f"{plain:,.1f} s per step, {hours[False]:,.1f} hours: {plain / total:.1f} times as long",
            )

    # --- SFT

    def supervised(self, allow_extrapolation: bool = False, keep_special_tokens: Collection[str] = ()) -> None:
        args, models = self.args, self.models
        findings = supervised_findings(args, models, self.datasets, allow_extrapolation, keep_special_tokens)
        self.report.problems += findings.problems
        self.report.warnings += [*findings.warnings, *packing_warnings(args)]
        if not findings.rows_are_readable:
            return
        rows, sample = _sample(self.dataset, "prompt", "completion")
        lengths = [num_row_tokens(prompt, completion, models.tokenizer) for prompt, completion in rows] or [0]
        max_length = args.max_length or max(lengths)
        longest = min(max(lengths), max_length)
        mean = statistics.mean(min(length, max_length) for length in lengths)
        packed = args.max_length if args.packing and args.max_length else None
        num_steps, rows_per_step = self._supervised_batches(mean, packed)
        self.report.add(
            "Lengths in tokens",
            "rows, prompt and completion",
            f"median {sorted(lengths)[len(lengths) // 2]:,}, most {max(lengths):,} ({sample})",
        )
        self._positions()
        tokens = args.per_device_train_batch_size * (packed or longest)
        self._memory(self.estimates.supervised_memory(tokens))
        self._host_memory(self.estimates.host_checkpoints(tokens))
        self._supervised_time(self.estimates.supervised_flops(int(mean)) * rows_per_step, num_steps)

    def _supervised_batches(self, mean: float, packed: int | None) -> tuple[int, float]:
        """Reports the batches, and returns the number of steps, and of rows of the data set per step."""
        args, num_processes, num_rows = self.args, self.engine.num_processes, len(self.dataset)
        rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        batch = self._rows_per_step()
        num_trained = math.ceil(num_rows * mean / packed) if packed else num_rows
        steps_per_epoch = num_trained / batch
        steps = self._num_steps(steps_per_epoch)
        kind = f"packed rows of {packed:,} tokens" if packed else "rows"
        add = partial(self.report.add, "Batches")
        add("an optimizer step", f"{num_processes} processes x {rows} x {accumulation} = {batch} {kind}")
        add("steps", f"{steps:,}, {steps / steps_per_epoch:.2f} epochs of {num_rows:,} rows")
        add("tokens per epoch", f"{num_rows * mean / 1e6:,.1f} million")
        return steps, num_rows / steps_per_epoch

    def _supervised_time(self, flops: float, steps: int) -> None:
        seconds = self.estimates.seconds(flops)
        self.report.step_seconds = {"plain": seconds}
        add = partial(self.report.add, f"Time, an estimate: {self.estimates.mfu:.0%} of the peak assumed")
        add("10^15 operations of a step", f"{flops / 1e15:,.2f}")
        add("seconds of a step", f"{seconds:,.1f}")
        add("hours of the run", f"{steps * seconds / 3600:,.1f}")


def _sample(dataset: Dataset, *columns: str) -> tuple[list, str]:
    """Values of columns: of all rows, or of a random sample and of those that look longest."""
    table = dataset.select_columns(list(columns))

    def values(index: int) -> Any:
        row = table[index]
        return row[columns[0]] if len(columns) == 1 else tuple(row[name] for name in columns)

    if len(dataset) <= SAMPLED_ROWS:
        return [values(i) for i in range(len(dataset))], f"all {len(dataset):,} rows"
    sizes = sorted(range(len(dataset)), key=lambda i: len(str(values(i))))
    chosen = {*random.Random(0).sample(range(len(dataset)), SAMPLED_ROWS), *sizes[-LONGEST_ROWS:]}
    return [values(i) for i in sorted(chosen)], f"{SAMPLED_ROWS:,} rows at random and the {LONGEST_ROWS} longest"
