"""The weights of the loss's terms over a run: values, resumed runs, and a teacher that is let go."""

import gc
import math
import weakref

import pytest
import torch
from test_trainer import history, weights

from dgrpo_trl import DGRPOConfig, DGRPOTrainer
from dgrpo_trl.schedule import ARGUMENTS, SCHEDULES, Schedule, read_schedule


def coefs(num_steps=10, logs=(), **arguments):
    schedule = Schedule(0.5, **arguments)
    return [schedule.coef(step, num_steps, logs) for step in range(num_steps)]


def test_coefficients_by_hand():
    assert coefs() == [0.5] * 10
    assert coefs(kind="linear", num_steps=5) == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert coefs(kind="linear", start=2, end=6, final_coef=0.1) == pytest.approx(
        [0.5, 0.5, 0.5, 0.4, 0.3, 0.2] + [0.1] * 4
    )
    assert coefs(kind="cosine", num_steps=4) == pytest.approx(
        [0.25 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    )
    assert coefs(kind="switch", at=3) == [0.5] * 3 + [0.0] * 7
    assert coefs(kind="switch", at=0.25, final_coef=0.1) == [0.5] * 3 + [0.1] * 7  # from step 2.5 on


def plateau_logs(values):
    return [entry for i, value in enumerate(values) for entry in ({"reward": value, "step": i}, {"eval_loss": 0.0})]


@pytest.mark.parametrize(
    ("values", "has_switched"),
    [
        ([], False),
        ([0.1, 0.2, 0.3, 0.4], False),
        ([0.1, 0.2, 0.2, 0.205], True),  # best 0.2, then twice not above 0.21
        ([0.1, 0.2, 0.2, 0.3], False),
        ([0.1, 0.2, 0.1, 0.1, 0.9], True),  # for good
        ([0.5, math.nan, math.nan], True),
    ],
)
def test_a_plateau_is_a_metric_that_no_longer_rises(values, has_switched):
    schedule = Schedule(0.5, "plateau", patience=2, min_delta=0.01, reward_start="switch")
    logs = plateau_logs(values)
    assert schedule.coef(9, 10, logs) == (0.0 if has_switched else 0.5)
    assert schedule.rewards_count(9, 10, logs) is has_switched


def test_when_the_rewards_count():
    def counted(**arguments):
        schedule = Schedule(0.5, **arguments)
        return [schedule.rewards_count(step, 6) for step in range(6)]

    assert counted() == [True] * 6
    assert counted(reward_start=2) == counted(reward_start=0.33) == [False] * 2 + [True] * 4
    assert counted(kind="switch", at=0.5, reward_start="switch") == [False] * 3 + [True] * 3


def test_the_share_of_the_steps_with_a_teacher():
    assert Schedule(0.5).teacher_share(10) == Schedule(0.5, "linear").teacher_share(10) == 1
    assert Schedule(0.5, "switch", at=0.3).teacher_share(10) == 0.3
    assert Schedule(0.5, "plateau").teacher_share(10) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill_scheduler_type": "step"}, "is 'step', which is not known"),
        ({"distill_scheduler_type": "switch"}, "has no `at`"),
        ({"distill_scheduler_type": "switch", "distill_scheduler_kwargs": {"at": 1.5}}, "`at` is 1.5"),
        ({"distill_scheduler_type": "switch", "distill_scheduler_kwargs": {"at": True}}, "`at` is True"),
        (
            {"distill_scheduler_type": "linear", "distill_scheduler_kwargs": {"at": 0.5}},
            "'at', which 'linear'",
        ),
        ({"distill_scheduler_type": "linear", "distill_scheduler_kwargs": {"start": 5, "end": 5}}, "must lie before"),
        (
            {"distill_scheduler_type": "linear", "distill_scheduler_kwargs": {"final_coef": -1.0}},
            "`final_coef`",
        ),
        ({"distill_scheduler_type": "plateau", "distill_scheduler_kwargs": {"patience": 0}}, "`patience` must be"),
        ({"distill_scheduler_kwargs": {"at": 0.5}}, "'constant' does not take"),
        ({"distill_scheduler_type": "linear", "distill_coef": 0.0}, "`distill_coef` is 0"),
        ({"reward_start": "switch"}, "which has none"),
        ({"reward_start": "soon"}, "`reward_start` is 'soon'"),
        ({"reward_start": "5", "distill_coef": 0.0}, "nothing would be learned before it"),
        ({"distill_gate": "some"}, "is 'some', which is not known"),
        ({"distill_gate": "below_reward"}, "needs the reward"),
        ({"distill_gate_reward": 1.0}, "nothing else takes one"),
        ({"distill_clip": 0.0}, "finite number of nats"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_load(options, message):
    with pytest.raises(ValueError, match=message):
        DGRPOConfig("out", use_cpu=True, bf16=False, **options)


def test_the_command_line_gives_the_same_schedule():
    text = DGRPOConfig(
        "out",
        use_cpu=True,
        bf16=False,
        distill_scheduler_type="switch",
        distill_scheduler_kwargs='{"at": 40}',
        reward_start="0.5",
    )
    assert text.get_schedule() == Schedule(0.5, "switch", at=40, reward_start=0.5)
    assert read_schedule(0.5, "constant", None, "7").reward_start == 7


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"kind": "switch", "at": 20}, "`at` is step 20 of a run that has 10"),
        ({"kind": "linear", "start": 12, "end": 15}, "`start` is step 12"),
        ({"reward_start": 10}, "`reward_start` is step 10"),
        ({"kind": "switch", "at": 3, "reward_start": 0.5}, "From step 3 to 5 of 10 neither term"),
    ],
)
def test_a_run_that_is_too_short_for_its_schedule(arguments, problem):
    (found,) = Schedule(0.5, **arguments).problems(10)
    assert problem in found
    assert not Schedule(0.5, **arguments).problems(100) or "neither" in problem


# --- Runs


SWITCH = {"distill_scheduler_type": "switch", "distill_scheduler_kwargs": {"at": 2}}


def entries(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("shared_prefix", ["on", "off"])
def test_after_the_switch_it_is_grpo_without_a_teacher(make_trainer, make_model, shared_prefix):
    teacher = make_model(seed=1)
    reference, numel = weakref.ref(teacher.model.layers[0].mlp.up_proj.weight), teacher.num_parameters()
    options = {"max_steps": 4, "shared_prefix": shared_prefix, "log_completions": True}
    trainer = make_trainer(DGRPOTrainer, teacher_model=teacher, **SWITCH, **options)
    del teacher
    trainer.train()
    gc.collect()
    assert numel > 0 and reference() is None and trainer.teacher_model is None
    logged = entries(trainer)
    assert [entry["distill/coef"] for entry in logged] == [0.5, 0.5, 0.0, 0.0]
    assert ["distill/loss" in entry for entry in logged] == [True, True, False, False]
    assert [entry["distill/teacher_time_share"] > 0 for entry in logged] == [True, True, False, False]


def test_the_steps_after_the_switch_are_those_of_grpo_trainer(make_trainer, make_model):
    """From the same weights, and with the same random numbers."""
    trainer = make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), max_steps=4, **SWITCH)
    losses = []
    compute = trainer.compute_loss

    def recorded(model, inputs, **kwargs):
        if trainer.state.global_step >= 2:
            with torch.no_grad():
                losses.append(super(DGRPOTrainer, trainer)._compute_loss(model, inputs).item())
        loss = compute(model, inputs, **kwargs)
        if losses:
            assert loss.item() == pytest.approx(losses[-1], abs=1e-7)
        return loss

    trainer.compute_loss = recorded
    trainer.train()
    assert len(losses) == 2


def test_before_the_rewards_count_it_is_distillation_alone(make_trainer, make_model):
    options = {"max_steps": 3, "teacher_model": make_model(seed=1)}
    without = make_trainer(DGRPOTrainer, reward_funcs=None, **options)
    without.train()
    late = make_trainer(DGRPOTrainer, reward_start="2", **options)
    late.train()
    for ours, alone in zip(entries(late)[:2], entries(without)[:2], strict=True):
        assert ours["loss"] == alone["loss"] and ours["grad_norm"] == alone["grad_norm"]
        assert ours["distill/grpo_loss"] == pytest.approx(0, abs=1e-7) and "reward" in ours
    assert entries(late)[2]["grad_norm"] != entries(without)[2]["grad_norm"]


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize(
    "schedule",
    [
        SWITCH,
        {"distill_scheduler_type": "linear", "reward_start": "switch"} | SWITCH,
        {"distill_scheduler_type": "cosine", "reward_start": "1"},
        {"distill_scheduler_type": "plateau", "distill_scheduler_kwargs": {"patience": 1, "min_delta": 9.0}},
    ],
    ids=["switch", "switch with rewards", "cosine", "plateau"],
)
def test_a_resumed_run_follows_the_schedule_bit_for_bit(make_trainer, make_model, tmp_path, schedule, stop):
    def run(**options):
        trainer = make_trainer(
            DGRPOTrainer, teacher_model=make_model(seed=1), max_steps=4, save_strategy="steps", save_steps=1, **options
        )
        return trainer

    whole = run(output_dir=str(tmp_path / "whole"), **schedule)
    whole.train()
    resumed = run(output_dir=str(tmp_path / "resumed"), **schedule)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert history(resumed)[:-1] == history(whole)[:-1]  # the last one sums up the run
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert [entry["distill/coef"] for entry in entries(resumed)] == [entry["distill/coef"] for entry in entries(whole)]


def test_a_metric_that_is_not_logged_stops_the_run_with_those_that_are(make_trainer, make_model):
    options = {"distill_scheduler_type": "plateau", "distill_scheduler_kwargs": {"metric": "rewards/accuracy"}}
    trainer = make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), **options)
    with pytest.raises(ValueError, match="'rewards/accuracy', which is not logged.*rewards/length_reward/mean"):
        trainer.train()


def test_a_schedule_that_does_not_fit_the_run_is_refused(make_trainer, make_model):
    options = {"distill_scheduler_type": "switch", "distill_scheduler_kwargs": {"at": 50}}
    with pytest.raises(ValueError, match="`at` is step 50 of a run that has 2"):
        make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), **options)


def test_every_kind_of_schedule_is_in_the_table_of_its_arguments():
    assert ARGUMENTS.keys() == SCHEDULES.keys()
