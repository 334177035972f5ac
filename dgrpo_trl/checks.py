"""What a run refuses, each rule once: rows, their number, lengths, vocabularies, the shared prefix.

No weights are read. Functions called `..._problems` return texts, none where all is well. The trainer raises them
before weights load, the dry run lists them in its report, the evaluation raises those that concern it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from trl import SFTConfig

from .chat import (
    Prompt,
    kept_token_problems,
    max_num_tokens,
    num_prompt_tokens,
    num_row_tokens,
    special_token_warnings,
)
from .config import DGRPOConfig
from .ends import end_warnings
from .models import Models
from .positions import YARN_EXAMPLE, sampler_scaling_problems, teacher_scaling_warnings, trained_positions
from .row_checks import (
    answer_problems,
    answer_warnings,
    compares_references,
    prompt_column_problems,
    prompt_problems,
    reward_column_problems,
    template_problems,
)
from .shared_prefix import unsupported_reason
from .vocabularies import unreadable_problems, unshared_tokens, vocabulary_problems, vocabulary_warnings


# Tokenizing every row of a long-context data set takes hours; the longest rows decide
MAX_ROWS_TOKENIZED = 512


@dataclass
class Findings:
    """What is wrong with a run: with `problems` it must not start, with `warnings` it may.

    Without `rows_are_readable` nothing can be said of lengths.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    rows_are_readable: bool = True

    def raise_for_problems(self) -> None:
        """Raises [`ValueError`] that lists all problems, if there are any."""
        raise_problems(self.problems)


def raise_problems(problems: Sequence[str]) -> None:
    """Raises [`ValueError`] that lists `problems`, if there are any."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"The run cannot start, for {len(problems)} reasons:\n- " + "\n- ".join(problems))


# --- A run of the trainer


def run_findings(
    args: DGRPOConfig,
    models: Models,
    datasets: Mapping[str, Dataset | IterableDataset],
    num_processes: int,
    tools: Sequence[Callable] | None = None,
    needs_prompts: bool = True,
    reward_funcs: Sequence[Any] = (),
) -> Findings:
    """All that a run of dGRPO, GRPO or on-policy distillation refuses or doubts.

    Args:
        args ([`DGRPOConfig`]):
            The run.
        models ([`Models`]):
            Student and teacher.
        datasets (`Mapping[str, Dataset | IterableDataset]`):
            Data sets by the name of the argument that they are passed as. The prompts of a stream are not checked.
        num_processes (`int`):
            Devices of all nodes.
        tools (`Sequence[Callable]`, *optional*):
            Tools that the chat template describes in every prompt.
        needs_prompts (`bool`, *optional*, defaults to `True`):
            Whether every data set must have rows and prompts; an environment may make its own.
        reward_funcs (`Sequence`, *optional*):
            Reward functions that get their columns from the data sets alone.
    """
    findings = Findings()
    problems, warnings = findings.problems, findings.warnings
    readable: list[tuple[str, Dataset | IterableDataset]] = []
    for name, dataset in datasets.items():
        faults = _row_problems(args, models, dataset, f"`{name}`", tools, needs_prompts)
        problems += faults
        findings.rows_are_readable &= not faults
        if not faults:
            readable.append((name, dataset))
            warnings += _special_token_warnings(args, models, dataset, f"`{name}`")
        answers = _answer_findings(args, dataset, f"`{name}`", reward_funcs)
        problems += answers.problems
        warnings += answers.warnings
    problems += kept_token_problems(args.keep_special_tokens, models.tokenizer)
    if "train_dataset" in datasets:
        problems += batch_problems(args, datasets["train_dataset"], num_processes)
    problems += schedule_problems(args, args.max_steps if args.max_steps > 0 else None)
    other_teacher = None if models.teacher is models.student else models.teacher
    for name, config in (("the student", models.student), ("the teacher", other_teacher)):
        if config is not None and args.shared_prefix == "on":
            problems += sharing_problems(unsupported_reason(config), name)
    if other_teacher is not None:
        student_vocab = models.tokenizer.get_vocab()
        differing = vocabulary_problems(
            student_vocab,
            models.teacher_vocab,
            models.student.get_text_config().vocab_size,
            other_teacher.get_text_config().vocab_size,
            set(models.tokenizer.get_added_vocab()),
        )
        warnings += vocabulary_warnings(student_vocab, models.teacher_vocab)
        problems += differing or _unreadable_problems(args, models, dict(readable))
        warnings += teacher_scaling_warnings(models.student, other_teacher)
        if models.student_ends and models.teacher_ends and not args.distill_mask_eos:
            warnings += end_warnings(models.student_ends, models.teacher_ends, models.tokenizer)
        if models.teacher_vocab is None:
            warnings.append("The loaded teacher has no tokenizer: its token ids are taken to be the student's.")
    if args.use_vllm:
        found = sampler_scaling_problems(models.student, models.stored_student)
        (problems if args.vllm_mode == "colocate" else warnings).extend(found)  # a server may be set up by hand

    def count_tokens(prompt: Prompt) -> int:
        return num_prompt_tokens(prompt, models.tokenizer, args.chat_template_kwargs, tools, args.keep_special_tokens)

    for _, dataset in readable:
        if isinstance(dataset, Dataset) and "prompt" in dataset.column_names:
            for reader in _readers(args, models, dataset):
                found = _prompt_length_problems(dataset, reader, count_tokens, args.max_completion_length or 0)
                (warnings if reader.is_model and args.allow_extrapolation else problems).extend(found)
    return findings


# --- Data


def _row_problems(
    args: DGRPOConfig,
    models: Models,
    dataset: Dataset | IterableDataset,
    name: str,
    tools: Sequence[Callable] | None,
    needs_prompts: bool,
) -> list[str]:
    """Whether there are rows, each with a prompt that can be read. Of a stream only the columns are checked."""
    columns = dataset.column_names
    problems = prompt_column_problems(columns, name) if needs_prompts and columns is not None else []
    if not isinstance(dataset, Dataset):
        return problems
    if needs_prompts:
        problems += _empty_problems(dataset, name)
    for column in ("prompt", args.teacher_prompt_column if models.teacher else None):
        if column is None or column not in columns:
            continue
        faults = prompt_problems(dataset[column], name, column, takes_none=column != "prompt")
        is_text = models.student.get_text_config() is models.student  # a processor has a template of its own
        if not faults and is_text:
            faults = template_problems(dataset[column], name, models.tokenizer, args.chat_template_kwargs, tools)
        problems += faults
    return problems


def _special_token_warnings(
    args: DGRPOConfig, models: Models, dataset: Dataset | IterableDataset, name: str
) -> list[str]:
    if not isinstance(dataset, Dataset):
        return []
    columns = ["prompt", args.teacher_prompt_column if models.teacher else None]
    warnings = []
    for column in columns:
        if column in dataset.column_names:
            where = name if column == "prompt" else f"{name}, `{column}`"
            warnings += special_token_warnings(dataset[column], where, models.tokenizer, args.keep_special_tokens)
    return warnings


def _empty_problems(dataset: Dataset, name: str) -> list[str]:
    if len(dataset) > 0:
        return []
    purpose = "train on" if name == "`train_dataset`" else "evaluate on"
    return [
        f"{name} is empty. There is nothing to {purpose}. Check the path and the split, and whether a filter dropped "
        "every row."
    ]


def _answer_findings(
    args: DGRPOConfig, dataset: Dataset | IterableDataset, name: str, reward_funcs: Sequence[Any]
) -> Findings:
    """Whether reward functions get the columns that they take."""
    findings = Findings()
    columns = dataset.column_names
    if columns is None:
        return findings
    if args.remove_unused_columns:
        columns, fix = [], "Set `remove_unused_columns=False`."
    else:
        fix = "Rename yours with `dataset.rename_column`, or give the argument a default."
    findings.problems += reward_column_problems(reward_funcs, columns, name, fix)
    comparing = [func for func in reward_funcs if compares_references(func)]
    if comparing and "answer" in columns and isinstance(dataset, Dataset):
        findings.problems += answer_problems(dataset["answer"], name, comparing[0])
        if not findings.problems:
            for func in comparing:
                findings.warnings += answer_warnings(dataset["answer"], name, func)
    return findings


def image_problems(datasets: Mapping[str, Dataset | IterableDataset]) -> list[str]:
    """A problem for each data set with images, which a teacher does not score.

    A column that is empty in every row has none. That of a stream is not read: images of it are refused as they come.
    """
    return [
        f"`{name}` has images, which the teacher does not score yet. Use a text-only data set, or set "
        "`distill_coef=0`."
        for name, dataset in datasets.items()
        if isinstance(dataset, Dataset) and any(_has_images(dataset, column) for column in ("image", "images"))
    ]


def _has_images(dataset: Dataset, column: str) -> bool:
    if column not in dataset.column_names:
        return False
    # As stored, so that nothing is decoded
    stored = dataset.select_columns(column).with_format("arrow")
    return any(value for batch in stored.iter(1000) for value in batch[column].to_pylist())


def batch_problems(args: DGRPOConfig, dataset: Dataset | IterableDataset, num_processes: int) -> list[str]:
    """TRL leaves out what does not fill a generation batch, and would end without a step where nothing does."""
    if not isinstance(dataset, Dataset):
        return []
    completions = args.per_device_train_batch_size * num_processes * args.steps_per_generation
    num_prompts = completions // args.num_generations
    if len(dataset) >= num_prompts:
        return []
    return [
        f"`train_dataset` has {len(dataset)} rows, and a generation batch takes {num_prompts} prompts "
        f"({completions} completions over all processes, {args.num_generations} per prompt). Not one step would be "
        "made. Give more rows, or lower `per_device_train_batch_size`, `gradient_accumulation_steps` or "
        "`steps_per_generation`."
    ]


def missing_reward_problems(args: DGRPOConfig, has_rewards: bool) -> list[str]:
    """A problem for each option that needs rewards in a run that has none."""
    needed = {"reward_start": args.reward_start is not None, "distill_gate": args.distill_gate != "all"}
    if has_rewards:
        return []
    return [
        f"`{name}` is set, but the run has no reward. It learns from the teacher alone, all the time. Give "
        "`reward_funcs`, or leave it out."
        for name, is_set in needed.items()
        if is_set
    ]


def schedule_problems(args: DGRPOConfig, num_steps: int | None) -> list[str]:
    """What cannot be right of the schedule in a run of `num_steps`, where that is known."""
    schedule = args.get_schedule()
    problems = [] if num_steps is None else schedule.problems(num_steps)
    if schedule.reads_logs and schedule.metric.startswith("eval_") and args.eval_strategy == "no":
        problems.append(
            f"The schedule waits for {schedule.metric!r} to stop rising, but `eval_strategy` is 'no', so it is never "
            "measured. Set `eval_strategy: steps`, or name a metric of training such as 'reward'."
        )
    return problems


# --- Lengths


@dataclass(frozen=True)
class _Reader:
    """Who reads which prompts, and how many tokens it takes, completion included."""

    name: str
    column: str
    max_tokens: int
    is_model: bool = True


def _readers(args: DGRPOConfig, models: Models, dataset: Dataset) -> list[_Reader]:
    """Those with a limit; student and teacher are one if they read the same prompts and have the same positions."""
    names: dict[tuple[str, int], list[str]] = {}
    for name, positions in models.positions().items():
        own = args.teacher_prompt_column if name == "the teacher" else None
        column = own if own is not None and own in dataset.column_names else "prompt"
        if positions is not None:
            names.setdefault((column, positions), []).append(name)
    readers = [_Reader(" and ".join(both), column, positions) for (column, positions), both in names.items()]
    if args.use_vllm and args.vllm_max_model_length is not None:
        readers.append(_Reader("vLLM", "prompt", args.vllm_max_model_length, is_model=False))
    return readers


def _prompt_length_problems(
    dataset: Dataset, reader: _Reader, count_tokens: Callable[[Prompt], int], max_completion_length: int
) -> list[str]:
    """A problem if prompts, each with the longest completion, have more tokens than `reader` takes.

    Where a row has nothing in the reader's column, its `prompt` is read.
    """
    budget = reader.max_tokens - max_completion_length
    prompts = _prompts_read(dataset, reader.column)
    sizes = [max_num_tokens(prompt) for prompt in prompts]
    found = _rows_over(budget, sizes, lambda i: count_tokens(prompts[i]))
    if found is None:
        return []
    rows, longest = found
    subject = (
        f"{rows} have a '{reader.column}' that is too long: with a completion of {max_completion_length:,} "
        "(`max_completion_length`) the longest"
    )
    longest += max_completion_length
    shorten = f"Filter out prompts over {budget:,} tokens (`max_prompt_tokens`), lower `max_completion_length`"
    if reader.is_model:
        return position_problems(subject, longest, reader.max_tokens, reader.name, shorten)
    return [
        f"{subject} has {longest:,} tokens, more than `vllm_max_model_length` ({reader.max_tokens:,}). vLLM would "
        f"refuse it. {shorten}, or raise `vllm_max_model_length`."
    ]


def _prompts_read(dataset: Dataset, column: str) -> Sequence[Prompt]:
    """The prompts of a column; where a row has none there, its `prompt`."""
    prompts: Sequence[Prompt] = dataset[column]
    if column == "prompt":
        return prompts
    return [prompt if own is None else own for own, prompt in zip(prompts, dataset["prompt"], strict=True)]


def supervised_findings(
    args: SFTConfig,
    models: Models,
    datasets: Mapping[str, Dataset | IterableDataset],
    allow_extrapolation: bool = False,
    keep_special_tokens: Collection[str] = (),
) -> Findings:
    """What SFT refuses of rows with `prompt` and `completion`: what cannot be read, or is longer than the positions.

    Streams are not checked.
    """
    findings = Findings(kept_token_problems(keep_special_tokens, models.tokenizer))
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset):
            continue
        faults = [
            *_empty_problems(dataset, f"`{name}`"),
            *prompt_problems(dataset["prompt"], f"`{name}`"),
            *prompt_problems(dataset["completion"], f"`{name}`", "completion"),
        ]
        findings.rows_are_readable &= not faults
        findings.problems += faults
        if not faults:
            findings.warnings += special_token_warnings(
                dataset["prompt"], f"`{name}`", models.tokenizer, keep_special_tokens
            )
            found = _row_length_problems(args, models, dataset)
            (findings.warnings if allow_extrapolation else findings.problems).extend(found)
    return findings


def _row_length_problems(args: SFTConfig, models: Models, dataset: Dataset) -> list[str]:
    positions = trained_positions(models.student)
    if positions is None or (args.max_length is not None and args.max_length <= positions):  # none is longer
        return []
    prompts, completions = dataset["prompt"], dataset["completion"]
    sizes = [
        max_num_tokens(prompt) + max_num_tokens(completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    found = _rows_over(positions, sizes, lambda i: num_row_tokens(prompts[i], completions[i], models.tokenizer))
    if found is None:
        return []
    rows, longest = found
    subject = f"{rows} are too long: the longest"
    return position_problems(subject, longest, positions, "the student", "Lower `max_length`", "`model_init_kwargs`")


def packing_warnings(args: SFTConfig) -> list[str]:
    """A warning if rows are packed for an attention that knows masks alone: exact, but of quadratic memory."""
    attention = (args.model_init_kwargs or {}).get("attn_implementation") or "sdpa"
    if not args.packing or args.max_length is None or "flash" in attention:
        return []
    gib = args.max_length**2 / 2**30
    return [
        f"Rows are packed, and {attention!r} keeps them apart by a mask of {args.max_length:,} x {args.max_length:,} "
        f"({gib:,.1f} GiB), and computes what it masks too. Set `attn_implementation: flash_attention_2`, with the "
        "extra `flash`, or `packing: false`."
    ]


def _rows_over(budget: int, sizes: Sequence[int], count_tokens: Callable[[int], int]) -> tuple[str, int] | None:
    """How many rows have more than `budget` tokens, in words, and the length of the longest; `None` if none has.

    `sizes` are numbers of tokens that the rows cannot exceed: only rows over the budget by this measure are tokenized,
    and of these the `MAX_ROWS_TOKENIZED` longest. `count_tokens` maps the index of a row to its length.
    """
    candidates = sorted((i for i, size in enumerate(sizes) if size > budget), key=lambda i: sizes[i])
    lengths = [count_tokens(i) for i in candidates[-MAX_ROWS_TOKENIZED:]]
    num_over = sum(length > budget for length in lengths)
    if num_over == 0:
        return None
    at_least = "at least " if len(lengths) < len(candidates) else ""
    return f"{at_least}{num_over} of {len(sizes)} rows", max(lengths)


def arriving_prompt_problems(
    prompt_ids: Sequence[Sequence[int]], max_completion_length: int, positions: int | None, reader: str
) -> list[str]:
    """A problem if a prompt that is about to be read is too long: streams are checked no earlier."""
    longest = max(map(len, prompt_ids)) + max_completion_length
    subject = f"With a completion of {max_completion_length:,} (`max_completion_length`) a prompt of this batch"
    shorten = "Filter out longer rows (`max_prompt_tokens`), lower `max_completion_length`"
    return position_problems(subject, longest, positions, reader, shorten)


def position_problems(
    subject: str,
    num_tokens: int,
    positions: int | None,
    reader: str,
    shorten: str,
    arguments: str = "`model_init_kwargs` and `teacher_model_init_kwargs`",
) -> list[str]:
    """A problem if `num_tokens`, completion included, are more than the `positions` that `reader` was trained on.

    The message begins with `subject`, which has these tokens, and says how to `shorten` the text, and in which
    `arguments` to set more positions.
    """
    if positions is None or num_tokens <= positions:
        return []
    return [
        f"{subject} has {num_tokens:,} tokens, more than the {positions:,} positions of {reader}. Beyond the "
        f"positions that it was trained on, a model is silently wrong. {shorten}, or extend the positions by YaRN: "
        f"{YARN_EXAMPLE} in {arguments}. For a model that extrapolates, set `allow_extrapolation: true`."
    ]


# --- Models


def placement_problems(model: PreTrainedModel, name: str) -> list[str]:
    """A problem if the model called `name`, which is loaded, is spread over devices by its `device_map`."""
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    if len(devices) < 2:
        return []
    return [
        f"The `device_map` of {name} spreads it over {', '.join(devices)}. The loss needs student and teacher on one "
        "device. Leave `device_map` out, and use all GPUs by `accelerate launch` with a configuration from "
        "`recipes/accelerate_configs`: ZeRO-3 gives each of them a shard of both models."
    ]


def _unreadable_problems(
    args: DGRPOConfig, models: Models, datasets: Mapping[str, Dataset | IterableDataset]
) -> list[str]:
    """A problem for each data set with prompts that hold tokens that the teacher lacks."""
    lacking = unshared_tokens(models.tokenizer.get_vocab(), models.teacher_vocab)
    problems = []
    for name, dataset in datasets.items():
        if lacking and isinstance(dataset, Dataset) and "prompt" in dataset.column_names:
            own = args.teacher_prompt_column if args.teacher_prompt_column in dataset.column_names else None
            prompts = _prompts_read(dataset, own or "prompt")
            problems += unreadable_problems(
                prompts,
                f"`{name}`",
                models.tokenizer,
                lacking,
                args.chat_template_kwargs,
                args.keep_special_tokens,
            )
    return problems


def sharing_problems(unsupported_reason: str | None, name: str) -> list[str]:
    """A problem if the model called `name` cannot share prefixes although `shared_prefix` is `"on"`."""
    if unsupported_reason is None:
        return []
    return [
        f"`shared_prefix` is 'on', but {name} cannot run packed rows exactly: {unsupported_reason}. Set it to 'auto', "
        "which shares wherever that is exact, or to 'off'."
    ]
