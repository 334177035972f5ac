"""A look at a run before it starts: batches, lengths, positions, memory, hours. No weights are read, no GPU is used.

Models are built on the meta device to count their parameters. Memory and time are estimates, by these rules:

- Weights, gradients and optimiser: bytes a parameter by engine and optimiser, divided by the shards.
- Activations: per token and layer, what the layers of a dense decoder keep for the backward pass; with checkpointing,
  each layer's input and one layer's worth. `scripts/benchmark_memory.py` compares them with what is measured.
- Time: the operations of matrix products and attention over the GPU's peak times `mfu`; decoding by its bandwidth.
"""

import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from ..chat import prompt_token_counter
from ..checks import max_positions, rope_scaling, trained_positions
from ..config import DGRPOConfig
from ..losses import TILE_TOKENS
from ..shared_prefix import unsupported_reason
from ..teacher import BASE_TEACHER, check_vocabularies, load_teacher_config


GIB = 2**30
# Rows tokenised for the statistics of lengths, and of the longest by bytes
SAMPLED_ROWS, LONGEST_ROWS = 2000, 200
# Beyond this share of its memory a GPU runs out of it in practice: fragments, kernels, communication
USABLE_SHARE = 0.92


@dataclass(frozen=True)
class Gpu:
    """What the estimates need of a GPU.

    Args:
        memory_gib (`float`):
            Its memory.
        tflops (`float`):
            Dense bfloat16 operations, 10^12 a second, as published.
        bandwidth (`float`):
            Of its memory, 10^9 bytes a second, as published.
    """

    memory_gib: float
    tflops: float
    bandwidth: float


GPUS = {
    "a100-40gb": Gpu(39.4, 312, 1555),
    "a100-80gb": Gpu(79.1, 312, 2039),
    "h100-80gb": Gpu(79.1, 989, 3350),
    "h200-141gb": Gpu(139.8, 989, 4800),
    "l40s-48gb": Gpu(44.4, 362, 864),
    "rtx4090-24gb": Gpu(23.5, 165, 1008),
}


@dataclass
class PreflightArguments:
    """The dry run of a training script."""

    dry_run: bool = field(
        default=False,
        metadata={"help": "Only look: lengths, positions, batches, memory and hours, without weights or a GPU."},
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


def without_gpu(arguments: list[str]) -> list[str]:
    """The command line of a dry run, made fit for a machine without a GPU, where transformers refuses `bf16`."""
    return [*arguments, "--use_cpu", "true"] if "--dry_run" in arguments else arguments


@dataclass(frozen=True)
class Engine:
    """How a run is distributed.

    Args:
        kind (`str`):
            `"single"`, `"ddp"`, `"zero1"`, `"zero2"`, `"zero3"` or `"fsdp2"`.
        num_processes (`int`):
            Devices of all nodes.
        offload_optimizer (`bool`):
            Its states are in the memory of the host.
        offload_params (`bool`):
            So are the weights.
    """

    kind: str = "single"
    num_processes: int = 1
    offload_optimizer: bool = False
    offload_params: bool = False

    @property
    def is_deepspeed(self) -> bool:
        return self.kind.startswith("zero")

    def shards(self, what: str) -> int:
        """Over how many devices `"weights"`, `"gradients"` or `"optimizer"` are spread."""
        sharded = {
            "weights": ("zero3", "fsdp2"),
            "gradients": ("zero2", "zero3", "fsdp2"),
            "optimizer": ("zero1", "zero2", "zero3", "fsdp2"),
        }[what]
        return self.num_processes if self.kind in sharded else 1


def read_engine(path: str | Path | None) -> Engine:
    """The engine that an accelerate configuration describes; one process without one.

    Raises:
        ValueError: If it cannot be read, or its kind is not known here.
    """
    if path is None:
        return Engine()
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        processes = int(values.get("num_processes", 1))
        kind = str(values.get("distributed_type", "NO"))
        if kind == "DEEPSPEED":
            given = values.get("deepspeed_config") or {}
            if "deepspeed_config_file" in given:
                text = Path(given["deepspeed_config_file"]).read_text(encoding="utf-8")
                zero = json.loads(text).get("zero_optimization", {})
                devices = {name: (zero.get(f"offload_{name}") or {}).get("device") for name in ("optimizer", "param")}
                stage = int(zero.get("stage", 0))
            else:
                devices = {name: given.get(f"offload_{name}_device") for name in ("optimizer", "param")}
                stage = int(given.get("zero_stage", 2))
            is_away = {name: device not in (None, "none") for name, device in devices.items()}
            return Engine(f"zero{stage}" if stage else "ddp", processes, is_away["optimizer"], is_away["param"])
        if kind == "FSDP":
            is_away = bool((values.get("fsdp_config") or {}).get("fsdp_offload_params"))
            return Engine("fsdp2", processes, is_away, is_away)
        return Engine("ddp" if processes > 1 else "single", processes)
    except (OSError, ValueError, AttributeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(
            f"The accelerate configuration {str(path)!r} cannot be read: {error!r}. The estimate needs the number of "
            "processes and the ZeRO stage. See `recipes/accelerate_configs` for examples."
        ) from error


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory and its operations."""

    num_parameters: int
    num_trainable: int
    num_embedding: int  # of its input embeddings, and the LM head where that is another matrix
    num_layers: int
    hidden: int
    query: int  # width of all heads together
    key: int
    mlp: int  # width of what a token passes through: of all its experts
    vocab: int

    @classmethod
    def of(cls, config: PreTrainedConfig, peft_config: Any = None, trust_remote_code: bool = False) -> "Shape":
        """Counts on the meta device: nothing is read or allocated."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            embeddings = {
                id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())
            }
            if peft_config is not None:
                from peft import get_peft_model

                model = get_peft_model(model, peft_config)
        text = config.get_text_config()
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        experts = getattr(text, "num_experts_per_tok", None)
        mlp = text.moe_intermediate_size * experts if experts else text.intermediate_size
        return cls(
            num_parameters=sum(p.numel() for p in model.parameters()),
            num_trainable=sum(p.numel() for p in model.parameters() if peft_config is None or p.requires_grad),
            num_embedding=sum(weight.numel() for weight in embeddings.values()),
            num_layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            query=heads * head_dim,
            key=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
            mlp=mlp,
            vocab=text.vocab_size,
        )

    def active(self) -> int:
        """Parameters of the layers that a token is multiplied with: without embeddings, and its own experts alone."""
        per_layer = self.hidden * (2 * self.query + 2 * self.key) + 3 * self.hidden * self.mlp
        return self.num_layers * per_layer

    def kept_by_layer(self, width: int) -> int:
        """Bytes a token that one layer keeps for its backward pass, with values of `width` bytes.

        Each of its two norms keeps input and normalised input in float32, and its output. Attention keeps queries and
        keys before and after their norm and their rotation, values and its output; the MLP its four products. A frozen
        layer keeps its input too, for the adapter's gradient.
        """
        norms = 2 * self.hidden * (4 + 4 + width)
        attention = width * (4 * self.query + 4 * self.key)
        return norms + attention + width * 4 * self.mlp

    def transient(self, width: int) -> int:
        """Bytes a token of what is alive beside that at the widest place of a layer's backward pass.

        Two gradients of the width of the MLP (what they are made of goes as they come), those of its input and output,
        and one of attention's output.
        """
        return width * (2 * self.mlp + 2 * self.hidden + self.query)

    def forward_flops(self, segments: list[tuple[int, int]]) -> float:
        """Operations of one forward without the LM head.

        Args:
            segments (`list[tuple[int, int]]`):
                Number of tokens, and how many stand before the first of them, of each segment that is run.
        """
        tokens = sum(n for n, _ in segments)
        pairs = sum(n * before + n * (n + 1) / 2 for n, before in segments)
        return 2 * self.active() * tokens + 4 * self.num_layers * self.query * pairs

    def head_flops(self, tokens: int) -> float:
        return 2.0 * self.hidden * self.vocab * tokens


@dataclass
class Report:
    """What was found. `str(report)` is the text for the reader."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    memory_gib: dict[str, dict[str, float]] = field(default_factory=dict)
    step_seconds: dict[str, float] = field(default_factory=dict)

    def add(self, section: str, name: str, value: str) -> None:
        self.sections.setdefault(section, []).append((name, value))

    def __str__(self) -> str:
        lines = []
        for section, rows in self.sections.items():
            width = max(len(name) for name, _ in rows)
            lines += [section, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
        for title, items in (("Warnings", self.warnings), ("Problems: the run must not start", self.problems)):
            if items:
                lines += [title, *(f"  - {item}" for item in items), ""]
        return "\n".join(lines) if lines else "Nothing to report."

    def raise_for_problems(self) -> None:
        """Raises [`ValueError`] that lists all problems, if there are any."""
        if self.problems:
            raise ValueError("The run cannot start:\n- " + "\n- ".join(self.problems))


def preflight(
    args: TrainingArguments,
    student: str,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    gpu: Gpu,
    mfu: float = 0.4,
    peft_config: Any = None,
) -> Report:
    """Looks at a run of dGRPO, or of SFT, before it starts.

    Args:
        args ([`DGRPOConfig`] or [`~trl.SFTConfig`]):
            The run. Its `model_init_kwargs` say how the student's configuration is changed.
        student (`str`):
            Hub id or path.
        dataset ([`~datasets.Dataset`]):
            Rows to train on, with `prompt`; for SFT with `completion` too. A stream has no length and is refused.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's.
        engine ([`Engine`]):
            How it is distributed.
        gpu ([`Gpu`]):
            Every device.
        mfu (`float`, *optional*, defaults to `0.4`):
            Share of the GPU's peak that training reaches: an assumption.
        peft_config (*optional*):
            LoRA.

    Returns:
        [`Report`]

    Raises:
        ValueError: If a configuration cannot be read, or `dataset` is a stream.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError("A dry run counts rows and tokens, and a stream has no end. Set `dataset_streaming: false`.")
    kwargs = args.model_init_kwargs or {}
    names = ("revision", "rope_parameters", "max_position_embeddings")
    changes = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    config, stored_config = (
        AutoConfig.from_pretrained(student, trust_remote_code=args.trust_remote_code, **kwargs)
        for kwargs in (changes, {name: changes[name] for name in changes if name == "revision"})
    )
    shape = Shape.of(config, peft_config, args.trust_remote_code)
    report = Report()
    look = _Look(args, config, stored_config, shape, engine, gpu, mfu, tokenizer, dataset, report)
    if isinstance(args, DGRPOConfig):
        look.rollouts()
    else:
        look.supervised()
    return report


@dataclass
class _Look:
    args: TrainingArguments
    config: PreTrainedConfig
    stored_config: PreTrainedConfig  # as it lies beside the weights
    shape: Shape
    engine: Engine
    gpu: Gpu
    mfu: float
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    report: Report
    tile_tokens: int = TILE_TOKENS["accelerator"]

    # --- dGRPO, GRPO and on-policy distillation

    def rollouts(self) -> None:
        args, engine = self.args, self.engine
        group, rows = args.num_generations, args.per_device_train_batch_size
        accumulation = args.gradient_accumulation_steps
        completions = engine.num_processes * rows * accumulation
        prompts = completions / group
        steps_an_epoch = len(self.dataset) * group * args.num_iterations / completions
        steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_an_epoch * args.num_train_epochs)
        add = self._adder("Batches")
        add(
            "an optimiser step",
            f"{engine.num_processes} processes x {rows} x {accumulation} = {completions} "
            f"completions = {prompts:g} prompts x {group}",
        )
        add(
            "a generation batch",
            f"{engine.num_processes * rows * args.steps_per_generation} completions in {args.steps_per_generation} "
            "micro-batches",
        )
        add("steps", f"{steps:,}, {steps / steps_an_epoch:.2f} epochs of {len(self.dataset):,} prompts")
        if completions % group:
            self.report.problems.append(
                f"{completions} completions a step are no multiple of `num_generations` ({group}). Change "
                "`per_device_train_batch_size` or `gradient_accumulation_steps`."
            )
        elif rows % group and args.shared_prefix != "off":
            self.report.warnings.append(
                f"`per_device_train_batch_size` ({rows}) is no multiple of `num_generations` ({group}): groups are "
                "split over micro-batches, and their prompts run more than once."
            )
        completion = args.max_completion_length or 0
        lengths = self._lengths("prompt", "the student", max_positions(self.config.get_text_config()), completion)
        teacher_shape, teacher_lengths = self._teacher(lengths, completion)
        self._check_sampler()
        if args.use_vllm and args.vllm_max_model_length and max(lengths) + completion > args.vllm_max_model_length:
            self.report.problems.append(
                f"The longest prompt has {max(lengths)} tokens, which with `max_completion_length` ({completion}) are "
                f"more than `vllm_max_model_length` ({args.vllm_max_model_length}). vLLM would refuse it. Raise that, "
                "or lower `max_prompt_tokens`."
            )
        epoch_tokens = (statistics.mean(lengths) + group * completion) * len(self.dataset)
        add("tokens an epoch", f"{epoch_tokens / 1e6:,.1f} million at most, prompts once")
        reason = None if args.shared_prefix == "off" else unsupported_reason(self.config)
        shares = args.shared_prefix != "off" and reason is None
        add("shared prefix", "on" if shares else f"off: {reason or 'so configured'}")
        self._rollout_memory(max(lengths), completion, shares, teacher_shape, max(teacher_lengths or [0]))
        self._rollout_time(
            statistics.mean(lengths), completion, prompts, steps, shares, teacher_shape, teacher_lengths
        )

    def _teacher(self, lengths: list[int], completion: int) -> tuple[Shape | None, list[int] | None]:
        """Shape and prompt lengths of the teacher; `None` twice without one."""
        args = self.args
        name = args.teacher_model_name_or_path
        if name is None or args.distill_coef == 0:
            return None, None
        column = args.teacher_prompt_column
        has_own = column is not None and column in self.dataset.column_names
        if name == BASE_TEACHER:
            positions = max_positions(self.config.get_text_config())
            own = self._lengths(column, "the teacher", positions, completion) if has_own else lengths
            return self.shape, own
        config = load_teacher_config(name, args)
        try:
            vocab_sizes = (self.shape.vocab, config.get_text_config().vocab_size)
            check_vocabularies(self.tokenizer, name, args, *vocab_sizes)
        except ValueError as error:
            self.report.problems.append(str(error))
        self._compare_positions(config, "the teacher")
        positions = max_positions(config.get_text_config())
        own = self._lengths(column if has_own else "prompt", "the teacher", positions, completion)
        return Shape.of(config, trust_remote_code=args.trust_remote_code), own

    def _compare_positions(self, teacher: PreTrainedConfig, name: str) -> None:
        """Student and teacher scale their positions alike, or the one reads what the other does not."""
        ours, theirs = (rope_scaling(config) for config in (self.config, teacher))
        self._adder("Positions")("RoPE", f"the student's {ours or 'unscaled'}, {name}'s {theirs or 'unscaled'}")
        if ours != theirs:
            self.report.problems.append(
                f"The student's positions are scaled by {ours or 'nothing'}, {name}'s by {theirs or 'nothing'}. They "
                "would read the same document differently. Give both the same `rope_parameters` and "
                "`max_position_embeddings`, in `model_init_kwargs` and in `teacher_model_init_kwargs`."
            )

    def _check_sampler(self) -> None:
        """vLLM reads the configuration beside the weights, and sees nothing of `model_init_kwargs`."""
        ours, theirs = (rope_scaling(config) for config in (self.config, self.stored_config))
        if self.args.use_vllm and ours != theirs:
            self.report.problems.append(
                f"The student's positions are scaled by {ours or 'nothing'}, but its own configuration says "
                f"{theirs or 'nothing'}, which is what vLLM reads: rollouts would be sampled by another model than is "
                "trained. Start from a checkpoint that was saved with them, as the cold start of the 128K recipes is."
            )

    def _lengths(self, column: str, reader: str, positions: int | None, completion: int) -> list[int]:
        """Lengths of the prompts that `reader` reads, in tokens, and whether they fit its positions."""
        chosen, how = _sample(self.dataset, column)
        kwargs = getattr(self.args, "chat_template_kwargs", None) or {}
        count = prompt_token_counter(self.tokenizer, kwargs, None)
        lengths = sorted(count([prompt])[0] for prompt in chosen if prompt is not None) or [0]
        self._adder("Lengths in tokens")(
            f"`{column}`, read by {reader}",
            f"least {lengths[0]:,}, median {lengths[len(lengths) // 2]:,}, "
            f"95 % {lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]:,}, most {lengths[-1]:,} ({how})",
        )
        trained = trained_positions(self.config) if reader == "the student" else positions
        limit = trained or math.inf
        native = f", native {trained:,}" if trained != positions else ""
        self._adder("Positions")(reader, f"{positions or 'unlimited'}{native}")
        num_over = sum(length + completion > limit for length in lengths)
        if num_over:
            self.report.problems.append(
                f"{num_over} of {len(lengths)} prompts looked at have more than {limit - completion:,} tokens (the "
                f"longest {lengths[-1]:,}), so that with a completion of {completion:,} they exceed the {limit:,} "
                f"positions of {reader}. Beyond them a model is silently wrong. Lower `max_prompt_tokens`, or extend "
                "the positions: for Qwen3 to 131,072 by `max_position_embeddings: 131072` and `rope_parameters: "
                "{rope_type: yarn, rope_theta: 1000000, factor: 4.0, original_max_position_embeddings: 32768}` in "
                "`model_init_kwargs` and `teacher_model_init_kwargs`."
            )
        return lengths

    # --- Memory

    def _state(self, shape: Shape) -> dict[str, float]:
        """Bytes of the student's weights, gradients and optimiser on one device."""
        args, engine = self.args, self.engine
        stored = str((args.model_init_kwargs or {}).get("dtype") or "float32")
        # DeepSpeed keeps weights in the dtype of the arithmetic, and float32 ones beside them for the optimiser
        is_half = (args.bf16 or args.fp16) if engine.is_deepspeed else "16" in stored or stored == "auto"
        weight = 2 if is_half else 4
        master = 4 if engine.is_deepspeed and is_half else 0
        optim = str(getattr(args.optim, "value", args.optim))
        per_state = 1 if "8bit" in optim else 4 if engine.is_deepspeed else weight
        states = 0 if "sgd" in optim or "adafactor" in optim else 2 * per_state
        weights = 0 if engine.offload_params else weight * shape.num_parameters / engine.shards("weights")
        optimizer = 0 if engine.offload_optimizer else (states + master) * shape.num_trainable
        return {
            "weights": weights,
            "gradients": weight * shape.num_trainable / engine.shards("gradients"),
            "optimizer": optimizer / engine.shards("optimizer"),
        }

    def _micro_batch(self, teacher: Shape | None, tokens: int, scored: int) -> float:
        """Bytes of a micro-batch: `tokens` run, `scored` of them through the LM head."""
        width = 2 if self.args.bf16 or self.args.fp16 else 4
        # Autocast leaves the residual stream in the dtype of the weights
        stream = width if self.engine.is_deepspeed else 4
        return micro_batch_bytes(
            self.shape, teacher, tokens, scored, width, stream, self.args.gradient_checkpointing, self.tile_tokens
        )

    def _rollout_memory(self, prompt: int, completion: int, shares: bool, teacher: Shape | None, teacher_prompt: int):
        args, engine, shape = self.args, self.engine, self.shape
        rows, group = args.per_device_train_batch_size, args.num_generations
        width = 2 if args.bf16 or args.fp16 else 4
        state = self._state(shape)
        is_base = args.teacher_model_name_or_path == BASE_TEACHER
        teacher_bytes = head_bytes = 0.0
        if teacher and not is_base:
            stored = str(
                (args.teacher_model_init_kwargs or {}).get("dtype") or (args.model_init_kwargs or {}).get("dtype")
            )
            size = 2 if "16" in stored or (engine.is_deepspeed and width == 2) else 4
            teacher_bytes = size * teacher.num_parameters / engine.shards("weights")
            head_bytes = size * teacher.hidden * teacher.vocab / engine.shards("weights")
        waiting = head_bytes if args.teacher_offload else teacher_bytes
        gathered = {
            name: (2 if width == 2 else 4) * min(10**9, s.num_parameters) if engine.kind == "zero3" else 0
            for name, s in (("student", shape), ("teacher", teacher or shape))
        }  # DeepSpeed's `stage3_max_live_parameters`
        tokens = _tokens(prompt, completion, rows, group, shares, args.max_tokens_per_micro_batch)
        generated = rows * args.steps_per_generation
        states = width * generated * completion * (teacher.hidden if teacher else 0)
        cache = 2 * generated * (prompt + completion) * shape.num_layers * 2 * shape.key if not args.use_vllm else 0
        if args.use_vllm and args.vllm_mode == "colocate":
            cache = args.vllm_gpu_memory_utilization * self.gpu.memory_gib * GIB
        resident = cache if args.use_vllm and not args.vllm_enable_sleep_mode else 0
        base = {**state, "teacher": waiting, "vLLM": resident}
        phases = {
            "the student trains": {
                **base,
                "activations": self._micro_batch(teacher, tokens, rows * completion),
                "teacher's states": states,
                "gathered layers": gathered["student"],
            },
            "rollouts are made": {
                **base,
                "KV cache" if not args.use_vllm else "vLLM": cache,
                "gathered weights": 2 * shape.num_parameters
                if engine.kind in ("zero3", "fsdp2") and not args.use_vllm
                else 0,
            },
        }
        if teacher:
            teacher_tokens = _tokens(teacher_prompt, completion, rows, group, shares, args.max_tokens_per_micro_batch)
            per_token = width * (4 * teacher.hidden + 2 * teacher.query + 2 * teacher.key + 3 * teacher.mlp)
            phases["the teacher scores"] = {
                **base,
                "teacher": 0 if is_base else teacher_bytes,
                "activations": teacher_tokens * per_token,
                "teacher's states": states,
                "gathered layers": gathered["teacher"],
            }
        self._report_memory(phases)
        if shares:
            without = _tokens(prompt, completion, rows, group, False, args.max_tokens_per_micro_batch)
            plain, shared = (self._micro_batch(teacher, n, rows * completion) / GIB for n in (without, tokens))
            self._adder("Memory of a GPU in GiB, at the longest prompt")(
                "activations without sharing", f"{plain:.1f} instead of {shared:.1f}"
            )

    def _report_memory(self, phases: dict[str, dict[str, float]]) -> None:
        add = self._adder("Memory of a GPU in GiB, at the longest prompt")
        for phase, items in phases.items():
            in_gib = {name: value / GIB for name, value in items.items() if value > 0}
            self.report.memory_gib[phase] = in_gib
            parts = ", ".join(f"{name} {value:.1f}" for name, value in in_gib.items())
            add(f"while {phase}", f"{sum(in_gib.values()):.1f} = {parts}")
        most = max(sum(items.values()) for items in self.report.memory_gib.values())
        usable = USABLE_SHARE * self.gpu.memory_gib
        add("of the GPU", f"{self.gpu.memory_gib:.1f}, of which {usable:.1f} can be used")
        if most > usable:
            self.report.warnings.append(
                f"The estimate of {most:.1f} GiB exceeds the {usable:.1f} that can be used of a GPU by "
                f"{most - usable:.1f}. In this order: " + "; ".join(self._knobs()) + "."
            )

    def _knobs(self) -> Iterator[str]:
        """What to turn when memory is short: what costs least first."""
        args, kind = self.args, self.engine.kind
        if not args.gradient_checkpointing:
            yield "`gradient_checkpointing: true`"
        if isinstance(args, DGRPOConfig):
            if args.use_vllm and args.vllm_mode == "colocate" and not args.vllm_enable_sleep_mode:
                yield "`vllm_enable_sleep_mode: true`"
            if args.use_vllm and args.vllm_mode == "colocate":
                yield "a smaller `vllm_gpu_memory_utilization`"
            if args.max_tokens_per_micro_batch is None:
                yield "`max_tokens_per_micro_batch`"
        if args.per_device_train_batch_size > 1:
            yield "a smaller `per_device_train_batch_size` with more `gradient_accumulation_steps`"
        if isinstance(args, DGRPOConfig) and args.teacher_model_name_or_path and args.teacher_offload is None:
            yield "`teacher_offload: cpu`"
        if kind not in ("zero3", "fsdp2"):
            yield "`recipes/accelerate_configs/zero3.yaml`"
        if not self.engine.offload_optimizer:
            yield "`recipes/accelerate_configs/zero3_offload.yaml`"
        yield "LoRA (`use_peft: true`)"
        yield "more GPUs, or shorter prompts (`max_prompt_tokens`)"

    # --- Time

    def _rollout_time(self, prompt, completion, prompts, steps, shares, teacher, teacher_lengths) -> None:
        args, shape, group = self.args, self.shape, self.args.num_generations
        factor = 4 if args.gradient_checkpointing else 3
        recomputes = args.use_vllm and args.vllm_importance_sampling_correction
        scored = group * completion
        seconds, flops = {}, {}
        for way in (True, False):
            student = _segments(prompt, completion, group, way)
            work = {"student": factor * shape.forward_flops(student) + 3 * shape.head_flops(scored)}
            if recomputes:
                work["old policy"] = shape.forward_flops(student) + shape.head_flops(scored)
            if args.beta > 0:
                work["reference"] = shape.forward_flops(student) + shape.head_flops(scored)
            if teacher:
                own = _segments(statistics.mean(teacher_lengths), completion, group, way)
                work["teacher"] = teacher.forward_flops(own) + teacher.head_flops(scored)
            work["prefill"] = shape.forward_flops([(int(prompt), 0)] * (1 if way or args.use_vllm else group))
            flops[way] = {name: value * prompts for name, value in work.items()}
            seconds[way] = sum(flops[way].values()) / self.engine.num_processes / (self.gpu.tflops * 1e12 * self.mfu)
        # Each token of a row reads the weights once for all rows of a device, and the row's own cache
        rows = args.per_device_train_batch_size * args.steps_per_generation
        cache = 4 * shape.num_layers * shape.key * (prompt + completion / 2)
        batches = args.gradient_accumulation_steps / args.steps_per_generation
        decode = completion * batches * (2 * shape.num_parameters + rows * cache) / (self.gpu.bandwidth * 1e9)
        add = self._adder(f"Time, an estimate: {self.mfu:.0%} of the peak assumed, at the mean prompt")
        way = shares
        parts = ", ".join(f"{name} {value / 1e15:,.2f}" for name, value in flops[way].items())
        add("10^15 operations of a step", f"{sum(flops[way].values()) / 1e15:,.2f} = {parts}")
        total, plain = seconds[way] + decode, seconds[False] + decode
        self.report.step_seconds = {"shared": seconds[True] + decode, "plain": plain, "decode": decode}
        add(
            "seconds of a step", f"{total:,.1f}, of which {decode:,.1f} decoding, bound by the bandwidth of the memory"
        )
        add("hours of the run", f"{steps * total / 3600:,.1f}")
        if shares:
            add(
                "without the shared prefix",
                f"{plain:,.1f} s a step, {steps * plain / 3600:,.1f} hours: {plain / total:.1f} times as long",
            )

    # --- SFT

    def supervised(self) -> None:
        args, engine, shape = self.args, self.engine, self.shape
        rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        batch = engine.num_processes * rows * accumulation
        lengths, how = self._row_lengths()
        longest = min(max(lengths), args.max_length or max(lengths))
        mean = statistics.mean(min(length, args.max_length or length) for length in lengths)
        packed = args.max_length if args.packing and args.max_length else None
        num_rows = math.ceil(len(self.dataset) * mean / packed) if packed else len(self.dataset)
        steps_an_epoch = num_rows / batch
        steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_an_epoch * args.num_train_epochs)
        add = self._adder("Batches")
        kind = f"packed rows of {packed:,} tokens" if packed else "rows"
        add("an optimiser step", f"{engine.num_processes} processes x {rows} x {accumulation} = {batch} {kind}")
        add("steps", f"{steps:,}, {steps / steps_an_epoch:.2f} epochs of {len(self.dataset):,} rows")
        add("tokens an epoch", f"{len(self.dataset) * mean / 1e6:,.1f} million")
        self._adder("Lengths in tokens")(
            "rows, prompt and completion",
            f"median {sorted(lengths)[len(lengths) // 2]:,}, most {max(lengths):,} ({how})",
        )
        limit = trained_positions(self.config) or math.inf
        if (packed is None and longest > limit) or (packed is not None and max(lengths) > limit):
            self.report.problems.append(
                f"The longest row has {longest:,} tokens, more than the {limit:,} positions of the model. Beyond them "
                "it is silently wrong. Lower `max_length`, or extend the positions (`rope_parameters` in "
                "`model_init_kwargs`)."
            )
        tokens = rows * (packed or longest)
        width = 2 if args.bf16 or args.fp16 else 4
        gathered = width * min(10**9, shape.num_parameters) if engine.kind == "zero3" else 0
        items = {
            **self._state(shape),
            "activations": self._micro_batch(None, tokens, tokens),
            "gathered layers": gathered,
        }
        self._report_memory({"it trains": items})
        factor = 4 if args.gradient_checkpointing else 3
        a_row = factor * shape.forward_flops([(int(mean), 0)]) + 3 * shape.head_flops(int(mean))
        flops = a_row * (len(self.dataset) / steps_an_epoch)
        seconds = flops / engine.num_processes / (self.gpu.tflops * 1e12 * self.mfu)
        self.report.step_seconds = {"plain": seconds}
        add = self._adder(f"Time, an estimate: {self.mfu:.0%} of the peak assumed")
        add("10^15 operations of a step", f"{flops / 1e15:,.2f}")
        add("seconds of a step", f"{seconds:,.1f}")
        add("hours of the run", f"{steps * seconds / 3600:,.1f}")

    def _row_lengths(self) -> tuple[list[int], str]:
        columns = [name for name in ("prompt", "completion") if name in self.dataset.column_names]
        rows, how = _sample(self.dataset, *columns)
        lengths = []
        for prompt, completion in rows:
            if isinstance(prompt, str):
                lengths.append(len(self.tokenizer(prompt + completion)["input_ids"]))
            else:
                ids = self.tokenizer.apply_chat_template([*prompt, *completion], return_dict=True)["input_ids"]
                lengths.append(len(ids))
        return lengths or [0], how

    def _adder(self, section: str) -> Callable[[str, str], None]:
        return lambda name, value: self.report.add(section, name, value)


def micro_batch_bytes(
    shape: Shape,
    teacher: Shape | None,
    tokens: int,
    scored: int,
    width: int,
    stream: int,
    checkpoints: bool,
    tile_tokens: int,
) -> float:
    """What loss and backward of a micro-batch add to models and gradients, in bytes.

    Args:
        shape ([`Shape`]), teacher ([`Shape`], *optional*):
            Student and teacher.
        tokens (`int`):
            Tokens that run through the layers.
        scored (`int`):
            Of these, those that go through the LM head.
        width (`int`), stream (`int`):
            Bytes of a value in the layers, and between them.
        checkpoints (`bool`):
            Whether only the inputs of the layers are kept, and one layer at a time is computed again.
        tile_tokens (`int`):
            Tokens that the LM head takes at a time.
    """
    layer = shape.kept_by_layer(width)
    kept = stream * shape.num_layers * shape.hidden + layer if checkpoints else shape.num_layers * layer
    # Logits of student and teacher, their softmax and the gradient, in float32; the states they are made of
    num_tiles = 4 if teacher else 3
    head = 4 * min(scored, tile_tokens) * shape.vocab * num_tiles + 2 * 4 * scored * shape.hidden
    return tokens * (kept + shape.transient(width)) + head


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


def _tokens(prompt: int, completion: int, rows: int, group: int, shares: bool, limit: int | None) -> int:
    """Tokens that one forward of a micro-batch runs at most."""
    num_prompts = math.ceil(rows / group)
    whole = num_prompts * prompt + rows * completion if shares else rows * (prompt + completion)
    return whole if limit is None else min(whole, max(limit, prompt + completion))


def _segments(prompt: float, completion: int, group: int, shares: bool) -> list[tuple[int, int]]:
    """What is run of one group: each segment with the number of tokens before it."""
    prompt = int(prompt)
    return [(prompt, 0)] * (1 if shares else group) + [(completion, prompt)] * group
