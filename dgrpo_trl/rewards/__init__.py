"""
Outcome rewards against a reference answer, in TRL's signature, and an LLM judge for open answers.

A rule reward is gamed by whatever it forgot to forbid, so these err on the strict side: a reward of 1 should be hard
to get without knowing the answer, and a right answer in an unusual form may get 0. To pass in `reward_funcs`:

- [`exact_match_reward`]: the answer is the reference, after normalization;
- [`contains_answer_reward`]: the answer is a short sentence around the reference;
- [`token_f1_reward`]: share of common tokens, in [0, 1];
- [`list_match_reward`]: share of common items of two lists, in [0, 1], whatever their order;
- [`numeric_reward`]: the answer is one number, equal to the reference;
- [`LLMJudgeReward`]: a model at an OpenAI-compatible server says whether the answer is right.

All of them read the column `answer`, and return `None` (TRL: not scored) where that reference cannot be compared with
anything. This package is not for format or length rewards, which TRL has.
"""

from typing import TYPE_CHECKING, Any

from .extraction import extract_answer as extract_answer
from .numbers import *  # noqa: F403  (its `__all__`: a new reward is written in one place)
from .rules import *  # noqa: F403
from .text import normalize_answer as normalize_answer


if TYPE_CHECKING:
    from .judge import LLMJudgeReward as LLMJudgeReward


def __getattr__(name: str) -> Any:
    """Imports the judge when it is asked for: the rules need no client of servers, nor its seconds."""
    if name == "LLMJudgeReward":
        from .judge import LLMJudgeReward

        return LLMJudgeReward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
