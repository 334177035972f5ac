"""Compares evaluated runs: scores, differences with intervals, training curves, as JSON, Markdown and one HTML page.

    python scripts/compare.py --runs outputs/eval/sft outputs/eval/dgrpo
    python scripts/compare.py --groups sft=outputs/eval/sft-0,outputs/eval/sft-1 \
        dgrpo=outputs/eval/dgrpo-0,outputs/eval/dgrpo-1 --logs dgrpo=outputs/dgrpo-0,outputs/dgrpo-1
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from ..evaluation.compare import Run, compare_runs, compare_training, read_run, to_markdown, write_comparison
from .arguments import exit_with_message, parse_arguments


@dataclass
class ComparisonArguments:
    """What to compare, and how."""

    runs: list[str] = HfArg(
        default_factory=list, help="Folders with results.json, or such files. A run is named as its evaluation was."
    )
    groups: list[str] = HfArg(
        default_factory=list, help="Seeds of a method each, as NAME=RUN,RUN.", metadata={"metavar": "NAME=RUN,RUN"}
    )
    baseline: str | None = HfArg(
        default=None, help="Run or group that the others are compared with; by default the first."
    )
    logs: list[str] = HfArg(
        default_factory=list,
        help="Output folders of trainings, as NAME=FOLDER,FOLDER.",
        metadata={"metavar": "NAME=FOLDER,FOLDER"},
    )
    reach: list[float] = HfArg(default_factory=list, help="Values of reward or score to count the steps to.")
    output_dir: str = HfArg(default="outputs/comparison", help="Folder to write to.")
    title: str = HfArg(default="Comparison of runs", help="Heading of the page.")
    num_resamples: int = HfArg(default=10_000, help="Bootstrap resamples.")
    seed: int = HfArg(default=0, help="Seed of the bootstrap.")

    def __post_init__(self):
        if not (self.runs or self.groups or self.logs):
            raise ValueError("There is nothing to compare. Give `--runs`, `--groups` or `--logs`.")


def named_folders(texts: list[str]) -> dict[str, list[str]]:
    """`NAME=FOLDER,FOLDER` -> folders by name."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, _, folders = text.partition("=")
        if not name or not all(folders.split(",")):
            raise ValueError(f"{text!r} does not say which folders belong to a name. Write NAME=FOLDER[,FOLDER,...].")
        if name in found:
            raise ValueError(f"The name {name!r} is given twice. Figures are shown by name. Write NAME=FOLDER,FOLDER.")
        found[name] = folders.split(",")
    return found


def read_groups(args: ComparisonArguments) -> dict[str, list[Run]]:
    """Runs by the name under which they are shown; single ones are groups of one."""
    groups: dict[str, list[Run]] = {}
    for run in map(read_run, args.runs):
        if run.name in groups:
            raise ValueError(f"Two runs are named {run.name!r} ({run.path}). Give one as `--groups NAME=RUN`.")
        groups[run.name] = [run]
    for name, folders in named_folders(args.groups).items():
        if name in groups:
            raise ValueError(f"A run is named {name!r} too. Figures are shown by name. Give the group another.")
        groups[name] = [read_run(folder) for folder in folders]
    return groups


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_with_message(ValueError, OSError):
        words = sys.argv[1:] if arguments is None else list(arguments)
        (args,) = parse_arguments((ComparisonArguments,), words, __doc__)
        groups = read_groups(args)
        comparison = compare_runs(groups, args.baseline, args.num_resamples, args.seed) if groups else {}
        if args.logs:
            comparison["training"] = compare_training(named_folders(args.logs), args.reach)
        command = shlex.join(["python", "scripts/compare.py", *words])
        page = write_comparison(Path(args.output_dir), comparison, args.title, command)
        print(to_markdown(comparison, args.title))
        print(f"Page: {page.resolve()}")
