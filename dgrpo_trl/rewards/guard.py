"""The guard around reward functions: a wrong number of rewards, a NaN or an exception names function and row."""

import functools
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from torch import nn

from ..trl_compat import is_async_callable


# What `GRPOTrainer` takes: a reward model, or a function from keyword arguments to a reward, or `None`, per completion
RewardFunc = nn.Module | Callable[..., Any]


def guarded(reward_func: RewardFunc, name: str) -> RewardFunc:
    """A call of `reward_func` that raises where it does not return one finite number, or `None`, per completion.

    Args:
        reward_func (`nn.Module` or `Callable`):
            Called, not changed, and called anew for each row if it raises. A reward model is returned as it is.
        name (`str`):
            In messages.

    Returns:
        `nn.Module` or `Callable`: Synchronous or asynchronous, as `reward_func` is. It raises a `RuntimeError` where
        that raises, and a `ValueError` for what it returns.
    """
    if isinstance(reward_func, nn.Module):
        return reward_func
    if is_async_callable(reward_func):
        return functools.partial(_call, reward_func, name)

    async def at_once(**kwargs: Any) -> Any:
        return reward_func(**kwargs)

    def call(**kwargs: Any) -> Any:
        try:
            _call(at_once, name, **kwargs).send(None)
        except StopIteration as end:  # the only way out: a coroutine that never waits runs to its end
            return end.value

    return call


async def _call(reward_func: Callable[..., Awaitable[Any]], name: str, /, **kwargs: Any) -> Any:
    try:
        rewards = await reward_func(**kwargs)
    except Exception as error:
        for place, row in _single_rows(kwargs):
            try:
                await reward_func(**row)
            except Exception as again:
                raise _failure(name, again, place) from error
        raise _failure(name, error, "the completions together, and for none of them alone") from error
    _check(name, rewards, kwargs["completions"])
    return rewards


def _check(name: str, rewards: Any, completions: list[Any]) -> None:
    if len(rewards) != len(completions):
        raise ValueError(
            f"Reward function `{name}` returned {len(rewards)} values for {len(completions)} completions. It must "
            "return one per completion, in their order; `None` stands for one that it cannot score."
        )
    for i, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise ValueError(
                f"Reward function `{name}` returned {reward} for completion {i}: {completions[i]!r}. It would "
                "silently drop the completion, or corrupt the advantages of its group. Return a finite number, or "
                "`None` for a completion that it cannot score."
            )


def _failure(name: str, error: Exception, place: str) -> RuntimeError:
    return RuntimeError(
        f"Reward function `{name}` raised {type(error).__name__}: {error}. It did so for {place}. Without its reward "
        "a completion cannot be learned from. Fix the function; it may return `None` for a completion that it cannot "
        "score."
    )


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
