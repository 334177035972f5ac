"""`DGRPOTrainer`: TRL's `GRPOTrainer` with a teacher."""

import functools
import itertools
import math
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_callable_name, get_config_model_id, is_async_callable, pad, split_tensor_dict

from .chat import escape_messages
from .checks import arriving_prompt_problems, image_problems, raise_problems, run_findings, sharing_problems
from .config import DGRPOConfig
from .losses import Distillation, aggregate
from .models import BASE_TEACHER, read_models
from .rollouts import Rollouts
from .run.card import add_recipe_and_metrics
from .run.checkpoints import CompleteCheckpoints
from .run.heatmap import Inspector, render_heatmap, tail, write_heatmap
from .run.nonfinite import NonFiniteGuard
from .run.vllm_server import ServerLost, report_losses, wait_for_server
from .scoring import CompletionOutput, add_completion_scoring, load_balancing_loss
from .shared_prefix import (
    ExactnessCheck,
    group_rows,
    prompt_keys,
    register,
    share_prefill,
    unpadded,
    unsupported_reason,
)
from .teacher import Teacher, base_model, load_teacher, resolve_teacher


if TYPE_CHECKING:
    from peft import PeftModel


logger = get_logger(__name__)


class DGRPOTrainer(CompleteCheckpoints, GRPOTrainer):
    """
    Trainer for dGRPO (arXiv 2605.12227): GRPO on the student's own rollouts, plus the exact divergence to a teacher at
    every token of theirs, in one loss.

    The only changes with respect to [`~trl.GRPOTrainer`] are the teacher, which scores every generation batch, the
    term that it adds to the loss, and the shared prefix, by which each prompt runs once for all its completions.
    Generation, rewards, advantages, the GRPO loss itself, weight syncing and logging are inherited. With
    `distill_coef=0` no teacher is used; with `shared_prefix="off"` as well, training is that of `GRPOTrainer`, bit for
    bit. With a teacher and no reward function, it is on-policy distillation.

    The loss of a micro-batch is

        GRPO loss + distill_coef * aggregate(divergence(student, teacher) at each completion token)

    where the teacher term covers the tokens that the GRPO term covers (`completion_mask`, and `tool_mask` if any) and
    is normalised as `loss_type` normalises the GRPO term. Clipping, importance sampling ratios and the entropy mask
    apply to the GRPO term alone.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from dgrpo_trl import DGRPOTrainer
    >>> from trl.rewards import accuracy_reward

    >>> trainer = DGRPOTrainer(
    ...     model="Qwen/Qwen3-1.7B",
    ...     teacher_model="Qwen/Qwen3-32B",
    ...     reward_funcs=accuracy_reward,
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks,
        optimizers, quantization_config, peft_config, tools, rollout_func, environment_factory:
            As in [`~trl.GRPOTrainer`], except that `args` is a [`DGRPOConfig`], that `reward_funcs` may be left out
            when there is a teacher, and that the data sets may have a column `teacher_prompt` (see
            [`DGRPOConfig.teacher_prompt_column`]).
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher: a Hub id, a path, a loaded model, or `"base"` for the PEFT student with its adapter off. It
            must share the student's tokenizer. It is frozen, kept in eval mode, sharded under ZeRO-3 and FSDP, and not
            saved in checkpoints.

    Raises:
        ValueError, TypeError: For what cannot be trained on, before weights are loaded wherever possible.
        NotImplementedError: For images.
    """

    _tag_names = ["trl", "dgrpo"]
    _name = "dGRPO"
    _paper = {
        "title": "A Recipe for Long-Context Reasoning in Large Language Models via On-Policy Optimization and "
        "Distillation",
        "id": "2605.12227",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{ramos2026recipe,
                title        = {{A Recipe for Long-Context Reasoning in Large Language Models via On-Policy Optimization and Distillation}},
                author       = {Ramos and Alves and Martins},
                year         = 2026,
                eprint       = {arXiv:2605.12227},
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: Any = None,
        args: DGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Callable | dict[str, Callable] | None = None,
        teacher_model: str | PreTrainedModel | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DGRPOConfig(f"{name.split('/')[-1]}-dGRPO")
        elif not isinstance(args, DGRPOConfig):
            raise TypeError(f"`args` is a {type(args).__name__}. `DGRPOTrainer` needs the fields of a `DGRPOConfig`.")
        has_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        teacher = resolve_teacher(teacher_model, args, model, has_adapter)
        self._distills = teacher is not None and args.distill_coef > 0
        if teacher is not None and not self._distills:
            logger.warning("`distill_coef` is 0: the teacher is not loaded, and training is plain GRPO.")

        if not isinstance(reward_funcs, list):
            reward_funcs = [] if reward_funcs is None else [reward_funcs]
        self._has_rewards = bool(reward_funcs) or environment_factory is not None
        if not self._has_rewards and not self._distills:
            raise ValueError(
                "There is neither a reward function nor a teacher, so there is nothing to learn from. Pass "
                "`reward_funcs` (GRPO), `teacher_model` with `distill_coef > 0` (on-policy distillation), or both "
                "(dGRPO)."
            )
        if processing_class is None:
            processing_class = _load_processing_class(model, args)
        # Everything that can be refused without weights is refused here
        datasets = _named_datasets(train_dataset, eval_dataset)
        if self._distills and (problems := image_problems(datasets)):
            raise NotImplementedError(problems[0])
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        models = read_models(model, teacher if self._distills else None, args, tokenizer)
        self._positions = models.positions()
        findings = run_findings(args, models, datasets, args.world_size, tools, environment_factory is None)
        for warning in findings.warnings:
            logger.warning(warning)
        findings.raise_for_problems()

        super().__init__(
            model=model,
            reward_funcs=[_checked(func) for func in reward_funcs] if self._has_rewards else no_reward,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self.distill_coef = args.distill_coef
        self.teacher_model = None
        self._scored = None  # CompletionOutput of the micro-batch whose loss is being computed
        self._teacher_states = None  # its teacher hidden states
        self._has_new_rollouts = False
        self._inspector = Inspector(
            self._distills and args.log_completions, args.log_heatmaps and self.accelerator.is_main_process
        )
        self._guard = NonFiniteGuard(self, args.max_nonfinite_steps)
        self.add_callback(self._guard)
        if self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process:
            report_losses(self.vllm_generation.vllm_client)
        self._shares_prefix = self._can_share(self.model, "the student")
        self._student_check = ExactnessCheck(self.accelerator)
        # Whether our forward replaces the parent's, which is left alone where there is no need to
        self._scores = self._distills or self._shares_prefix or args.max_tokens_per_micro_batch is not None
        if self._scores:
            for policy in (self.model, self.ref_model):
                if policy is not None:  # the ratio of both needs log-probabilities from the same arithmetic
                    unwrapped = base_model(self.accelerator.unwrap_model(policy))
                    add_completion_scoring(unwrapped, self.temperature, args.cast_lm_head_to_fp32)
        if self._shares_prefix:
            share_prefill(base_model(self.accelerator.unwrap_model(self.model)))
        if not self._distills:
            return
        self._teacher_seconds = 0.0
        self._window_totals = 0.0  # of the accumulation window: sums, counts and losses, see `_log_distillation`
        if teacher != BASE_TEACHER:
            self.teacher_model = load_teacher(teacher, args, base_model(self.model))
        self.teacher = Teacher(
            self.teacher_model,
            self.model,
            self.accelerator,
            self.temperature,
            args.cast_lm_head_to_fp32,
            self._shares_prefix if self.teacher_model is None else self._can_share(self.teacher_model, "the teacher"),
            args.shared_prefix_backend,
            args.teacher_offload,
        )
        self._teacher_check = ExactnessCheck(self.accelerator)
        if self.teacher_model is not None:
            self.teacher_model = self.teacher.model

    def _can_share(self, model: nn.Module, name: str) -> bool:
        """Whether `model` is to run each prompt once. Prepares its attention if so, and logs why if not.

        Raises:
            ValueError: If it cannot, and `shared_prefix` is `"on"`.
        """
        if self.args.shared_prefix == "off":
            return False
        config = base_model(self.accelerator.unwrap_model(model)).config
        implementation = config._attn_implementation
        reason = unsupported_reason(config)
        if reason is None and is_peft_model(model) and model.active_peft_config.is_prompt_learning:
            reason = "its adapter puts virtual tokens before the prompt"
        if reason is None and not (implementation == "sdpa" or "flash" in implementation):
            reason = f"its attention implementation is {implementation!r}, not 'sdpa' or a flash one"
        if reason is not None:
            if self.args.shared_prefix == "on":
                raise_problems(sharing_problems(reason, name))
            logger.warning(
                f"Shared prefix: off for {name}: {reason}. Every completion runs with a copy of its prompt."
            )
            return False
        register(implementation)
        logger.info(f"Shared prefix: on for {name}")
        return True

    def _keeps_sharing(self, check: ExactnessCheck, model: nn.Module, name: str, prompts, completions) -> bool:
        """Whether packed forwards of `model` still equal plain ones on these rollouts. A collective call.

        Raises:
            RuntimeError: If they do not, and `shared_prefix` is `"on"`.
        """
        if not check.is_due(prompts, completions):
            return True

        def states(prompts: list[list[int]], completions: list[list[int]], shares_prefix: bool) -> Tensor:
            ids = [torch.tensor(completion, dtype=torch.long) for completion in completions]
            mask = pad([torch.ones_like(row) for row in ids]).to(self.accelerator.device)
            ids = pad(ids).to(self.accelerator.device)
            rollouts = Rollouts.from_prompts(prompts, ids, mask, self._tokenizer.pad_token_id)
            with self.accelerator.autocast():
                return rollouts.forward(
                    model, shares_prefix, self.args.shared_prefix_backend, hidden_states_only=True
                ).hidden_states[mask.bool()]

        was_training = model.training
        model.eval()  # dropout would differ between the two
        try:
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                passes = check.passes(prompts, completions, states)
        finally:
            model.train(was_training)
        if passes:
            logger.info(f"Shared prefix: exact for {name} to {check.error:.1e} at {check.checked_length} tokens")
            return True
        message = (
            f"The hidden states of {name} with a shared prefix differ from those without by {check.error:.2g} of "
            f"their norm, at {check.checked_length} tokens."
        )
        if self.args.shared_prefix == "on":
            raise RuntimeError(f"{message} Training would be wrong. Set `shared_prefix='off'`, and please report it.")
        logger.warning(f"{message} The shared prefix is switched off for it; please report this.")
        return False

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self._distills and self.args.teacher_prompt_column is not None:
            self._signature_columns = [*self._signature_columns, self.args.teacher_prompt_column]

    def _tokenize_prompts(self, prompts: list):
        if is_conversational({"prompt": prompts[0]}):
            prompts = [escape_messages(prompt, self._tokenizer) for prompt in prompts]
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        return prompt_ids, images, multimodal_fields

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self._check_positions(prompt_ids, "the student")
        if not (self.use_vllm and self.vllm_mode == "server"):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        was_lost = False
        while True:
            self._wait_for_vllm(was_lost)
            try:
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
            except ServerLost as error:
                was_lost = True
                logger.warning(f"The vLLM server was lost while it generated: {error}")

    def _wait_for_vllm(self, was_lost: bool) -> None:
        """Waits for the server, and brings one that has been away to the student's weights. A collective call.

        One that was lost in the middle of a request may be up again before it is looked for, with other weights.
        """
        client = getattr(self.vllm_generation, "vllm_client", None)  # of the main process alone
        if wait_for_server(client, self.accelerator, self.args.vllm_server_timeout) or was_lost:
            if client is not None:
                client.init_communicator(device=self.accelerator.device)
            self._last_loaded_step = -1  # of TRL: the step whose weights the server has

    def _check_positions(self, prompt_ids: list[list[int]], reader: str) -> None:
        """Raises if a prompt leaves `reader` no room for the longest completion: streams are checked no earlier."""
        positions = self._positions[reader]
        raise_problems(arriving_prompt_problems(prompt_ids, self.max_completion_length or 0, positions, reader))

    def _generate(self, prompts: list):
        generated = super()._generate(prompts)
        if self._shares_prefix:  # before anything is scored
            prompt_ids, completion_ids = generated[:2]
            self._shares_prefix = self._keeps_sharing(
                self._student_check, self.model_wrapped, "the student", prompt_ids, completion_ids
            )
        return generated

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if not (self._shares_prefix and self._has_new_rollouts):
            return inputs
        self._has_new_rollouts = False
        self._buffered_inputs = _regroup(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.log_completions and any("answer" in row for row in inputs):
            self._log_completion_extra("answer", [row.get("answer") for row in inputs])
        rollouts = super()._generate_and_score_completions(inputs)
        self._has_new_rollouts = self.model.training
        if not self._distills:
            return rollouts
        num_rows = len(rollouts["completion_ids"])
        self._inspector.begin(num_rows, self.model.training)
        rollouts["row_index"] = torch.arange(num_rows, device=rollouts["completion_ids"].device)
        if "pixel_values" in rollouts:
            raise NotImplementedError("The teacher does not score images yet. Use a text-only data set.")
        is_training = self.model.training
        start = _synchronized_clock()
        prompt_ids = self._teacher_prompt_ids(inputs, rollouts)
        with (
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.teacher.on_device(),
        ):
            if self.teacher.shares_prefix:
                self._check_teacher(prompt_ids, rollouts)
            rollouts["teacher_hidden_states"] = self.teacher.hidden_states(
                prompt_ids,
                rollouts["completion_ids"],
                rollouts["completion_mask"],
                self._tokenizer.pad_token_id,
                self.args.per_device_train_batch_size if is_training else self.args.per_device_eval_batch_size,
                self.args.max_tokens_per_micro_batch,
            )
        if is_training:
            self._teacher_seconds += _synchronized_clock() - start
        return rollouts

    def _check_teacher(self, prompt_ids: list[list[int]], rollouts: dict[str, Any]) -> None:
        """Lets the teacher share prefixes no longer if that is not exact. A collective call."""
        if self.teacher.is_base:
            self.teacher.shares_prefix = self._shares_prefix
            return
        ids = self.teacher.readable(rollouts["completion_ids"], self._tokenizer.pad_token_id)
        completions = [row.tolist() for row in unpadded(ids, rollouts["completion_mask"])]
        self.teacher.shares_prefix = self._keeps_sharing(
            self._teacher_check, self.teacher.model, "the teacher", prompt_ids, completions
        )

    def _teacher_prompt_ids(self, inputs: list[dict[str, Any]], rollouts: dict[str, Any]) -> list[list[int]]:
        """What the teacher reads before each completion: the row's own teacher prompt, else the student's prompt."""
        prompt_ids = [ids.tolist() for ids in unpadded(rollouts["prompt_ids"], rollouts["prompt_mask"])]
        column = self.args.teacher_prompt_column
        rows = [] if column is None else [i for i, row in enumerate(inputs) if row.get(column) is not None]
        if rows:
            teacher_ids, _, _ = self._tokenize_prompts([inputs[i][column] for i in rows])
            for i, ids in zip(rows, teacher_ids, strict=True):
                prompt_ids[i] = list(ids)
        self._check_positions(prompt_ids, "the teacher")
        return prompt_ids

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **multimodal_inputs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not self._scores or multimodal_inputs.get("pixel_values") is not None:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal_inputs,
            )
        prompt_length = input_ids.size(1) - logits_to_keep
        rollouts = Rollouts(
            *(tensor[:, :prompt_length] for tensor in (input_ids, attention_mask)),
            *(tensor[:, prompt_length:] for tensor in (input_ids, attention_mask)),
        )
        parts = rollouts.split(
            batch_size or len(input_ids), self.args.max_tokens_per_micro_batch, self._shares_prefix, self.accelerator
        )
        is_split = len(parts) > 1 and torch.is_grad_enabled()
        if is_split:
            model = self._entered_once(model)
        teacher_states = self._teacher_states
        teacher_head = None if teacher_states is None else self.teacher.head
        outputs = []
        for rows in parts:
            distillation = None
            if teacher_states is not None:
                distillation = Distillation(
                    teacher_states[rows[0] : rows[-1] + 1] if rows else teacher_states[:1],
                    teacher_head,
                    self.args.distill_divergence,
                    self.args.distill_jsd_mixture,
                )
            score = functools.partial(self._score, model, rollouts.select(rows), distillation, compute_aux_loss)
            if is_split:
                # The gradient of a part needs the loss of the whole, and the graphs of all parts may not fit
                score = functools.partial(checkpoint, score, use_reentrant=False)
            outputs.append(score())
        self._scored = _concatenate(outputs, [len(rows) for rows in parts])  # read by `_compute_loss`
        aux_loss = load_balancing_loss(self._scored.router_sums) if compute_aux_loss else None
        return self._scored.logps, self._scored.entropies if compute_entropy else None, aux_loss

    def _entered_once(self, model: nn.Module) -> Callable:
        """`model`, for several forwards, and repetitions of them, before one backward.

        Under ZeRO-3 every forward of the outermost module starts the record of what to fetch anew, which must not
        happen before the backward has ended. The hooks that fetch sit on the modules within.
        """
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            return model
        inner, calls = self.accelerator.unwrap_model(model), itertools.count()
        return lambda **kwargs: (model if next(calls) == 0 else inner.forward)(**kwargs)

    def _score(
        self, model, rollouts: Rollouts, distillation: Distillation | None, with_router: bool
    ) -> CompletionOutput:
        """One forward of the student or of the reference model."""
        with self.accelerator.autocast():
            return rollouts.forward(
                model,
                self._shares_prefix,
                self.args.shared_prefix_backend,
                distillation=distillation,
                with_router=with_router,
            )

    def _compute_loss(self, model, inputs):
        if not self._distills:
            loss = super()._compute_loss(model, inputs)
            self._guard.look(inputs, {"GRPO": loss}, self._scored)
            self._scored = None
            return loss
        self._teacher_states = inputs["teacher_hidden_states"]
        try:
            grpo_loss = super()._compute_loss(model, inputs)  # its one forward also gives `self._scored`
            scored = self._scored
        finally:
            self._scored = self._teacher_states = None
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        is_training = self.model.training
        accumulation_steps = self.current_gradient_accumulation_steps if is_training else 1
        # `num_items_in_batch` counts the tokens of a generation batch, over all ranks
        windows = self.args.steps_per_generation / accumulation_steps if is_training else 1
        token_normalizer = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes / windows
        distill_loss = self.distill_coef * aggregate(
            scored.divergences,
            mask,
            self.loss_type,
            self.max_completion_length,
            token_normalizer,
            accumulation_steps,
        )
        self._guard.look(inputs, {"GRPO": grpo_loss, "teacher": distill_loss}, scored)
        if is_training:
            self._inspector.look(inputs, scored, mask)
        self._log_distillation(scored, mask, grpo_loss, distill_loss)
        return grpo_loss + distill_loss

    @torch.no_grad()
    def _log_distillation(self, scored, mask, grpo_loss, distill_loss) -> None:
        """Adds a micro-batch to the sums of its accumulation window, and logs these, over all ranks, at its end."""
        rank_in_completion, lengths = mask.cumsum(-1), mask.sum(-1, keepdim=True)
        quarter = (lengths + 3) // 4
        per_token = {
            "distill/divergence": (scored.divergences, mask),
            "distill/divergence_first_quarter": (scored.divergences, mask * (rank_in_completion <= quarter)),
            "distill/divergence_last_quarter": (scored.divergences, mask * (rank_in_completion > lengths - quarter)),
            "distill/teacher_entropy": (scored.teacher_entropies, mask),
            "distill/top1_agreement": (scored.top1_agreement, mask),
        }
        sums = [(values * where).sum() for values, where in per_token.values()]
        counts = [where.sum().to(sums[0].dtype) for _, where in per_token.values()]
        losses = [loss / self.accelerator.num_processes for loss in (grpo_loss, distill_loss)]
        self._window_totals = torch.stack([*sums, *counts, *losses]) + self._window_totals
        if not self.accelerator.sync_gradients:
            return
        totals = self.accelerator.reduce(self._window_totals, reduction="sum").tolist()
        self._window_totals = 0.0
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, total, count in zip(per_token, totals, totals[len(sums) :], strict=False):
            if count > 0:  # else every completion of the window is masked
                metrics[name].append(total / count)
        metrics["distill/grpo_loss"].append(totals[-2])
        metrics["distill/loss"].append(totals[-1])

    def training_step(self, model, inputs, num_items_in_batch):
        output = super().training_step(model, inputs, num_items_in_batch)
        if self._distills and self._step % self.current_gradient_accumulation_steps == 0:
            metrics = self._metrics["train"]
            metrics["distill/teacher_time_share"].append(self._teacher_seconds / metrics["step_time"][-1])
            self._teacher_seconds = 0.0
        return output

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.gradient_is_finite = grad_norm is None or math.isfinite(float(grad_norm))
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self._has_rewards:  # the stand-in's zeros would read like a run that fails
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name in [name for name in metrics if name.startswith("reward") or name == "frac_reward_zero_std"]:
                del metrics[name]
        if self.log_completions:
            self._logs["prompt"] = deque(map(tail, self._logs["prompt"]), self._logs["prompt"].maxlen)
            if self._inspector.keeps_rows:
                divergences, num_rows = gather_object(self._inspector.divergences), len(self._logs["prompt"])
                if not self._inspector.table_is_trained or len(divergences) != num_rows:
                    divergences = [None] * num_rows
                self._logs["extra"]["divergence"] = deque(divergences, self._logs["prompt"].maxlen)
        super().log(logs, start_time)
        if self._inspector.trace is not None:
            self._write_heatmap(self._inspector.trace)
            self._inspector.trace = None

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            add_recipe_and_metrics(card, self.args, self.state.log_history)

    def _write_heatmap(self, trace) -> None:
        """On the main process."""
        step = self.state.global_step
        page = render_heatmap(trace, self._tokenizer, f"Step {step}: where the teacher disagreed")
        write_heatmap(Path(self.args.output_dir) / "heatmaps", step, page)
        if "wandb" in self.args.report_to:
            import wandb

            if wandb.run is not None:
                wandb.log({"heatmap": wandb.Html(page, inject=False)})


def _concatenate(outputs: list[CompletionOutput], num_rows: list[int]) -> CompletionOutput:
    """The outputs of a batch from those of its parts, of which the last may stand for no rows."""
    fields = {}
    for name in outputs[0].keys():
        values = [output[name] for output in outputs]
        if name == "router_sums":
            fields[name] = sum(value for value, n in zip(values, num_rows, strict=True) if n > 0)
        else:
            fields[name] = torch.cat([value[:n] for value, n in zip(values, num_rows, strict=True)])
    if 0 in num_rows:  # parts without rows stay in the graph, so that every rank runs their backward
        fields["logps"] = fields["logps"] + 0 * sum(
            output.logps.sum() for output, n in zip(outputs, num_rows, strict=True) if n == 0
        )
    return CompletionOutput(**fields)


def _regroup(micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in as many micro-batches, those of one prompt next to each other.

    Prompts keep the order in which their first rows come, so the parent's shuffle still decides which are trained on
    together, and its draw from the random generator stays the only one.
    """
    whole = {}
    for name, value in micro_batches[0].items():
        if isinstance(value, list):
            whole[name] = [item for micro_batch in micro_batches for item in micro_batch[name]]
        elif value is None or value.dim() == 0:
            whole[name] = value
        else:
            whole[name] = torch.cat([micro_batch[name] for micro_batch in micro_batches])
    groups = group_rows(prompt_keys(unpadded(whole["prompt_ids"], whole["prompt_mask"])))
    order = torch.tensor([i for rows in groups for i in rows])
    for name, value in whole.items():
        if isinstance(value, list):
            whole[name] = [value[i] for i in order]
        elif value is not None and value.dim() > 0:
            whole[name] = value[order.to(value.device)]
    return split_tensor_dict(whole, len(micro_batches))


def no_reward(completions: list, **kwargs) -> list[float]:
    """Stands in where there is a teacher and no reward function: equal rewards, hence zero advantages."""
    return [0.0] * len(completions)


def _named_datasets(train_dataset, eval_dataset) -> dict[str, Dataset | IterableDataset]:
    datasets = {} if train_dataset is None else {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        return datasets | {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    return datasets if eval_dataset is None else datasets | {"eval_dataset": eval_dataset}


def _load_processing_class(model, args: DGRPOConfig) -> PreTrainedTokenizerBase | ProcessorMixin:
    # With the arguments that the parent uses: it is passed on, so that it is loaded once
    is_path = isinstance(model, str)
    return AutoProcessor.from_pretrained(
        model if is_path else get_config_model_id(model.config),
        revision=(args.model_init_kwargs or {}).get("revision") if is_path else None,
        truncation_side="left",
        padding_side="left",
        trust_remote_code=args.trust_remote_code,
    )


def _checked(reward_func):
    """`reward_func`, raising where it returns something else than one finite number, or `None`, a completion."""
    if isinstance(reward_func, (str, nn.Module)):
        return reward_func
    name = get_callable_name(reward_func)

    def failure(error: Exception, place: str) -> RuntimeError:
        return RuntimeError(
            f"Reward function `{name}` raised {type(error).__name__}: {error}. It did so for {place}. Without its "
            "reward a completion cannot be learnt from. Mend the function; it may return `None` for a completion that "
            "it cannot score."
        )

    def check(rewards, completions):
        if len(rewards) != len(completions):
            raise ValueError(
                f"Reward function `{name}` returned {len(rewards)} values for {len(completions)} completions. It must "
                "return one a completion, in their order; `None` stands for one that it cannot score."
            )
        for i, reward in enumerate(rewards):
            if reward is not None and not math.isfinite(reward):
                raise ValueError(
                    f"Reward function `{name}` returned {reward} for completion {i}: {completions[i]!r}. It would "
                    "leave the completion out in silence, or spoil its group's advantages. Return a finite number, or "
                    "`None` for a completion that it cannot score."
                )
        return rewards

    if is_async_callable(reward_func):

        async def wrapper(*args, **kwargs):
            try:
                rewards = await reward_func(*args, **kwargs)
            except Exception as error:
                for place, row in _single_rows(kwargs):
                    try:
                        await reward_func(*args, **row)
                    except Exception as again:
                        raise failure(again, place) from error
                raise failure(error, "the completions together, and for none of them alone") from error
            return check(rewards, kwargs["completions"])
    else:

        def wrapper(*args, **kwargs):
            try:
                rewards = reward_func(*args, **kwargs)
            except Exception as error:
                for place, row in _single_rows(kwargs):
                    try:
                        reward_func(*args, **row)
                    except Exception as again:
                        raise failure(again, place) from error
                raise failure(error, "the completions together, and for none of them alone") from error
            return check(rewards, kwargs["completions"])

    functools.update_wrapper(wrapper, reward_func)
    wrapper.__name__ = name  # the metrics are named after it
    return wrapper


def _single_rows(kwargs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments of a reward function for one completion at a time, each with words that say which it is."""
    num_rows = len(kwargs["completions"])
    for i in range(num_rows):
        row = {
            name: [value[i]] if isinstance(value, list) and len(value) == num_rows else value
            for name, value in kwargs.items()
        }
        prompt, completion = str(row.get("prompts", [""])[0]), str(row["completions"][0])
        yield f"completion {i} of {num_rows}, {completion[:300]!r}, of the prompt that ends {prompt[-300:]!r}", row


def _synchronized_clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
