"""The guard around reward functions: what it lets through, what it names, and that the functions stay the user's."""

import asyncio
import re
from functools import partial

import pytest
from conftest import length_reward
from torch import nn

from dgrpo_trl import DGRPOTrainer
from dgrpo_trl.rewards.guard import guarded
from dgrpo_trl.trl_compat import is_async_callable


COMPLETIONS = ["one", "two", "three"]


def call(reward, **columns):
    columns = {"completions": COMPLETIONS, "prompts": ["a?", "b?", "c?"], **columns}
    result = guarded(reward, "mine")(**columns)
    return asyncio.run(result) if is_async_callable(reward) else result


def both(reward):
    """A reward function, and the same as an asynchronous one."""

    async def waiting(**kwargs):
        await asyncio.sleep(0)
        return reward(**kwargs)

    return [pytest.param(reward, id=reward.__name__), pytest.param(waiting, id=f"async {reward.__name__}")]


def good(completions, **kwargs):
    return [None, 1, 0.5]


@pytest.mark.parametrize("reward", both(good))
def test_good_rewards_pass(reward):
    assert call(reward) == [None, 1, 0.5]
    assert is_async_callable(guarded(reward, "mine")) is is_async_callable(reward)


@pytest.mark.parametrize("reward", both(lambda completions, **kwargs: [1.0]))
def test_a_wrong_number_is_named(reward):
    with pytest.raises(ValueError, match="`mine` returned 1 values for 3 completions. It must return one per comp"):
        call(reward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named_with_its_completion(value):
    with pytest.raises(ValueError, match=f"`mine` returned {value} for completion 2: 'three'"):
        call(lambda completions, **kwargs: [0.0, None, value])


def fails_at_two(completions, answer, **kwargs):
    if "2" in answer:
        raise KeyError("price")
    return [0.0] * len(completions)


@pytest.mark.parametrize("reward", both(fails_at_two))
def test_an_exception_names_its_row(reward):
    with pytest.raises(
        RuntimeError, match="(?s)raised KeyError.*completion 1 of 3, 'two', of the prompt .*'b\\?'"
    ) as e:
        call(reward, answer=["1", "2", "3"])
    assert isinstance(e.value.__cause__, KeyError)


def fails_on_many(completions, **kwargs):
    if len(completions) > 1:
        raise RuntimeError("too many")
    return [0.0]


@pytest.mark.parametrize("reward", both(fails_on_many))
def test_an_exception_for_all_together_says_so(reward):
    with pytest.raises(RuntimeError, match="the completions together, and for none of them alone"):
        call(reward)


def test_any_column_name_reaches_the_function():
    def reward(completions, **columns):
        return [len(columns[key]) for key in ("name", "reward_func", "self")]

    columns = {"name": ["x"] * 3, "reward_func": ["y"] * 3, "self": ["z"] * 3}
    assert call(reward, **columns) == [3, 3, 3]


def test_a_reward_model_is_left_alone():
    model = nn.Linear(2, 1)
    assert guarded(model, "mine") is model


# --- In the trainer


class Scaled:
    """A reward function with state."""

    def __init__(self, scale):
        self.scale, self.num_calls = scale, 0

    def __call__(self, completions, **kwargs):
        self.num_calls += 1
        return [self.scale * reward for reward in length_reward(completions)]


class AsyncScaled(Scaled):
    async def __call__(self, completions, **kwargs):
        return super().__call__(completions, **kwargs)


@pytest.mark.parametrize("kind", [Scaled, AsyncScaled])
def test_the_trainer_keeps_the_users_own_objects_and_changes_to_them_count(make_trainer, kind):
    mine = kind(1.0)
    functions = [mine, length_reward, partial(length_reward)]
    trainer = make_trainer(DGRPOTrainer, distill_coef=0.0, reward_funcs=functions)
    assert all(ours is theirs for ours, theirs in zip(trainer.reward_funcs, functions, strict=True))
    assert trainer.reward_funcs is not functions and isinstance(trainer.reward_funcs[0], kind)
    trainer.reward_funcs[0].scale = 0.0  # through the trainer
    trainer.train()
    assert trainer.reward_funcs[0] is mine and mine.num_calls == 2
    logged = trainer.state.log_history[0]
    assert logged[f"rewards/{kind.__name__}/mean"] == 0 < logged["rewards/length_reward/mean"]


def test_the_functions_are_the_users_again_after_an_error(make_trainer):
    def failing(completions, **kwargs):
        raise KeyError("price")

    trainer = make_trainer(DGRPOTrainer, distill_coef=0.0, reward_funcs=failing)
    with pytest.raises(RuntimeError, match=re.escape("Reward function `failing` raised KeyError")):
        trainer.train()
    assert trainer.reward_funcs == [failing]
