"""What `gpu_check.py` checks: a module for each subject, and `report`, which runs the checks and tells how they went.

A check is a function that takes a device, `"cuda"` or, with small sizes, `"cpu"`. It returns its figures, or raises
[`Failed`], or [`Skipped`] where something that it needs is not there. Any other error is a failure, too.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


SCRIPTS = Path(__file__).resolve().parent.parent
if str(SCRIPTS / "benchmarks") not in sys.path:
    sys.path.append(str(SCRIPTS / "benchmarks"))  # they import each other by their bare names

Figures = dict[str, Any]


class Failed(Exception):
    """A figure is not what it must be."""


class Skipped(Exception):
    """What a check needs is not there."""


@dataclass(frozen=True)
class Check:
    """A line of the table.

    Args:
        run (`Callable`):
            From a device, the figures.
        seconds (`int`):
            What it may take; then it is ended, and has failed.
    """

    run: Callable[[str], Figures]
    seconds: int


def require(is_met: bool, message: str) -> None:
    """Raises [`Failed`] with `message` unless `is_met`."""
    if not is_met:
        raise Failed(message)
