"""What works on `GRPOTrainer` works here: subclasses, callbacks, data without unused columns."""

import pytest
from conftest import length_reward
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from dgrpo_trl import DGRPOConfig, DGRPOTrainer
from dgrpo_trl.cli import training_run
from dgrpo_trl.config import DGRPOScriptArguments


class OwnLogps(DGRPOTrainer):
    """Computes log-probabilities by itself, as TRL does."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return GRPOTrainer._get_per_token_logps_and_entropies(self, *args, **kwargs)


def test_a_subclass_with_its_own_log_probabilities_gets_the_teacher_term(make_trainer, make_model, caplog):
    histories = []
    for trainer_class in (DGRPOTrainer, OwnLogps):
        options = {"gradient_accumulation_steps": 2, "shared_prefix": "off"}
        trainer = make_trainer(trainer_class, teacher_model=make_model(seed=1), **options)
        trainer.train()
        histories.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for ours, own in zip(*histories, strict=True):
        for name in ("loss", "grad_norm", "distill/loss", "distill/grpo_loss", "distill/divergence"):
            assert own[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6)
    assert caplog.text.count("`OwnLogps` computes its own log-probabilities") == 1


class TokenAdvantages(DGRPOTrainer):
    """Gives each token an advantage, and adds columns of its own."""

    def _generate_and_score_completions(self, inputs):
        rollouts = super()._generate_and_score_completions(inputs)
        rollouts["advantages"] = rollouts["advantages"][:, None].expand(rollouts["completion_ids"].shape).clone()
        rollouts["mine"], rollouts["empty"] = [str(i) for i in range(len(inputs))], None
        return rollouts


def test_a_subclass_may_give_advantages_by_token(make_trainer, saved_teacher):
    options = {"gradient_accumulation_steps": 2, "log_heatmaps": True}
    trainer = make_trainer(TokenAdvantages, teacher_model=saved_teacher, **options)
    trainer.train()
    assert trainer.state.global_step == 2


class Lengths(DGRPOTrainer):
    """Adds a column for its reward functions."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        inputs = [{**row, "num_tokens": len(ids)} for row, ids in zip(inputs, completion_ids_list, strict=True)]
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)


def short_reward(completions, num_tokens, **kwargs):
    return [-float(number) for number in num_tokens]


def test_a_subclass_may_add_columns_for_its_rewards(make_trainer, saved_teacher):
    trainer = make_trainer(Lengths, teacher_model=saved_teacher, reward_funcs=short_reward)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/short_reward/mean"] < 0
    with pytest.raises(ValueError, match="no column 'num_tokens'"):
        make_trainer(DGRPOTrainer, teacher_model=saved_teacher, reward_funcs=short_reward)


class Recorder(TrainerCallback):
    """What a callback is told, and by whom."""

    def __init__(self):
        self.events, self.logs = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert isinstance(args, GRPOConfig) and any(p.grad is not None for p in model.parameters())
        self.events.append("step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(set(logs))


def test_callbacks_see_what_they_see_of_grpo_trainer(make_trainer):
    seen = []
    for trainer_class, extra in ((GRPOTrainer, {}), (DGRPOTrainer, {"distill_coef": 0.0})):
        trainer, recorder = make_trainer(trainer_class, **extra), Recorder()
        assert isinstance(trainer, GRPOTrainer)
        trainer.add_callback(recorder)
        trainer.train()
        seen.append((recorder.events, recorder.logs))
    assert seen[0] == seen[1]


def test_unused_columns_may_be_removed(make_trainer, saved_teacher, dataset):
    def columns(completions, **kwargs):
        seen.update(kwargs)
        return length_reward(completions)

    seen = {}
    own = [[{"role": "user", "content": "Number?"}], None] * (len(dataset) // 2)
    trainer = make_trainer(
        DGRPOTrainer,
        teacher_model=saved_teacher,
        reward_funcs=columns,
        train_dataset=dataset.add_column("teacher_prompt", own),
        eval_dataset=dataset.select(range(4)),
        eval_strategy="steps",
        eval_steps=1,
        remove_unused_columns=True,
    )
    trainer.train()
    assert "answer" not in seen and trainer.state.global_step == 2


def test_texts_with_columns_that_are_empty_in_some_rows(make_trainer, saved_teacher):
    rows = [{"prompt": "What is the number?", "note": None}, {"prompt": "Number?", "note": "x"}] * 4
    trainer = make_trainer(
        DGRPOTrainer,
        teacher_model=saved_teacher,
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()


@pytest.mark.parametrize(("extra", "seed"), [(["--data_seed", "0"], 0), ([], 5)])
def test_a_seed_of_zero_for_the_data_is_a_seed(tmp_path, saved_teacher, monkeypatch, extra, seed):
    def load(*args, seed, **kwargs):
        raise RuntimeError(f"seed {seed}")

    monkeypatch.setattr(training_run, "load_training_data", load)
    words = ["--model_name_or_path", saved_teacher, "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    with pytest.raises(RuntimeError, match=f"seed {seed}"):
        training_run.prepare_run(DGRPOScriptArguments, DGRPOConfig, [*words, "--seed", "5", *extra])


def run_with(make_trainer, make_model, **options):
    """The losses of two steps, and their gradients' norms."""
    trainer = make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), **options)
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"max_tokens_per_micro_batch": 120}], ids=str)
def test_a_compiled_student_trains_alike(make_trainer, make_model, more):
    """Traced, and run as traced: what kernels the graph is compiled to is not ours to test."""
    plain, _ = run_with(make_trainer, make_model, **more)
    compiled, trainer = run_with(make_trainer, make_model, torch_compile=True, torch_compile_backend="eager", **more)
    assert trainer.sharing.is_on and trainer.teacher.sharing.is_on
    assert compiled == [pytest.approx(entry, rel=1e-4) for entry in plain]


@pytest.mark.slow
def test_continuous_batching_of_transformers_generates(make_trainer, make_model):
    entries, trainer = run_with(make_trainer, make_model, use_transformers_continuous_batching=True)
    assert trainer.sharing.is_on and all(norm > 0 for _, norm in entries)
