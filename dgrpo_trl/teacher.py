"""The teacher: named, loaded, frozen, and scoring rollouts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checks import placement_problems, raise_problems
from .config import DGRPOConfig
from .losses import LMHead, token_terms
from .models import BASE_TEACHER, teacher_dtype, teacher_hub_kwargs, teacher_init_kwargs
from .rollouts import Rollouts, confirm
from .scoring import CompletionScoring, add_completion_scoring, lm_head
from .shared_prefix import PrefixSharing, unpadded
from .trl_compat import (
    base_model,
    create_model_from_path,
    disable_dropout_in_model,
    prepare_deepspeed,
    prepare_fsdp,
    use_adapter,
    without_dropout,
)
from .vocabularies import unreadable_problem


logger = get_logger(__name__)


def resolve_teacher(
    teacher_model: str | PreTrainedModel | None, args: DGRPOConfig, student: str | nn.Module, has_adapter: bool
) -> str | PreTrainedModel | None:
    """The one teacher that was asked for, or `None`.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The trainer's argument.
        args ([`DGRPOConfig`]):
            Its `teacher_model_name_or_path` is the other way to name a teacher.
        student (`str` or `nn.Module`):
            The trainer's `model`.
        has_adapter (`bool`):
            Whether the student is, or will be, a PEFT model.

    Returns:
        `str`, [`~transformers.PreTrainedModel`] or `None`

    Raises:
        ValueError: If both ways are used, or none although `distill_coef` asks for a teacher; if init arguments come
            with a loaded model; if `"base"` is asked of a student without an adapter.
        TypeError: If `teacher_model` is neither a string nor a model, or is the student itself.
    """
    if teacher_model is not None and args.teacher_model_name_or_path is not None:
        raise ValueError(
            f"A teacher is given twice: `teacher_model` and `teacher_model_name_or_path` "
            f"({args.teacher_model_name_or_path!r}). Only one can be used. Remove one of them."
        )
    teacher = args.teacher_model_name_or_path if teacher_model is None else teacher_model
    if teacher is None:
        if args.distill_coef > 0:
            raise ValueError(
                f"`distill_coef` is {args.distill_coef}, but there is no teacher. The teacher term needs one. Pass "
                "`teacher_model` to the trainer, set `teacher_model_name_or_path`, or set `distill_coef=0` to train "
                "with plain GRPO."
            )
        return None
    if isinstance(teacher, str):
        if teacher == BASE_TEACHER and not has_adapter:
            raise ValueError(
                "`teacher_model='base'` means the student with its PEFT adapter off, but the student has no adapter. "
                "Pass a `peft_config`, or name a teacher; a folder called 'base' is './base'."
            )
        return teacher
    if not isinstance(teacher, nn.Module):
        raise TypeError(
            f"`teacher_model` is a {type(teacher).__name__}. It must be a Hub id, a path or a transformers model."
        )
    if args.teacher_model_init_kwargs is not None or args.teacher_model_revision is not None:
        raise ValueError(
            "`teacher_model_init_kwargs` or `teacher_model_revision` is set, but the teacher is already loaded, so "
            "they cannot apply. Remove them, or pass the teacher's id or path."
        )
    if teacher is student:
        raise TypeError(
            "`teacher_model` is the student itself, which training would change and freezing would stop. Load it a "
            "second time, or use a PEFT student with `teacher_model='base'`."
        )
    return teacher


def load_teacher(teacher: str | PreTrainedModel, args: DGRPOConfig, student: PreTrainedModel) -> PreTrainedModel:
    """The teacher, in eval mode, without gradients, in the dtype of [`~models.teacher_dtype`].

    Collective under ZeRO-3, where the weights are partitioned while they are read. Leaves the random state as it was.

    Raises:
        ValueError: If the weights cannot be read, or lie on several devices.
    """
    if isinstance(teacher, str):
        kwargs = {
            "attn_implementation": student.config._attn_implementation,
            # "auto", TRL's default on CUDA, would spread it over all GPUs
            "device_map": str(args.device) if args.device.type == "cuda" else None,
            **teacher_hub_kwargs(args),
            **teacher_init_kwargs(args),
            "dtype": teacher_dtype(args, student.dtype),
        }
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            kwargs["device_map"] = None  # each process places its copy, or its shard, by itself
        logger.info(f"Loading the teacher {teacher} with {kwargs}")
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(devices=devices):
                teacher = create_model_from_path(teacher, **kwargs)
        except OSError as error:
            raise ValueError(
                f"The weights of the teacher {teacher!r} cannot be read: {error} Check the path, and that the "
                "download or the copy is complete."
            ) from error
    raise_problems(placement_problems(teacher, "the teacher"))
    teacher.requires_grad_(False)
    disable_dropout_in_model(teacher)
    return teacher.eval()


class HostWeights:
    """Weights that do not change, in one copy that stays in the memory of the host; the device borrows them.

    Nothing is copied back. On a GPU run the copy is pinned, so that the way to the device is asynchronous.

    Args:
        parameters (`list[nn.Parameter]`):
            Under ZeRO-3, of which each rank's shards are meant.
        device (`torch.device`):
            Who borrows them.
    """

    def __init__(self, parameters: list[nn.Parameter], device: torch.device):
        self.parameters = parameters
        self.device = device
        self._copies: dict[tuple[int, bool], Tensor] = {}

    def to_device(self) -> None:
        for _, tensor in self.tensors():
            tensor.data = tensor.data.to(self.device, non_blocking=True)

    def to_host(self) -> None:
        for key, tensor in self.tensors():
            if key not in self._copies:
                self._copies[key] = host_copy(tensor.data)
            tensor.data = self._copies[key]

    def tensors(self) -> Iterator[tuple[tuple[int, bool], Tensor]]:
        for i, parameter in enumerate(self.parameters):
            shard = getattr(parameter, "ds_tensor", None)
            if shard is not None:
                yield (i, True), shard
            if shard is None or parameter.data.numel() > 0:  # ZeRO-3 keeps small ones whole beside their shards
                yield (i, False), parameter


def host_copy(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU: itself if it is there, else a pinned copy."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


class Teacher:
    """A frozen model that scores the student's completions; the only place that calls it.

    Args:
        model ([`~transformers.PreTrainedModel`] or `None`):
            The loaded teacher. `None` is the student with its adapter off.
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The trainer's model.
        accelerator ([`~accelerate.Accelerator`]):
            Decides how the teacher is placed: sharded under ZeRO-3 and FSDP, a copy on each device elsewhere.
        sharing ([`~shared_prefix.PrefixSharing`]):
            Whether each prompt runs once for all its completions: the student's own, where that is the teacher.
        temperature (`float`):
            That of the rollouts.
        fp32_projection (`bool`, *optional*, defaults to `False`):
            Run the LM head in float32.
        waits_on_host (`bool`, *optional*, defaults to `False`):
            Keep the weights in the memory of the host while there is nothing to score, all but those of the LM head,
            which the student's loss reads.
        unshared_ids (`tuple[int, ...]`, *optional*):
            Ids that mean nothing to one of the models: it never reads them.

    Raises:
        NotImplementedError: If the weights cannot be moved: under FSDP, or quantized ones.
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        student: nn.Module,
        accelerator: Accelerator,
        sharing: PrefixSharing,
        temperature: float,
        fp32_projection: bool = False,
        waits_on_host: bool = False,
        unshared_ids: tuple[int, ...] = (),
    ):
        self.accelerator = accelerator
        self.unshared_ids = unshared_ids
        self._host_weights: HostWeights | None = None
        self.fp32_projection = fp32_projection
        self.sharing = sharing
        self.is_base = model is None
        if model is None:
            self.model = student
            return
        if waits_on_host:
            _check_movable(model, accelerator)
        add_completion_scoring(base_model(model), temperature, fp32_projection)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.model = prepare_deepspeed(model, accelerator)
        elif accelerator.distributed_type == DistributedType.FSDP:
            self.model = prepare_fsdp(model, accelerator)
        else:
            self.model = accelerator.prepare_model(model, evaluation_mode=True)
        # ZeRO-3 fetches ahead what ran before: after a forward with the LM head, the head would be in flight while
        # the loss gathers it
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            self._check_head()
        if waits_on_host:
            self._host_weights = HostWeights(list(self._movable().values()), accelerator.device)
            self._host_weights.to_host()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Within it the weights are on the device of the run; else they wait where they were told to."""
        if self._host_weights is None:
            yield
            return
        self._host_weights.to_device()
        try:
            yield
        finally:
            self._host_weights.to_host()

    def release(self) -> None:
        """Frees the weights of a teacher that is no longer needed."""
        if self.is_base:
            return
        model, self._host_weights = self.model, None
        self.accelerator._models = [prepared for prepared in self.accelerator._models if prepared is not model]
        if self.accelerator.distributed_type != DistributedType.FSDP:  # there, nothing else refers to it
            for _, tensor in HostWeights(list(model.parameters()), self.accelerator.device).tensors():
                tensor.data = tensor.data.new_empty(0)
        del self.model

    def _movable(self) -> dict[str, nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        head = {id(parameter) for parameter in base_model(model).get_output_embeddings().parameters()}
        return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in head}

    @property
    def head(self) -> LMHead:
        """The teacher's LM head. A collective call under FSDP2."""
        with self._as_teacher() as model:
            return lm_head(base_model(model))

    @property
    def vocab_size(self) -> int:
        """Rows of its embedding, some of which may stand for no string."""
        return base_model(self.accelerator.unwrap_model(self.model)).config.get_text_config().vocab_size

    def readable(self, completion_ids: Tensor, pad_token_id: int) -> Tensor:
        """`completion_ids` with `pad_token_id` for the ids that the teacher does not have.

        A student may sample a token that was added to its tokenizer alone, or one of the padding rows of a larger
        head: an id that stands for no string at all.
        """
        return completion_ids.masked_fill(self._is_unknown(completion_ids), pad_token_id)

    def _is_unknown(self, ids: Tensor) -> Tensor:
        return (ids >= self.vocab_size) | torch.isin(ids, torch.tensor(self.unshared_ids, device=ids.device).long())

    def _padding(self, pad_token_id: int) -> int:
        """The student's padding, or any id in its place that the teacher has: it is masked, or stands for nothing."""
        unshared = set(self.unshared_ids)
        return next(i for i in (pad_token_id, *range(self.vocab_size)) if i < self.vocab_size and i not in unshared)

    def _check_readable(self, prompts: list[list[int]]) -> None:
        for row, prompt in enumerate(prompts):
            ids = torch.tensor(prompt, dtype=torch.long)
            unknown = ids[self._is_unknown(ids)].tolist()
            if unknown:
                raise_problems([unreadable_problem("This batch", f"row {row}", unknown)])

    @contextmanager
    def _as_teacher(self) -> Iterator[nn.Module]:
        """The unwrapped teacher; the student, where it is its own teacher, without its adapter and dropout."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_base:
            yield model
            return
        with without_dropout(model), use_adapter(model, None):
            yield model

    @torch.no_grad()
    def hidden_states(
        self,
        prompts: list[list[int]],
        completion_ids: Tensor,
        completion_mask: Tensor,
        pad_token_id: int,
        batch_size: int,
        max_tokens: int | None = None,
    ) -> Tensor:
        """The teacher's last hidden states at the positions that predict the completion tokens.

        The LM head is not run. Where that is due, packed forwards are compared with plain ones first. Under ZeRO-3
        every rank must call this with the same number of rows and `batch_size`.

        Args:
            prompts (`list[list[int]]`):
                B prompts as the teacher reads them, in token ids.
            completion_ids (`torch.Tensor` of shape `(B, T)`):
                The student's completions, padded on the right.
            completion_mask (`torch.Tensor` of shape `(B, T)`):
                1 at their tokens.
            pad_token_id (`int`):
                Fills the prompts up on the left.
            batch_size (`int`):
                Rows per forward.
            max_tokens (`int`, *optional*):
                Tokens per forward.

        Returns:
            `torch.Tensor` of shape `(B, T, H_teacher)`, no gradient; 0 where the mask is 0.

        Raises:
            ValueError: If a prompt has a token that the teacher does not have.
        """
        self._check_readable(prompts)
        pad_token_id = self._padding(pad_token_id)
        completion_ids = self.readable(completion_ids, pad_token_id)
        rollouts = Rollouts.from_prompts(prompts, completion_ids, completion_mask, pad_token_id)
        with self._on_device(), self._as_teacher():
            if not self.is_base:
                completions = [row.tolist() for row in unpadded(completion_ids, completion_mask)]
                confirm(self.sharing, self.model, self.accelerator, pad_token_id, prompts, completions)
            parts = rollouts.split(batch_size, max_tokens, self.sharing.is_on, self.accelerator)
            return torch.cat([self._forward(rollouts.select(rows))[: len(rows)] for rows in parts])

    def _forward(self, rollouts: Rollouts) -> Tensor:
        with self.accelerator.autocast():
            states = rollouts.hidden_states(self.model, self.sharing.is_on, self.sharing.backend)
            # The head rounds its input to the autocast dtype anyway: keeping more would only take more memory
            device_type = states.device.type
            rounds = torch.is_autocast_enabled(device_type) and not self.fp32_projection
            return states.to(torch.get_autocast_dtype(device_type)) if rounds else states

    @torch.no_grad()
    def _check_head(self) -> None:
        """Compares our reading of the LM head with the teacher's own logits, on a handful of tokens.

        Raises:
            NotImplementedError: If they differ: the model scales or caps its logits under a name that is not known.
        """
        ids = torch.arange(1, 9, device=self.accelerator.device).unsqueeze(0)
        scoring = CompletionScoring(ids[:, 1:], torch.ones_like(ids[:, 1:]), hidden_states_only=True)
        mask = torch.ones_like(ids)
        expected = self.model(input_ids=ids, attention_mask=mask).logits[0, :-1].float().log_softmax(-1)
        states = self.model(input_ids=ids, attention_mask=mask, completion_scoring=scoring).hidden_states[0]
        got = token_terms(states, self.head, ids[0, 1:]).logps
        expected = expected.gather(1, ids[0, 1:, None]).squeeze(1).to(got)
        rounds = states.dtype in (torch.bfloat16, torch.float16) or self.accelerator.mixed_precision != "no"
        tolerance = 0.25 if rounds else 1e-3
        if not torch.allclose(got, expected, rtol=0, atol=tolerance):
            raise NotImplementedError(
                f"The log-probabilities of the teacher ({type(self.model).__name__}) differ from those of its LM head "
                f"by up to {(got - expected).abs().max().item():.3g} nats: it transforms its logits in a way that is "
                "not known here, and the divergence would be wrong. Please open an issue that names the model."
            )


def _check_movable(model: PreTrainedModel, accelerator: Accelerator) -> None:
    if accelerator.distributed_type == DistributedType.FSDP:
        raise NotImplementedError(
            "`teacher_offload` is set under FSDP, which holds the shards itself. Leave it out and set "
            "`fsdp_offload_params` in the accelerate configuration, or run under DeepSpeed ZeRO-3."
        )
    if getattr(model, "is_quantized", False):
        raise NotImplementedError(
            "`teacher_offload` is set, but the teacher is quantized, and its weights are bound to their device. Leave "
            "it out: a quantized teacher takes little memory."
        )
