"""`DGRPOTrainer`: TRL's `GRPOTrainer` with a teacher."""

import functools
import math
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOTrainer, is_conversational

from .chat import escape_messages
from .checks import (
    arriving_prompt_problems,
    image_problems,
    placement_problems,
    raise_problems,
    run_findings,
    sharing_problems,
)
from .config import DGRPOConfig
from .losses import Distillation, aggregate
from .models import BASE_TEACHER, read_models
from .rewards.guard import guarded
from .rollouts import Rollouts, completion_states, score
from .run.card import add_recipe_and_metrics
from .run.checkpoints import CompleteCheckpoints
from .run.heatmap import Inspector
from .run.metrics import AccumulationWindow, distillation_values
from .run.nonfinite import NonFiniteGuard
from .run.vllm_server import generate_through_outages, report_losses
from .scoring import CompletionOutput, DistilledTokens, add_completion_scoring, load_balancing_loss
from .shared_prefix import PrefixSharing, regroup, share_prefill, unpadded
from .teacher import Teacher, load_teacher, resolve_teacher
from .trl_compat import (
    base_model,
    disable_gradient_checkpointing,
    forget_loaded_weights,
    get_config_model_id,
    keep_to_one_gpu,
)


if TYPE_CHECKING:
    from peft import PeftModel


logger = get_logger(__name__)


@dataclass
class _StudentForward:
    """What the student's forward of one loss is given, and what it returns, beside TRL's own tensors.

    TRL's `_compute_loss` runs that forward itself, by `_get_per_token_logps_and_entropies`: it names all arguments,
    and keeps of the results what its own loss needs. So the teacher's side gets in, and the divergences get out, by an
    attribute of the trainer that holds this for the time of one loss.
    """

    distillation: Distillation | None
    output: CompletionOutput | None = None

    @property
    def tokens(self) -> DistilledTokens:
        """The output, of a forward with a teacher.

        Raises:
            RuntimeError: If there was no forward: TRL has changed.
        """
        if self.output is None:
            raise RuntimeError("TRL's `_compute_loss` has not called `_get_per_token_logps_and_entropies`.")
        return self.output.distilled


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
    is normalized as `loss_type` normalizes the GRPO term. Clipping, importance sampling ratios and the entropy mask
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

    # TRL's
    reward_func_names: list[str]
    reward_processing_classes: list[Any]
    reward_weights: Tensor
    reward_funcs: list[Any]
    _buffered_inputs: list[dict[str, Any]]
    _signature_columns: list[str]
    _batch_environments: list[str | None]

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
        args = _checked_args(args, model)
        has_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        teacher = resolve_teacher(teacher_model, args, model, has_adapter)
        self._distills = teacher is not None and args.distill_coef > 0
        if teacher is not None and not self._distills:
            logger.warning("`distill_coef` is 0: the teacher is not loaded, and training is plain GRPO.")
        if not isinstance(reward_funcs, list):
            reward_funcs = [] if reward_funcs is None else [reward_funcs]
        if not (reward_funcs or environment_factory or self._distills):
            raise ValueError(
                "No reward source provided. Pass `reward_funcs`, or an `environment_factory` whose environment "
                "defines a `get_reward` method; or a teacher, `teacher_model` with `distill_coef > 0`, to learn from "
                "it alone."
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
        if args.n_gpu > 1:
            logger.warning(
                f"This process sees {args.n_gpu} GPUs and trains on {args.device} alone. To use them all, start it "
                "with `accelerate launch` and a configuration from `recipes/accelerate_configs`."
            )
            keep_to_one_gpu(args, loads_model=isinstance(model, str))

        super().__init__(
            model=model,
            reward_funcs=list(reward_funcs) or ([no_reward] if self._distills else []),  # TRL writes into the list
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
        raise_problems(placement_problems(base_model(self.model), "the student"))
        self._has_rewards = self.reward_funcs != [no_reward]
        if self._has_rewards and self.reward_funcs[0] is no_reward:  # the environment has rewards of its own
            for values in (self.reward_funcs, self.reward_func_names, self.reward_processing_classes):
                del values[0]
            self.reward_weights = self.reward_weights[1:]
        self.distill_coef = args.distill_coef
        self._student_forward: _StudentForward | None = None
        self._scores_twice = False
        self._has_new_rollouts = False
        self._watch_the_run()
        self._prepare_student()
        self.teacher_model: nn.Module | None = None
        if self._distills:
            self._prepare_teacher(teacher)

    def _watch_the_run(self) -> None:
        """What records, or reacts to, what happens while it trains."""
        self.inspector = Inspector(
            self._distills and self.args.log_completions, self.args.log_heatmaps and self.accelerator.is_main_process
        )
        self._nonfinite_guard = NonFiniteGuard(self.accelerator, self._tokenizer.decode, self.args.max_nonfinite_steps)
        self.add_callback(self._nonfinite_guard)
        if self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process:
            report_losses(self.vllm_generation.vllm_client)

    def _prepare_student(self) -> None:
        """Decides whether prompts are shared, and gives the models the forward that does so, where it is needed."""
        self.sharing = self._prefix_sharing(self.model, "the student")
        self._regrouped = self._num_regrouped() if self.sharing.is_on else 1
        if self.sharing.is_on:
            share_prefill(base_model(self.accelerator.unwrap_model(self.model)))
        # Whether our forward replaces the parent's, which is left alone where there is no need to
        self._scores = self._distills or self.sharing.is_on or self.args.max_tokens_per_micro_batch is not None
        if self._scores:
            for policy in (self.model, self.ref_model):
                if policy is not None:  # the ratio of both needs log-probabilities from the same arithmetic
                    unwrapped = base_model(self.accelerator.unwrap_model(policy))
                    add_completion_scoring(unwrapped, self.temperature, self.args.cast_lm_head_to_fp32)

    def _num_regrouped(self) -> int:
        """Among how many micro-batches rows may change places, so that those of one prompt meet.

        Rows stay within their optimizer step, and where a term of the loss depends on which rows share a micro-batch,
        within that: the steps are those of TRL then. `shared_prefix="on"` regroups the whole generation batch.
        """
        args = self.args
        if args.shared_prefix == "on":
            return args.steps_per_generation
        # The load-balancing loss of experts, the entropy bonus and 'bnpo' are means over a micro-batch
        terms = {
            "loss_type='bnpo'": self.loss_type == "bnpo",
            "top_entropy_quantile": self.top_entropy_quantile < 1,
            "the entropy bonus": self._entropy_bonus_enabled,
            "the load-balancing loss": self.aux_loss_enabled,
        }
        dependent = [name for name, is_used in terms.items() if is_used]
        if dependent and args.steps_per_generation > 1:
            logger.warning(
                f"Shared prefix: rows stay in TRL's micro-batches, where only few share a prompt, as each of them is "
                f"normalized by itself by {' and '.join(dependent)}. `shared_prefix='on'` regroups them all the same."
            )
            return 1
        return math.gcd(args.gradient_accumulation_steps, args.steps_per_generation)

    def _prepare_teacher(self, teacher: str | PreTrainedModel) -> None:
        self._window = AccumulationWindow(self.accelerator)
        self._teacher_seconds = 0.0
        model, sharing = None, self.sharing
        if teacher != BASE_TEACHER:
            model = load_teacher(teacher, self.args, base_model(self.model))
            sharing = self._prefix_sharing(model, "the teacher")
        self.teacher = Teacher(
            model,
            self.model,
            self.accelerator,
            sharing,
            self.temperature,
            self.args.cast_lm_head_to_fp32,
            self.args.teacher_offload is not None,
        )
        if model is not None:
            self.teacher_model = self.teacher.model

    def _prefix_sharing(self, model: nn.Module, name: str) -> PrefixSharing:
        """Whether `model` shares prompts, from the model itself: `run_findings` has seen its configuration alone."""
        args = self.args
        sharing = PrefixSharing(model, name, args.shared_prefix, args.shared_prefix_backend, self.accelerator)
        if args.shared_prefix == "on":
            raise_problems(sharing_problems(sharing.unsupported_reason, name))
        return sharing

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._distills and self.args.teacher_prompt_column is not None:
            self._signature_columns = [*self._signature_columns, self.args.teacher_prompt_column]

    def _tokenize_prompts(self, prompts: list) -> tuple:
        tokenized = self._tokenize(prompts)
        # Here, not at every turn: TRL ends a completion at `max_completion_length`, results of tools included
        self._check_positions(tokenized[0], "the student")
        return tokenized

    def _tokenize(self, prompts: list) -> tuple:
        return super()._tokenize_prompts(self._escaped(prompts))

    def _escaped(self, prompts: list) -> list:
        if not is_conversational({"prompt": prompts[0]}):
            return prompts  # texts, whose control tokens are meant
        return [escape_messages(prompt, self._tokenizer) for prompt in prompts]

    def _get_tool_suffix_ids(self, tool_messages: list[dict[str, Any]]) -> list[int]:
        return super()._get_tool_suffix_ids(escape_messages(tool_messages, self._tokenizer))

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        generate = functools.partial(super()._generate_single_turn, prompt_ids, *args, **kwargs)
        if not (self.use_vllm and self.vllm_mode == "server"):
            return generate()
        return generate_through_outages(
            generate,
            getattr(self.vllm_generation, "vllm_client", None),  # of the main process alone
            self.accelerator,
            self.args.vllm_server_timeout,
            functools.partial(forget_loaded_weights, self),
        )

    def _check_positions(self, prompt_ids: list[list[int]], reader: str) -> None:
        """Raises if a prompt leaves `reader` no room for the longest completion: streams are checked no earlier."""
        positions = self._positions[reader]
        raise_problems(arriving_prompt_problems(prompt_ids, self.max_completion_length or 0, positions, reader))

    def _generate(self, prompts: list) -> tuple:
        if self.rollout_func is not None:  # it applies the chat template itself
            prompts = self._escaped(prompts)
        generated = super()._generate(prompts)
        prompt_ids, completion_ids = generated[:2]
        self._confirm(self.sharing, self.model_wrapped, prompt_ids, completion_ids)  # before anything is scored
        return generated

    def _confirm(
        self, sharing: PrefixSharing, model: nn.Module, prompts: list[list[int]], completions: list[list[int]]
    ) -> None:
        """A collective call."""

        def states(
            prompts: list[list[int]], completions: list[list[int]], shares_prefix: bool, first_position: int = 0
        ) -> Tensor:
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                return completion_states(
                    model,
                    self.accelerator,
                    self._tokenizer.pad_token_id,
                    sharing.backend,
                    prompts,
                    completions,
                    shares_prefix,
                    first_position,
                )

        sharing.confirm(model, prompts, completions, states)

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        reward_funcs = self.reward_funcs
        self.reward_funcs = [
            guarded(func, name) for func, name in zip(reward_funcs, self.reward_func_names, strict=True)
        ]
        try:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = reward_funcs

    def _prepare_inputs(self, generation_batch: list | dict) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if not (self.sharing.is_on and self._has_new_rollouts):
            return inputs
        self._has_new_rollouts = False
        if self._regrouped > 1:
            batches = self._buffered_inputs
            starts = range(0, len(batches), self._regrouped)
            self._buffered_inputs = [
                batch for start in starts for batch in regroup(batches[start : start + self._regrouped])
            ]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.log_completions and any("answer" in row for row in inputs):
            # A name that no `log_extra` of a reward function has
            self._log_completion_extra("dataset/answer", [row.get("answer") for row in inputs])
        columns = {"image", "images"} & inputs[0].keys()
        if columns and not any(row.get(column) for row in inputs for column in columns):
            inputs = [{**row, "images": []} for row in inputs]  # TRL takes `None` for an image
        rollouts = super()._generate_and_score_completions(inputs)
        is_training = self._has_new_rollouts = self.model.training
        if not self._distills:
            return rollouts
        if "pixel_values" in rollouts:
            raise NotImplementedError("The teacher does not score images yet. Use a text-only data set.")
        num_rows = len(rollouts["completion_ids"])
        self.inspector.begin(num_rows, is_training)
        rollouts["row_index"] = torch.arange(num_rows, device=rollouts["completion_ids"].device)
        start = _synchronized_clock()
        rollouts["teacher_hidden_states"] = self._teacher_states(self._teacher_prompt_ids(inputs, rollouts), rollouts)
        if is_training:
            self._teacher_seconds += _synchronized_clock() - start
        return rollouts

    def _teacher_states(self, prompt_ids: list[list[int]], rollouts: dict[str, Any]) -> Tensor:
        """`Teacher.hidden_states` of a generation batch. A collective call."""
        is_training, pad_token_id = self.model.training, self._tokenizer.pad_token_id
        completion_ids, completion_mask = rollouts["completion_ids"], rollouts["completion_mask"]
        with (
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.teacher.on_device(),
        ):
            if not self.teacher.is_base:
                ids = self.teacher.readable(completion_ids, pad_token_id)
                completions = [row.tolist() for row in unpadded(ids, completion_mask)]
                self._confirm(self.teacher.sharing, self.teacher.model, prompt_ids, completions)
            return self.teacher.hidden_states(
                prompt_ids,
                completion_ids,
                completion_mask,
                pad_token_id,
                self.args.per_device_train_batch_size if is_training else self.args.per_device_eval_batch_size,
                self.args.max_tokens_per_micro_batch,
            )

    def _teacher_prompt_ids(self, inputs: list[dict[str, Any]], rollouts: dict[str, Any]) -> list[list[int]]:
        """What the teacher reads before each completion: the row's own teacher prompt, else the student's prompt."""
        prompt_ids = [ids.tolist() for ids in unpadded(rollouts["prompt_ids"], rollouts["prompt_mask"])]
        column = self.args.teacher_prompt_column
        rows = [] if column is None else [i for i, row in enumerate(inputs) if row.get(column) is not None]
        if rows:
            for i, ids in zip(rows, self._tokenize_rows([inputs[i][column] for i in rows], rows), strict=True):
                prompt_ids[i] = list(ids)
        self._check_positions(prompt_ids, "the teacher")
        return prompt_ids

    def _tokenize_rows(self, prompts: list, rows: list[int]) -> list[list[int]]:
        """Token ids of `prompts`, which belong to these rows of the generation batch: each with its row's tools."""
        if self.environment_factories is None:
            return self._tokenize(prompts)[0]
        environments = self._batch_environments
        self._batch_environments = [environments[i] for i in rows]
        try:
            return self._tokenize(prompts)[0]
        finally:
            self._batch_environments = environments

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal_inputs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not self._scores or multimodal_inputs.get("pixel_values") is not None:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **multimodal_inputs,
            )
        scored = score(
            model,
            Rollouts.from_rows(input_ids, attention_mask, logits_to_keep),
            self.accelerator,
            self.sharing,
            batch_size or len(input_ids),
            self.args.max_tokens_per_micro_batch,
            distillation=None if self._student_forward is None else self._student_forward.distillation,
            with_router=compute_aux_loss,
        )
        if self._student_forward is not None:
            self._student_forward.output = scored
        aux_loss = None if scored.router_sums is None else load_balancing_loss(scored.router_sums)
        return scored.logps, scored.entropies if compute_entropy else None, aux_loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        distillation = None
        if self._distills:
            distillation = Distillation(
                inputs["teacher_hidden_states"],
                self.teacher.head,
                self.args.distill_divergence,
                self.args.distill_jsd_mixture,
            )
        self._student_forward = forward = _StudentForward(distillation)
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._student_forward = None
        terms = {"GRPO": loss}
        if self._distills:
            if forward.output is None:
                self._score_for_teacher(model, inputs, forward)
            terms["teacher"] = self._teacher_term(inputs, forward.tokens)
            self._log_teacher_term(inputs, forward.tokens, terms)
            loss = loss + terms["teacher"]
        if self.model.training:
            self._nonfinite_guard.observe(self.state.global_step + 1, inputs, terms, forward.output)
        return loss

    def _score_for_teacher(self, model: nn.Module, inputs: dict[str, Any], forward: _StudentForward) -> None:
        """The student's forward for the teacher term alone, where a subclass has log-probabilities of its own."""
        if not self._scores_twice:
            self._scores_twice = True
            logger.warning(
                f"`{type(self).__name__}` computes its own log-probabilities: the teacher term takes a second forward "
                "of the student. Call `super()._get_per_token_logps_and_entropies` to have one forward for both."
            )
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        self._student_forward = forward
        try:
            DGRPOTrainer._get_per_token_logps_and_entropies(self, model, ids, mask, inputs["completion_ids"].size(1))
        finally:
            self._student_forward = None

    def _teacher_term(self, inputs: dict[str, Any], tokens: DistilledTokens) -> Tensor:
        """The weighted divergence of a micro-batch, normalized as `loss_type` normalizes the GRPO term."""
        is_training = self.model.training
        accumulation_steps = self.current_gradient_accumulation_steps if is_training else 1
        # `num_items_in_batch` counts the tokens of a generation batch, over all ranks
        windows = self.args.steps_per_generation / accumulation_steps if is_training else 1
        token_normalizer = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes / windows
        return self.distill_coef * aggregate(
            tokens.divergences,
            _loss_mask(inputs),
            self.loss_type,
            self.max_completion_length,
            token_normalizer,
            accumulation_steps,
        )

    def _log_teacher_term(self, inputs: dict[str, Any], tokens: DistilledTokens, terms: dict[str, Tensor]) -> None:
        """A collective call at the end of an accumulation window."""
        mask, is_training = _loss_mask(inputs), self.model.training
        if is_training:
            self.inspector.observe(inputs, tokens, mask)
        losses = {"distill/grpo_loss": terms["GRPO"], "distill/loss": terms["teacher"]}
        for name, value in self._window.add(distillation_values(tokens, mask), losses).items():
            self._metrics["train" if is_training else "eval"][name].append(value)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        output = super().training_step(model, inputs, num_items_in_batch)
        if self._distills and self._step % self.current_gradient_accumulation_steps == 0:
            metrics = self._metrics["train"]
            metrics["distill/teacher_time_share"].append(self._teacher_seconds / metrics["step_time"][-1])
            self._teacher_seconds = 0.0
        return output

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._nonfinite_guard.gradient_is_finite = grad_norm is None or math.isfinite(float(grad_norm))
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self._has_rewards:  # the zeros of `no_reward` would read like a run that fails
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name in [name for name in metrics if name.startswith("reward") or name == "frac_reward_zero_std"]:
                del metrics[name]
        if self.log_completions:
            self.inspector.complete_table(self._logs)
        super().log(logs, start_time)
        self.inspector.write_heatmap(self.args, self.state.global_step, self._tokenizer)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            add_recipe_and_metrics(card, self.args, self.state.log_history)


def _checked_args(args: DGRPOConfig | None, model: "str | PreTrainedModel | PeftModel") -> DGRPOConfig:
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return DGRPOConfig(f"{name.split('/')[-1]}-dGRPO")
    if not isinstance(args, DGRPOConfig):
        raise TypeError(f"`args` is a {type(args).__name__}. `DGRPOTrainer` needs the fields of a `DGRPOConfig`.")
    return args


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


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """The tokens that TRL's loss covers."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _synchronized_clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
