"""What a run shows while it works: a bar with rate and time left, and what was kept and dropped, by reason."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from ..records import Drop


logger = logging.getLogger(__name__)

# Without a terminal, one line per minute goes to the log instead
SECONDS_BETWEEN_LINES = 60
SECONDS_BETWEEN_UPDATES = 0.1


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


class Progress:
    """The bar of the stage that is running. A context manager; entered once for all stages of a run."""

    def __init__(self) -> None:
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._num_kept = self._num_new = 0
        self._reasons: Counter[str] = Counter()
        self._started = self._last_line = self._last_update = time.monotonic()

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()
        self._bar.stop()

    def start(self, stage: str, total: int | None, num_done: int = 0) -> None:
        """Begins a stage of `total` items, unknown if `None`, of which earlier runs have done some."""
        self.finish()
        self._stage, self._num_kept, self._num_new, self._reasons = stage, 0, 0, Counter()
        self._started = self._last_line = self._last_update = time.monotonic()
        self._task = self._bar.add_task(stage, total=total, completed=num_done, status="")

    def advance(self, num_kept: int, drops: Iterable[Drop], status: Callable[[], str] = str) -> None:
        """Counts one item of the stage: what was kept of it and what was left out; `status` says more, when shown."""
        self._num_kept += num_kept
        self._num_new += 1
        self._reasons.update(drop.reason for drop in drops)
        now = time.monotonic()
        if now - self._last_update > SECONDS_BETWEEN_UPDATES:
            self._last_update = now
            self._update(status())
        if not self._bar.console.is_terminal and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            task = self._bar.tasks[-1]
            logger.info(f"{self._stage}: {task.completed:.0f} of {task.total or '?'}, {self._counts()} {status()}")

    def _update(self, status: str = "") -> None:
        if self._task is None:
            return
        self._bar.update(self._task, advance=self._num_new, status=f"{self._counts()} {status}")
        self._num_new = 0

    def finish(self) -> None:
        """Ends the stage, with a line in the log."""
        if self._task is not None:
            self._update()
            seconds = time.monotonic() - self._started
            logger.info(f"{self._stage}: {self._counts()} in {seconds:.1f} s")
        self._task = None

    def _counts(self) -> str:
        dropped = ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common(4))
        rest = len(self._reasons) - 4
        more = f" and {rest} other reasons" if rest > 0 else ""
        return f"kept {self._num_kept}" + (f", dropped {self._reasons.total()} ({dropped}{more})" if dropped else "")
