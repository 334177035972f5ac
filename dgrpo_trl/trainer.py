"""`DGRPOTrainer`: TRL's `GRPOTrainer` with a teacher."""

import math
import textwrap
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer

from .checks import placement_problems, raise_problems, sharing_problems
from .config import DGRPOConfig
from .data_loading import AnyDataset
from .models import BASE_TEACHER
from .preparation import AnyDatasets, ProcessingClass, no_reward, prepare
from .prompts import CheckedPrompts
from .rewards.guard import GuardedRewards
from .rollouts import Rollouts, confirm, score
from .run.card import add_recipe_and_metrics
from .run.checkpoints import CompleteCheckpoints
from .run.heatmap import Inspector
from .run.metrics import AccumulationWindow
from .run.nonfinite import NonFiniteGuard
from .run.vllm_server import ServerOutages, report_losses
from .schedule import terms_at
from .scoring import DistilledTokens, StudentForward, add_completion_scoring, load_balancing_loss
from .shared_prefix import PrefixSharing, num_regrouped, regroup, share_prefill
from .teacher import Teacher, load_teacher
from .teacher_term import TeacherTerm
from .trl_compat import base_model, disable_gradient_checkpointing, take_checkpoint_options


if TYPE_CHECKING:
    from peft import PeftModel


logger = get_logger(__name__)


class DGRPOTrainer(CompleteCheckpoints, CheckedPrompts, GuardedRewards, ServerOutages, GRPOTrainer):
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
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDatasets | None = None,
        processing_class: ProcessingClass | None = None,
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
        # Everything that can be refused without weights is refused here
        run = prepare(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            tools,
            rollout_func,
            environment_factory,
            teacher_model,
            is_subclass=type(self) is not DGRPOTrainer,
        )
        self._has_teacher = self._distills = run.teacher is not None  # until a schedule ends it
        self._positions = run.positions
        self._warned: set[str] = set()
        super().__init__(
            model=model,
            reward_funcs=run.reward_funcs,
            args=run.args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=run.processing_class,
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
        self.distill_coef = self.args.distill_coef
        self._student_forward: StudentForward | None = None
        self._scores_twice = False
        self._has_new_rollouts = False
        self._schedule = self.args.get_schedule()
        self._scheduled_step: int | None = None
        self._rewards_count = True
        self._watch_the_run()
        self._prepare_student()
        self.teacher_model: nn.Module | None = None
        if run.teacher is not None:
            self._prepare_teacher(run.teacher, run.unshared_ids)

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
        take_checkpoint_options(base_model(self.model))
        self.sharing = self._prefix_sharing(self.model, "the student")
        if self.sharing.is_on:
            # Terms that are means over a micro-batch, and so depend on which rows share one
            terms = {
                "loss_type='bnpo'": self.loss_type == "bnpo",
                "top_entropy_quantile": self.top_entropy_quantile < 1,
                "the entropy bonus": self._entropy_bonus_enabled,
                "the load-balancing loss": self.aux_loss_enabled,
            }
            self._regrouped = num_regrouped(
                self.args.shared_prefix,
                self.args.steps_per_generation,
                self.args.gradient_accumulation_steps,
                [name for name, is_used in terms.items() if is_used],
            )
            share_prefill(base_model(self.accelerator.unwrap_model(self.model)))
        # Whether our forward replaces the parent's, which is left alone where there is no need to
        self._scores = self._distills or self.sharing.is_on or self.args.max_tokens_per_micro_batch is not None
        if self._scores:
            for policy in (self.model, self.ref_model):
                if policy is not None:  # the ratio of both needs log-probabilities from the same arithmetic
                    unwrapped = base_model(self.accelerator.unwrap_model(policy))
                    add_completion_scoring(unwrapped, self.temperature, self.args.cast_lm_head_to_fp32)

    def _prepare_teacher(self, teacher: str | PreTrainedModel, unshared_ids: tuple[int, ...]) -> None:
        num_processes = self.accelerator.num_processes
        self._teacher_term = TeacherTerm(self.args, num_processes, unshared_ids, self.eos_token_ids)
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
            unshared_ids,
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

    def _generate(self, prompts: list) -> tuple:
        generated = super()._generate(prompts)
        with self._without_checkpoints():  # before anything is scored
            confirm(self.sharing, self.model_wrapped, self.accelerator, self._tokenizer.pad_token_id, *generated[:2])
        return generated

    def _without_checkpoints(self) -> AbstractContextManager[None]:
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    def _prepare_inputs(self, generation_batch: list | dict) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if not (self.sharing.is_on and self._has_new_rollouts):
            return inputs
        self._has_new_rollouts = False
        self._buffered_inputs = regroup(self._buffered_inputs, self._regrouped)
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
        if self.args.distill_gate != "all":
            num_generations = self.num_generations if is_training else self.num_generations_eval
            gate = self._teacher_term.gate(self._rewards_per_func, self.reward_weights, num_generations)
            rollouts["distill_gate"] = gate.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        with self._without_checkpoints():
            rollouts["teacher_hidden_states"] = self.teacher.hidden_states(
                self._teacher_prompt_ids(inputs, rollouts),
                rollouts["completion_ids"],
                rollouts["completion_mask"],
                self._tokenizer.pad_token_id,
                self.args.per_device_train_batch_size if is_training else self.args.per_device_eval_batch_size,
                self.args.max_tokens_per_micro_batch,
            )
        if is_training:
            self._teacher_seconds += _synchronized_clock() - start
        return rollouts

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
        if not self._rewards_count:
            inputs = {**inputs, "advantages": torch.zeros_like(inputs["advantages"])}
        self._student_forward = forward = StudentForward(
            self._teacher_term.distillation(inputs, self.teacher.head) if self._distills else None
        )
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._student_forward = None
        terms = {"GRPO": loss}
        if self._distills:
            if forward.output is None:
                self._score_for_teacher(model, inputs, forward)
            steps = self.current_gradient_accumulation_steps if self.model.training else None
            terms["teacher"] = self.distill_coef * self._teacher_term(inputs, forward.tokens, steps)
            self._log_teacher_term(inputs, forward.tokens, terms)
            loss = loss + terms["teacher"]
        if self.model.training:
            self._nonfinite_guard.observe(self.state.global_step + 1, inputs, terms, forward.output)
        return loss

    def _log_teacher_term(self, inputs: dict[str, Any], tokens: DistilledTokens, terms: dict[str, Tensor]) -> None:
        """A collective call at the end of an accumulation window."""
        if self.model.training:
            self.inspector.observe(inputs, tokens, self._teacher_term.mask(inputs))
        losses = {"distill/grpo_loss": terms["GRPO"], "distill/loss": terms["teacher"]}
        values = self._teacher_term.metrics(inputs, tokens)
        for name, value in self._window.add(values, losses).items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _score_for_teacher(self, model: nn.Module, inputs: dict[str, Any], forward: StudentForward) -> None:
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

    def _follow_schedule(self) -> None:
        """Sets the weights of both terms for the optimizer step that begins, and lets a teacher go that has ended."""
        self.distill_coef, self._rewards_count = terms_at(self._schedule, self.state)
        if self._distills and self.distill_coef == 0:
            logger.info(f"Step {self.state.global_step + 1}: the teacher term has ended, and its memory is freed.")
            self._distills = False
            self.teacher.release()
            self.teacher_model = None
            self.inspector.begin(0, True)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        if not self._schedule.is_constant and self.state.global_step != self._scheduled_step:
            self._scheduled_step = self.state.global_step
            self._follow_schedule()
        output = super().training_step(model, inputs, num_items_in_batch)
        if self._has_teacher and self._step % self.current_gradient_accumulation_steps == 0:
            metrics = self._metrics["train"]
            metrics["distill/coef"].append(self.distill_coef)
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


def _synchronized_clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
