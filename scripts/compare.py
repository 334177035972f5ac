"""Compare evaluated runs: scores, differences with intervals, curves of training, as JSON, Markdown and one HTML page.

    python scripts/compare.py outputs/eval/sft outputs/eval/dgrpo
    python scripts/compare.py --group sft=outputs/eval/sft-0,outputs/eval/sft-1 \
        --group dgrpo=outputs/eval/dgrpo-0,outputs/eval/dgrpo-1 --log dgrpo=outputs/dgrpo-0,outputs/dgrpo-1
"""

import argparse
import shlex
import sys
from pathlib import Path

from dgrpo_trl.evaluation.compare.page import to_markdown, write_comparison
from dgrpo_trl.evaluation.compare.statistics import compare_runs, compare_training, read_run


def named_folders(texts: list[str]) -> dict[str, list[str]]:
    """`NAME=FOLDER,FOLDER` -> folders by name.

    Raises:
        ValueError: if a text has another form, or a name comes twice.
    """
    found = {}
    for text in texts:
        name, _, folders = text.partition("=")
        if not name or not all(folders.split(",")):
            raise ValueError(f"{text!r} does not say which folders belong to a name. Write NAME=FOLDER[,FOLDER,...].")
        if name in found:
            raise ValueError(f"The name {name!r} is given twice. Figures are shown by name. Write NAME=FOLDER,FOLDER.")
        found[name] = folders.split(",")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder with results.json, or the file")
    parser.add_argument("--group", action="append", default=[], metavar="NAME=RUN,RUN", help="the seeds of one method")
    parser.add_argument(
        "--baseline", help="name of the run or group that others are compared with; default: the first"
    )
    parser.add_argument(
        *("--log", "--logs"),
        action="append",
        default=[],
        metavar="NAME=FOLDER,FOLDER",
        help="output folders of trainings",
    )
    parser.add_argument(
        *("--reach",), type=float, nargs="+", default=[], help="values of reward or score to count the steps to"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/comparison"), help="folder to write to")
    parser.add_argument("--title", default="Comparison of runs", help="heading of the page")
    parser.add_argument("--num_resamples", type=int, default=10_000, help="bootstrap resamples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    args = parser.parse_args(arguments)
    if not (args.runs or args.group or args.log):
        parser.error("nothing to compare: give a RUN, a --group or a --log")

    groups = {}
    for run in map(read_run, args.runs):
        if run.name in groups:
            parser.error(f"two runs are named {run.name!r} ({run.path}): give one as --group NAME=RUN")
        groups[run.name] = [run]
    for name, folders in named_folders(args.group).items():
        if name in groups:
            parser.error(f"a run is named {name!r} too: give the group another name")
        groups[name] = [read_run(folder) for folder in folders]
    comparison = compare_runs(groups, args.baseline, args.num_resamples, args.seed) if groups else {}
    if args.log:
        comparison["training"] = compare_training(named_folders(args.log), args.reach)
    command = shlex.join(["python", "scripts/compare.py", *(sys.argv[1:] if arguments is None else arguments)])
    page = write_comparison(args.output_dir, comparison, args.title, command)
    print(to_markdown(comparison, args.title))
    print(f"Page: {page.resolve()}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
