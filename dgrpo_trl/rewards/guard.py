"""The guard around reward functions: an exception or a number that is not finite names function and rows."""

import functools
import math
from collections.abc import Awaitable, Callable
from typing import Any

from accelerate.logging import get_logger
from torch import Tensor, nn
from trl import GRPOTrainer

from ..row_checks import compares_references
from ..trl_compat import is_async_callable
from .extraction import ends_in_thinking, open_thinking


logger = get_logger(__name__)

# What `GRPOTrainer` takes: a reward model, or a function from keyword arguments to a reward, or `None`, per completion
RewardFunc = nn.Module | Callable[..., Any]

_MAX_ROWS = 4  # of a batch, in a message
_MAX_CHARS = 200  # of a completion or a prompt, in a message


class GuardedRewards(GRPOTrainer):
    """Calls reward functions through [`guarded`], and keeps what they gave. A base of the trainer."""

    # TRL's
    reward_funcs: list[Any]
    reward_func_names: list[str]

    _rewards_per_func: Tensor  # of shape `(N, F)`, of all ranks: TRL keeps the advantages alone

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        reward_funcs = self.reward_funcs
        self.reward_funcs = [
            guarded(func, name) for func, name in zip(reward_funcs, self.reward_func_names, strict=True)
        ]
        reads_answers = [compares_references(func) for func in reward_funcs]
        if any(reads_answers) and self._template_opens_thinking(prompts):
            self.reward_funcs = [
                _with_open_thinking(call) if reads else call
                for reads, call in zip(reads_answers, self.reward_funcs, strict=True)
            ]
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = reward_funcs
        self._rewards_per_func = rewards
        return rewards

    def _template_opens_thinking(self, prompts: list) -> bool:
        """Whether the chat template ends the prompt with `<think>`, as that of R1 does: completions lack the tag."""
        if not prompts or isinstance(prompts[0], str):
            return False  # the rewards see such prompts themselves
        rendered = self.processing_class.apply_chat_template(
            [{"role": "user", "content": "-"}], add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
        )
        return isinstance(rendered, str) and ends_in_thinking(rendered)


def _with_open_thinking(reward_func: Callable[..., Any]) -> Callable[..., Any]:
    """`reward_func`, for completions that begin inside the thinking that the prompt has opened."""

    if is_async_callable(reward_func):

        async def call_async(completions: list[Any], **kwargs: Any) -> Any:
            return await reward_func(completions=[open_thinking(each) for each in completions], **kwargs)

        return call_async

    def call(completions: list[Any], **kwargs: Any) -> Any:
        return reward_func(completions=[open_thinking(each) for each in completions], **kwargs)

    return call


def guarded(reward_func: RewardFunc, name: str) -> RewardFunc:
    """A call of `reward_func` that explains what goes wrong in it; synchronous or asynchronous, as that is.

    NaN counts as `None`, as in `GRPOTrainer`, and a warning says how often it was returned. The call raises a
    `RuntimeError` that shows the rows where `reward_func` raises, and a `ValueError` for a reward that is infinite. A
    reward model is returned as it is.
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


async def _call(reward_func: Callable[..., Awaitable[Any]], name: str, /, **kwargs: Any) -> list[Any]:
    try:
        rewards = list(await reward_func(**kwargs))
    except Exception as error:
        raise RuntimeError(
            f"Reward function `{name}` raised {type(error).__name__}: {error}. It was called for "
            f"{_rows(kwargs)}. Without its reward a completion cannot be learned from. Fix the function; it may "
            "return `None` for a completion that it cannot score."
        ) from error
    _check(name, rewards, kwargs["completions"])
    return rewards


def _check(name: str, rewards: list[Any], completions: list[Any]) -> None:
    """TRL itself checks their number."""
    if len(rewards) != len(completions):
        return
    numbers = {i: float(reward) for i, reward in enumerate(rewards) if reward is not None}
    for i, number in numbers.items():
        if math.isinf(number):
            raise ValueError(
                f"Reward function `{name}` returned {number} for completion {i}: {completions[i]!r}. It would corrupt "
                "the advantages of its group. Return a finite number, or `None` for a completion that it cannot score."
            )
    nans = [i for i, number in numbers.items() if math.isnan(number)]
    if nans:
        logger.warning(
            f"Reward function `{name}` returned NaN for {len(nans)} of {len(completions)} completions, the first of "
            f"them {_shortened(completions[nans[0]])}. NaN counts as `None`: the completion is not scored by it."
        )


def _rows(kwargs: dict[str, Any]) -> str:
    completions, prompts = kwargs["completions"], kwargs.get("prompts")
    rows = [_shortened(completion) for completion in completions[:_MAX_ROWS]]
    if prompts is not None:
        rows = [
            f"{row} of the prompt that ends {str(prompt)[-_MAX_CHARS:]!r}"
            for row, prompt in zip(rows, prompts, strict=False)
        ]
    more = "" if len(completions) <= _MAX_ROWS else f"; and {len(completions) - _MAX_ROWS} more"
    return f"{len(completions)} completions together: {'; '.join(rows)}{more}"


def _shortened(completion: Any) -> str:
    return repr(str(completion)[:_MAX_CHARS])
