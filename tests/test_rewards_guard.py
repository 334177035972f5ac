"""The guard around reward functions: what it lets through, what it names, and that the functions stay the user's."""

import asyncio
import re
from functools import partial

import pytest
from conftest import length_reward
from torch import nn
from trl import GRPOTrainer

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


def test_any_iterable_of_rewards_will_do():
    assert call(lambda completions, **kwargs: (float(i) for i in range(3))) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_an_infinite_reward_is_named_with_its_completion(value):
    with pytest.raises(ValueError, match=f"`mine` returned {value} for completion 2: 'three'"):
        call(lambda completions, **kwargs: [0.0, None, value])


def fails_at_two(completions, answer, **kwargs):
    calls.append(answer)
    if "2" in answer:
        raise KeyError("price")
    return [0.0] * len(completions)


calls: list[list[str]] = []


@pytest.mark.parametrize("reward", both(fails_at_two))
def test_an_exception_names_the_rows_and_the_function_is_called_once(reward):
    calls.clear()
    with pytest.raises(
        RuntimeError,
        match="(?s)`mine` raised KeyError: 'price'.*3 completions together: .*; 'two' of the prompt .*'b\\?'",
    ) as e:
        call(reward, answer=["1", "2", "3"])
    assert isinstance(e.value.__cause__, KeyError) and calls == [["1", "2", "3"]]


def test_a_result_that_is_no_list_is_named():
    with pytest.raises(RuntimeError, match="`mine` raised TypeError: 'NoneType' object is not iterable"):
        call(lambda completions, **kwargs: None)


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


def sometimes_nan(completions, **kwargs):
    return [float("nan"), *length_reward(completions)[1:]]


def sometimes_none(completions, **kwargs):
    return [None, *length_reward(completions)[1:]]


@pytest.mark.parametrize("reward", [sometimes_nan, sometimes_none])
def test_nan_is_none_as_in_grpo_trainer_and_is_counted(make_trainer, caplog, reward):
    histories = []
    for trainer_class, extra in ((GRPOTrainer, {}), (DGRPOTrainer, {"distill_coef": 0.0, "shared_prefix": "off"})):
        trainer = make_trainer(trainer_class, reward_funcs=reward, **extra)
        trainer.train()
        histories.append([(entry.get("reward"), entry.get("loss")) for entry in trainer.state.log_history])
    assert histories[0] == histories[1]
    counted = "`sometimes_nan` returned NaN for 1 of 4 completions" in caplog.text
    assert counted == (reward is sometimes_nan)


def test_a_wrong_number_of_rewards_is_trls_error(make_trainer):
    trainer = make_trainer(DGRPOTrainer, distill_coef=0.0, reward_funcs=lambda completions, **kwargs: [1.0])
    with pytest.raises(ValueError, match="returned 1 rewards, but 4 were expected"):
        trainer.train()
