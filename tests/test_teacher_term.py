"""The teacher term of a micro-batch against sums written out in float64: gates, the clip, every normalizer."""

import types

import pytest
import torch

from dgrpo_trl import DGRPOConfig, DGRPOTrainer
from dgrpo_trl.losses import LOSS_TYPES
from dgrpo_trl.teacher_term import TeacherTerm


B, T, MAX_LENGTH = 4, 5, 8
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
EOS = 2
IDS = torch.tensor([[5, 6, EOS, 0, 0], [5, 5, 5, 5, 5], [EOS, 0, 0, 0, 0], [7, EOS, 0, 0, 0]])
GATE = torch.tensor([1.0, 0.0, 1.0, 1.0])


def term(loss_type="dapo", **options):
    return TeacherTerm(
        DGRPOConfig(
            "out", use_cpu=True, bf16=False, loss_type=loss_type, max_completion_length=MAX_LENGTH,
            gradient_accumulation_steps=2, **options,
        ),
        num_processes=1,
        eos_token_ids=[EOS],
    )  # fmt: skip


def micro_batch():
    generator = torch.Generator().manual_seed(0)
    divergences = torch.rand(B, T, generator=generator, dtype=torch.float64) * 2
    divergences[0, 4] = torch.nan  # behind the mask
    divergences.requires_grad_()
    inputs = {
        "completion_ids": IDS,
        "completion_mask": MASK,
        "num_items_in_batch": torch.tensor(40),
        "distill_gate": GATE,
    }
    return inputs, types.SimpleNamespace(divergences=divergences)


def naive(values, loss_type, taught, clip):
    """Value and gradient, token by token, for two micro-batches of a step."""
    lengths = MASK.sum(-1).tolist()
    weights = {
        "grpo": lambda row: 1 / max(1, lengths[row]) / B / 2,
        "sapo": lambda row: 1 / max(1, lengths[row]) / B / 2,
        "bnpo": lambda row: 1 / sum(lengths) / 2,
        "dr_grpo": lambda row: 1 / (B * MAX_LENGTH) / 2,
        "luspo": lambda row: 1 / B / 2,
    }
    weight = weights.get(loss_type, lambda row: 1 / 40)  # by the tokens of the step
    total, gradient = 0.0, torch.zeros(B, T, dtype=torch.float64)
    for row in range(B):
        for t in range(T):
            if not taught[row, t]:
                continue
            value = values[row, t].item()
            total += weight(row) * min(value, clip)
            gradient[row, t] = weight(row) if value <= clip else 0.0
    return total, gradient


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("masks_end", [False, True])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_value_and_gradient_are_those_of_the_definition(loss_type, is_gated, clip, masks_end):
    gate = {"distill_gate": "below_reward", "distill_gate_reward": 0.5} if is_gated else {}
    inputs, tokens = micro_batch()
    value = term(loss_type, distill_clip=clip, distill_mask_eos=masks_end, **gate)(inputs, tokens, 2)
    value.backward()
    taught = MASK * (IDS != EOS) if masks_end else MASK
    taught = taught * GATE[:, None] if is_gated else taught
    expected = naive(tokens.divergences, loss_type, taught, clip or float("inf"))
    assert value.item() == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(tokens.divergences.grad, expected[1], rtol=1e-12, atol=1e-15)


NAN = float("nan")
REWARDS = torch.tensor(
    [[1, 0], [1, 0], [0, 0.5], [1, 0], [0.25, 0.25], [0.25, NAN], [NAN, NAN], [NAN, NAN], [NAN, NAN], [2, 2], [1, 1],
     [1, NAN]]
)  # fmt: skip


def test_a_gate_by_reward_takes_the_rollouts_below_it_and_those_without_any():
    gate = term(distill_gate="below_reward", distill_gate_reward=1.0).gate(REWARDS, torch.tensor([1.0, 2.0]), 3)
    assert gate.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]


def test_a_gate_by_variance_takes_the_groups_from_which_grpo_learns_nothing():
    gate = term(distill_gate="no_variance").gate(REWARDS, torch.tensor([1.0, 2.0]), 3)
    # 1 1 1 | 1 .75 .25 | none | 6 3 1
    assert gate.tolist() == [1] * 3 + [0] * 3 + [1] * 3 + [0] * 3


def rising(completions, **kwargs):
    """In the first group of two all rewards are alike, in the second not."""
    return [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("options", "taught"),
    [
        ({"distill_gate": "no_variance"}, range(4)),
        ({"distill_gate": "below_reward", "distill_gate_reward": 1.5}, range(6)),
    ],
)
@pytest.mark.parametrize("shared_prefix", ["on", "off"])
def test_in_training_the_gate_is_by_the_rewards_of_the_rollouts(
    make_trainer, make_model, options, taught, shared_prefix
):
    trainer = make_trainer(
        DGRPOTrainer, teacher_model=make_model(seed=1), reward_funcs=rising, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, shared_prefix=shared_prefix, max_steps=1, **options,
    )  # fmt: skip
    lengths = []
    score = trainer._generate_and_score_completions

    def observed(inputs):
        rollouts = score(inputs)
        lengths.extend(rollouts["completion_mask"].sum(-1).tolist())
        return rollouts

    trainer._generate_and_score_completions = observed
    trainer.train()
    expected = sum(lengths[i] for i in taught) / sum(lengths)
    assert trainer.state.log_history[0]["distill/taught_share"] == pytest.approx(expected)


def test_the_share_of_clipped_tokens_is_logged(make_trainer, make_model):
    shares = []
    for clip in (1e-6, 1e6):
        trainer = make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), distill_clip=clip, max_steps=1)
        trainer.train()
        entry = trainer.state.log_history[0]
        shares.append(entry["distill/clipped_share"])
        assert (entry["distill/loss"] < 1e-6) is (clip < 1)
    assert shares == [1, 0]


@pytest.mark.parametrize("options", [{"distill_gate": "no_variance"}, {"reward_start": "1"}])
def test_what_needs_rewards_is_refused_without(make_trainer, make_model, options):
    arguments = {"teacher_model": make_model(seed=1), "reward_funcs": None}
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` is set, but the run has no reward"):
        make_trainer(DGRPOTrainer, **arguments, **options)
