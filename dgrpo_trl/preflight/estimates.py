"""Memory and time of an optimizer step, estimated by these rules:

- Weights, gradients and optimizer: bytes per parameter by engine and optimizer, divided by the shards.
- Activations: per token and layer, what the layers of a dense decoder keep for the backward pass; with checkpointing,
  each layer's input and one layer's worth. `scripts/benchmarks/memory.py` compares them with what is measured.
- Time: the operations of matrix products and attention over the GPU's peak times `mfu`; decoding by its bandwidth.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import TrainingArguments

from ..config import DGRPOConfig
from ..gpus import Gpu
from ..losses import tile_bytes
from ..models import BASE_TEACHER, teacher_dtype
from .engine import Engine
from .shape import Shape


GIB = 2**30
# Parameters that DeepSpeed gathers at once: its `stage3_max_live_parameters`
_MAX_LIVE_PARAMETERS = 10**9


@dataclass(frozen=True)
class Rows:
    """Lengths of the rows that a step trains on, in tokens."""

    prompt: float  # of the student
    teacher_prompt: float
    completion: int
    shares_prefix: bool  # whether a prompt runs once for all its completions

    def segments(self, prompt: float, group: int) -> list[tuple[int, int]]:
        """What is run of one group: the number of tokens of each segment, and that of the tokens before it."""
        return [(int(prompt), 0)] * (1 if self.shares_prefix else group) + [(self.completion, int(prompt))] * group

    def tokens(self, prompt: float, rows: int, group: int, limit: int | None) -> int:
        """Tokens that one forward of a micro-batch of `rows` completions runs at most."""
        row = int(prompt) + self.completion
        whole = math.ceil(rows / group) * int(prompt) + rows * self.completion if self.shares_prefix else rows * row
        return whole if limit is None else min(whole, max(limit, row))

    def all_tokens(self, prompt: float, rows: int, group: int, limit: int | None) -> int:
        """Tokens that all forwards of a micro-batch run together: every part has the prompts of its rows."""
        per_prompt = group if self.shares_prefix else 1
        if limit is not None:
            per_prompt = min(per_prompt, max(1, (limit - int(prompt)) // max(1, self.completion)))
        return math.ceil(rows / per_prompt) * int(prompt) + rows * self.completion


@dataclass(frozen=True)
class Estimates:
    """Estimates for a run of a student (`shape`) and perhaps a teacher, on GPUs of whose peak it reaches `mfu`."""

    args: TrainingArguments
    shape: Shape
    teacher: Shape | None
    engine: Engine
    gpu: Gpu
    mfu: float

    @property
    def width(self) -> int:
        """Bytes of a value in the layers."""
        return 2 if self.args.bf16 or self.args.fp16 else 4

    @property
    def _stream(self) -> int:
        """Bytes of a value between the layers: autocast leaves it in the dtype of the weights."""
        return self.width if self.engine.is_deepspeed else 4

    @property
    def offloads(self) -> bool:
        """Whether checkpoints lie on the host."""
        args = self.args
        return bool(args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("offload"))

    # --- Memory, in bytes on one GPU

    def student_state(self) -> dict[str, float]:
        """The student's weights, gradients and optimizer states."""
        args, engine, shape = self.args, self.engine, self.shape
        stored = str((args.model_init_kwargs or {}).get("dtype") or "float32")
        # DeepSpeed keeps weights in the dtype of the arithmetic, and float32 ones beside them for the optimizer
        is_half = self.width == 2 if engine.is_deepspeed else "16" in stored or stored == "auto"
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

    def supervised_memory(self, tokens: int) -> dict[str, dict[str, float]]:
        """The one phase of SFT, with a micro-batch of `tokens`."""
        training = {
            **self.student_state(),
            "activations": self._activations(tokens, tokens),
            "gathered layers": self._gathered_layers(self.shape),
        }
        return {"it trains": training}

    def rollout_memory(self, longest: Rows) -> dict[str, dict[str, float]]:
        """Each phase of a step, at the longest prompts."""
        resident = {
            **self.student_state(),
            "teacher": self._waiting_teacher(),
            "vLLM": 0 if self.args.vllm_enable_sleep_mode else self._vllm(),
        }
        phases = {
            "the student trains": resident | self._training_phase(longest),
            "rollouts are made": resident | self._generation_phase(longest),
        }
        if self.teacher is not None:
            phases["the teacher scores"] = resident | self._teacher_phase(self.teacher, longest)
        return phases

    def training_activations(self, longest: Rows) -> float:
        args = self.args
        rows, group = args.per_device_train_batch_size, args.num_generations
        tokens = longest.tokens(longest.prompt, rows, group, args.max_tokens_per_micro_batch)
        return self._activations(tokens, rows * longest.completion)

    def host_checkpoints(self, tokens: int) -> float:
        """What one process keeps of a micro-batch of `tokens` in the memory of the host."""
        return self._stream * self.shape.num_layers * self.shape.hidden * tokens if self.offloads else 0

    def rollout_host_checkpoints(self, longest: Rows) -> float:
        """Of all parts of a micro-batch at once: what a part has copied there waits for the backward."""
        args = self.args
        rows, group = args.per_device_train_batch_size, args.num_generations
        return self.host_checkpoints(longest.all_tokens(longest.prompt, rows, group, args.max_tokens_per_micro_batch))

    def _training_phase(self, longest: Rows) -> dict[str, float]:
        return {
            "activations": self.training_activations(longest),
            "teacher's states": self._teacher_states(longest),
            "gathered layers": self._gathered_layers(self.shape),
        }

    def _generation_phase(self, longest: Rows) -> dict[str, float]:
        shape = self.shape
        if self.args.use_vllm:
            return {"vLLM": self._vllm()}
        cache = 2 * self._rows_generated() * (int(longest.prompt) + longest.completion)
        return {
            "KV cache": cache * shape.num_layers * 2 * shape.key,
            "gathered weights": 2 * shape.num_parameters if self.engine.kind in ("zero3", "fsdp2") else 0,
        }

    def _teacher_phase(self, teacher: Shape, longest: Rows) -> dict[str, float]:
        args = self.args
        rows, group = args.per_device_train_batch_size, args.num_generations
        tokens = longest.tokens(longest.teacher_prompt, rows, group, args.max_tokens_per_micro_batch)
        per_token = self.width * (4 * teacher.hidden + 2 * teacher.query + 2 * teacher.key + 3 * teacher.mlp)
        return {
            "teacher": self._teacher_bytes(teacher.num_parameters),
            "activations": tokens * per_token,
            "teacher's states": self._teacher_states(longest),
            "gathered layers": self._gathered_layers(teacher),
        }

    def _waiting_teacher(self) -> float:
        """The teacher while it has nothing to score: offloaded, only its LM head stays."""
        if self.teacher is None:
            return 0
        head = self.teacher.hidden * self.teacher.vocab
        return self._teacher_bytes(head if self.args.teacher_offload else self.teacher.num_parameters)

    def _teacher_bytes(self, num_parameters: int) -> float:
        if self.args.teacher_model_name_or_path == BASE_TEACHER:
            return 0
        dtype = teacher_dtype(self.args, (self.args.model_init_kwargs or {}).get("dtype"))
        size = 2 if "16" in str(dtype) or (self.engine.is_deepspeed and self.width == 2) else 4
        return size * num_parameters / self.engine.shards("weights")

    def _teacher_states(self, longest: Rows) -> float:
        """The hidden states that wait for the student's loss, of a generation batch."""
        hidden = 0 if self.teacher is None else self.teacher.hidden
        return self.width * self._rows_generated() * longest.completion * hidden

    def _rows_generated(self) -> int:
        return self.args.per_device_train_batch_size * self.args.steps_per_generation

    def _vllm(self) -> float:
        args = self.args
        if not args.use_vllm or args.vllm_mode != "colocate":
            return 0
        return args.vllm_gpu_memory_utilization * self.gpu.memory_gib * GIB

    def _gathered_layers(self, shape: Shape) -> float:
        return self.width * min(_MAX_LIVE_PARAMETERS, shape.num_parameters) if self.engine.kind == "zero3" else 0

    def _activations(self, tokens: int, scored: int) -> float:
        """A micro-batch: `tokens` run, `scored` of them through the LM head."""
        return micro_batch_bytes(
            self.shape,
            self.teacher,
            tokens,
            scored,
            self.width,
            self._stream,
            self.args.gradient_checkpointing,
            "cuda",
            self.offloads,
        )

    def memory_remedies(self) -> Iterator[str]:
        """What to change when memory is short, the cheapest first."""
        args, kind = self.args, self.engine.kind
        if not args.gradient_checkpointing:
            yield "`gradient_checkpointing: true`"
        elif not self.offloads:
            yield "`gradient_checkpointing_kwargs: {offload: true}`, which is slower"
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

    def supervised_flops(self, length: int) -> float:
        """Operations of one row of SFT."""
        forward = self.shape.forward_flops([(length, 0)])
        return self._passes() * forward + 3 * self.shape.head_flops(length)

    def rollout_flops(self, mean: Rows) -> dict[str, float]:
        """Operations of one group of completions, by what runs."""
        args, shape, group = self.args, self.shape, self.args.num_generations
        student = shape.forward_flops(mean.segments(mean.prompt, group))
        head = shape.head_flops(group * mean.completion)
        work = {"student": self._passes() * student + 3 * head}
        if args.use_vllm and args.vllm_importance_sampling_correction:
            work["old policy"] = student + head
        if args.beta > 0:
            work["reference"] = student + head
        if self.teacher is not None:
            teacher = self.teacher.forward_flops(mean.segments(mean.teacher_prompt, group))
            work["teacher"] = teacher + self.teacher.head_flops(group * mean.completion)
        num_prefills = 1 if mean.shares_prefix or args.use_vllm else group
        work["prefill"] = shape.forward_flops([(int(mean.prompt), 0)] * num_prefills)
        return work

    def _passes(self) -> int:
        """Forwards that a step takes as long as: the backward counts as two, checkpointing runs one more."""
        return 4 if self.args.gradient_checkpointing else 3

    def seconds(self, flops: float) -> float:
        return flops / self.engine.num_processes / (self.gpu.tflops * 1e12 * self.mfu)

    def decode_seconds(self, mean: Rows) -> float:
        """Decoding of a step: each token of a row reads the weights once for all rows of a device, and its cache."""
        args, shape = self.args, self.shape
        cache = 4 * shape.num_layers * shape.key * (mean.prompt + mean.completion / 2)
        batches = args.gradient_accumulation_steps / args.steps_per_generation
        bytes_read = 2 * shape.num_parameters + self._rows_generated() * cache
        return mean.completion * batches * bytes_read / (self.gpu.bandwidth * 1e9)


def micro_batch_bytes(
    shape: Shape,
    teacher: Shape | None,
    tokens: int,
    scored: int,
    width: int,
    stream: int,
    checkpoints: bool,
    device_type: str,
    offloads: bool = False,
) -> float:
    """What loss and backward of a micro-batch add to models and gradients, in bytes.

    Args:
        tokens (`int`), scored (`int`):
            Tokens that run through the layers, and of these, those that go through the LM head.
        width (`int`), stream (`int`):
            Bytes of a value in the layers, and between them.
        checkpoints (`bool`):
            Whether only the inputs of the layers are kept, and one layer at a time is computed again.
        device_type (`str`):
            Where it runs: the loss has larger tiles on `"cuda"`, and fewer of them.
        offloads (`bool`, *optional*, defaults to `False`):
            Whether the inputs of the layers are kept on the host, and come back one at a time.
    """
    layer = shape.kept_by_layer(width)
    num_inputs = 1 if offloads else shape.num_layers
    kept = stream * num_inputs * shape.hidden + layer if checkpoints else shape.num_layers * layer
    # The hidden states that are scored, and their gradient; that of the head, until it is added to the others
    head = 2 * 4 * scored * shape.hidden + (stream * shape.vocab * shape.hidden if shape.trains_head else 0)
    head += tile_bytes(device_type, scored, shape.vocab, shape.hidden, teacher is not None)
    return tokens * (kept + shape.transient(width)) + head
