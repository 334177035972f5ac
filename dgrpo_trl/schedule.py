"""How the weights of the loss's two terms change while a run trains.

A function of the step, and of what was logged up to it. Both are in the state of a checkpoint, so that a resumed run
follows the schedule as one that was never stopped. arXiv 2609.04108 compares such schedules.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerState


# A point of a run: an optimizer step if it is an integer, else a share of all steps
Point = int | float


@dataclass(frozen=True)
class Schedule:
    """The coefficient of the teacher term, and whether the reward term counts, at each optimizer step.

    Args:
        initial_coef (`float`):
            `distill_coef`.
        kind (`str`, *optional*, defaults to `"constant"`):
            One of `SCHEDULES`: `"linear"` and `"cosine"` go from the initial to the final coefficient between `start`
            and `end`; `"switch"` takes the final one from `at` on, and `"plateau"` from the step after `metric` has
            failed `patience` times in a row to exceed its best value by more than `min_delta`.
        final_coef (`float`, *optional*, defaults to `0.0`):
            What it ends at.
        start (`int` or `float`), end (`int` or `float`), at (`int` or `float`, *optional*):
            Points of the run: optimizer steps if integers, else shares of all steps, in [0, 1].
        metric (`str`), min_delta (`float`), patience (`int`):
            Of `"plateau"`: a name in the logs, of a window of `logging_steps` or, with `eval_`, of an evaluation.
        reward_start (`int`, `float` or `str`, *optional*):
            From where the reward term counts: a point, or `"switch"` for that of `"switch"` and `"plateau"`.

    Raises:
        ValueError: If these do not fit together.
    """

    initial_coef: float
    kind: str = "constant"
    final_coef: float = 0.0
    start: Point = 0
    end: Point = 1.0
    at: Point | None = None
    metric: str = "reward"
    min_delta: float = 0.01
    patience: int = 3
    reward_start: Point | str | None = None

    def __post_init__(self) -> None:
        if self.kind != "constant" and self.initial_coef == 0:
            raise ValueError(
                f"`distill_scheduler_type` is {self.kind!r}, but `distill_coef` is 0: there is no teacher term to "
                "schedule. Give `distill_coef` the value that it starts from."
            )
        if not (math.isfinite(self.final_coef) and self.final_coef >= 0):
            raise ValueError(f"`final_coef` must be a finite number >= 0, got {self.final_coef}.")
        for name in ("start", "end", "at", "reward_start"):
            _check_point(name, getattr(self, name), may_be_switch=name == "reward_start")
        if self.kind == "switch" and self.at is None:
            raise ValueError(
                "`distill_scheduler_type` is 'switch', but `distill_scheduler_kwargs` has no `at`. It is the step (an "
                "integer) or the share of the run from which `final_coef` holds, such as {at: 0.5}."
            )
        if self.kind == "plateau" and (self.patience < 1 or self.min_delta < 0):
            raise ValueError(
                f"`patience` must be at least 1 and `min_delta` at least 0, got {self.patience} and {self.min_delta}."
            )
        if type(self.start) is type(self.end) and self.start >= self.end:
            raise ValueError(f"`start` ({self.start}) must lie before `end` ({self.end}).")
        self._check_reward_start()

    def _check_reward_start(self) -> None:
        has_switch = self.kind in ("switch", "plateau")
        if self.reward_start == "switch" and not has_switch:
            raise ValueError(
                f"`reward_start` is 'switch', but `distill_scheduler_type` is {self.kind!r}, which has none. Set it "
                "to 'switch' or 'plateau', or `reward_start` to a step or a share of the run."
            )
        if self.reward_start is not None and self.initial_coef == 0:
            raise ValueError(
                "`reward_start` is set, but `distill_coef` is 0: nothing would be learned before it. Leave it out."
            )

    @property
    def is_constant(self) -> bool:
        """Whether neither term's weight ever changes."""
        return self.kind == "constant" and self.reward_start is None

    @property
    def reads_logs(self) -> bool:
        return self.kind == "plateau"

    def coef(self, step: int, max_steps: int, logs: Sequence[Mapping[str, Any]] = ()) -> float:
        """The coefficient of the teacher term at an optimizer step.

        Args:
            step (`int`):
                Steps that are done.
            max_steps (`int`):
                Steps of the run.
            logs (`Sequence[Mapping[str, Any]]`, *optional*):
                What was logged in these steps, as in the trainer's state.
        """
        return SCHEDULES[self.kind](self, step, max_steps, logs)

    def rewards_count(self, step: int, max_steps: int, logs: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Whether the reward term counts at this step; arguments as of [`Schedule.coef`]."""
        if self.reward_start is None:
            return True
        if self.reward_start == "switch":
            return self._has_switched(step, max_steps, logs)
        return step >= _step_of(self.reward_start, max_steps)

    def teacher_share(self, max_steps: int) -> float:
        """Share of the steps for which the teacher runs; of `"plateau"` at most, as its switch is not known before."""
        return sum(self.coef(step, max_steps) > 0 for step in range(max_steps)) / max(1, max_steps)

    def problems(self, max_steps: int) -> list[str]:
        """What cannot be right in a run of `max_steps`: a point that is never reached, or steps without a loss."""
        points = {"`at`": self.at, "`start`": self.start, "`reward_start`": self.reward_start}
        problems = [
            f"{name} is step {point} of a run that has {max_steps}. It would never be reached. Choose an earlier "
            "step, or a share of the run such as 0.5."
            for name, point in points.items()
            if isinstance(point, int) and point >= max_steps
        ]
        steps = range(max_steps)
        idle = [step for step in steps if not (self.coef(step, max_steps) or self.rewards_count(step, max_steps))]
        if idle and not problems:
            problems.append(
                f"From step {idle[0]} to {idle[-1] + 1} of {max_steps} neither term of the loss counts: the "
                f"coefficient of the teacher is 0, and `reward_start` is {self.reward_start}. Start the rewards "
                "earlier, or set `reward_start: switch`."
            )
        return problems

    def _has_switched(self, step: int, max_steps: int, logs: Sequence[Mapping[str, Any]]) -> bool:
        if self.kind == "switch":
            return self.at is not None and step >= _step_of(self.at, max_steps)
        return self._has_plateau(logs)

    def _has_plateau(self, logs: Sequence[Mapping[str, Any]]) -> bool:
        best, num_stale = -math.inf, 0
        for entry in logs:
            if self.metric not in entry:
                continue
            if entry[self.metric] > best + self.min_delta:  # not for NaN
                best, num_stale = entry[self.metric], 0
            else:
                num_stale += 1
            if num_stale == self.patience:
                return True
        return False

    def missing_metric(self, logs: Sequence[Mapping[str, Any]]) -> str | None:
        """A message if what was logged so far shows that `metric` never will be."""
        if not self.reads_logs:
            return None
        prefix = "eval_"
        is_eval = self.metric.startswith(prefix)
        entries = [entry for entry in logs if (f"{prefix}runtime" in entry if is_eval else "loss" in entry)]
        if not entries or any(self.metric in entry for entry in entries):
            return None
        return (
            f"`distill_scheduler_kwargs` names the metric {self.metric!r}, which is not logged: the coefficient would "
            f"never change. There are {', '.join(sorted(entries[-1]))}. Name one of them."
        )


def _check_point(name: str, point: Any, may_be_switch: bool) -> None:
    if point is None or (may_be_switch and point == "switch"):
        return
    is_share = isinstance(point, float) and 0 <= point <= 1
    if not is_share and (isinstance(point, bool) or not isinstance(point, int) or point < 0):
        raise ValueError(
            f"`{name}` is {point!r}. It is a point of the run: an optimizer step, as an integer, or a share of all "
            f"steps, as a number with a decimal point in [0, 1]{', or `switch`' if may_be_switch else ''}."
        )


def _step_of(point: Point | str, max_steps: int) -> int:
    return point if isinstance(point, int) else math.ceil(float(point) * max_steps)


def terms_at(schedule: Schedule, state: TrainerState) -> tuple[float, bool]:
    """Coefficient of the teacher term, and whether the reward term counts, for the step that begins.

    The same on all ranks. A collective call where the schedule reads logs: metrics of a user's may differ.

    Raises:
        ValueError: If the schedule does not fit the length of the run, or a metric is not logged.
    """
    problems = schedule.problems(state.max_steps) if state.global_step == 0 else []
    message = problems[0] if problems else schedule.missing_metric(state.log_history)
    if message is not None:
        raise ValueError(message)
    arguments = (state.global_step, state.max_steps, state.log_history)
    values = [schedule.coef(*arguments), float(schedule.rewards_count(*arguments))]
    if schedule.reads_logs:
        broadcast_object_list(values)
    return values[0], bool(values[1])


# What `distill_scheduler_kwargs` may hold
ARGUMENTS = {
    "constant": (),
    "linear": ("final_coef", "start", "end"),
    "cosine": ("final_coef", "start", "end"),
    "switch": ("final_coef", "at"),
    "plateau": ("final_coef", "metric", "min_delta", "patience"),
}


def read_schedule(
    initial_coef: float, kind: str, arguments: Mapping[str, Any] | str | None, reward_start: Point | str | None
) -> Schedule:
    """The schedule that `distill_scheduler_type`, `distill_scheduler_kwargs` and `reward_start` describe.

    Raises:
        ValueError: If they do not fit together.
    """
    if kind not in SCHEDULES:
        raise ValueError(
            f"`distill_scheduler_type` is {kind!r}, which is not known. Choose one of {', '.join(SCHEDULES)}."
        )
    if isinstance(arguments, str):
        raise ValueError(f'`distill_scheduler_kwargs` is {arguments!r}. Write a JSON object, such as {{"at": 0.5}}.')
    given = dict(arguments or {})
    unknown = sorted(given.keys() - set(ARGUMENTS[kind]))
    if unknown:
        raise ValueError(
            f"`distill_scheduler_kwargs` has {', '.join(map(repr, unknown))}, which {kind!r} does not take. It takes "
            f"{', '.join(ARGUMENTS[kind]) or 'none'}."
        )
    return Schedule(initial_coef, kind, **given, reward_start=_parsed(reward_start))


def _parsed(point: Point | str | None) -> Point | str | None:
    """A point from the command line, where all are strings."""
    for number in (int, float):
        try:
            return number(point) if isinstance(point, str) else point
        except ValueError:
            continue
    return point


# --- The kinds: each gives the coefficient at a step


def _constant(schedule: Schedule, step: int, max_steps: int, logs: Sequence[Mapping[str, Any]]) -> float:
    return schedule.initial_coef


def _progress(schedule: Schedule, step: int, max_steps: int) -> float:
    """From 0 at `start` to 1 at `end`."""
    start, end = _step_of(schedule.start, max_steps), _step_of(schedule.end, max_steps)
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


def _linear(schedule: Schedule, step: int, max_steps: int, logs: Sequence[Mapping[str, Any]]) -> float:
    progress = _progress(schedule, step, max_steps)
    return (1 - progress) * schedule.initial_coef + progress * schedule.final_coef


def _cosine(schedule: Schedule, step: int, max_steps: int, logs: Sequence[Mapping[str, Any]]) -> float:
    remaining = (1 + math.cos(math.pi * _progress(schedule, step, max_steps))) / 2
    return schedule.final_coef + remaining * (schedule.initial_coef - schedule.final_coef)


def _switch(schedule: Schedule, step: int, max_steps: int, logs: Sequence[Mapping[str, Any]]) -> float:
    return schedule.final_coef if schedule._has_switched(step, max_steps, logs) else schedule.initial_coef


SCHEDULES: dict[str, Callable[[Schedule, int, int, Sequence[Mapping[str, Any]]], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "switch": _switch,
    "plateau": _switch,
}
