"""Build a LongBlocks data set with many processes, on one machine or under Slurm, by datatrove's executors.

    python scripts/build_longblocks_cluster.py --config recipes/longblocks/llm.yaml --tasks 8
    python scripts/build_longblocks_cluster.py --config recipes/longblocks/llm.yaml --tasks 64 \
        --executor slurm --partition cpu --time 24:00:00

Each task works on its share of the sources, and then of the parts; the stages that see all parts at once run as one
task between them. Run it again after a failure: what is done is not done again. On Slurm the output folder must be on
a file system that all nodes share, and each job starts when the one before has succeeded.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from dgrpo_trl.longblocks import STAGES, Builder, load_config
from dgrpo_trl.longblocks.builder.builder import GLOBAL_STAGES


def run_share(
    data: Any, rank: int, world_size: int, config: str, overrides: list[str], output_dir: str, stages: list[str]
) -> None:
    """One task: what datatrove calls with its rank, on whatever machine."""
    Builder(load_config(config, overrides), Path(output_dir), rank, world_size).run(stages)


def phases() -> list[list[str]]:
    """The stages, in runs of those that can be shared out and those that cannot."""
    runs: list[list[str]] = []
    for stage in STAGES:
        if runs and (stage in GLOBAL_STAGES) == (runs[-1][0] in GLOBAL_STAGES):
            runs[-1].append(stage)
        else:
            runs.append([stage])
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see recipes/longblocks")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="keys to change")
    parser.add_argument("--output_dir", help="folder of the build (default: outputs/longblocks/<name>)")
    parser.add_argument("--tasks", type=int, default=8, help="number of shares")
    parser.add_argument("--workers", type=int, default=-1, help="shares at a time (default: all)")
    parser.add_argument("--executor", choices=("local", "slurm"), default="local")
    parser.add_argument("--partition", help="Slurm partition")
    parser.add_argument("--time", default="24:00:00", help="Slurm time limit of a task")
    parser.add_argument("--cpus_per_task", type=int, default=2)
    parser.add_argument("--mem_per_cpu_gb", type=int, default=4)
    parser.add_argument("--venv_path", help="environment that Slurm's jobs activate")
    args = parser.parse_args()
    if args.executor == "slurm" and args.partition is None:
        parser.error("--executor slurm needs a --partition")
    config = load_config(args.config, args.set)  # a wrong one is seen here, not in a job
    output_dir = Path(args.output_dir or f"outputs/longblocks/{config.name}").absolute()

    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    executor = None
    for number, stages in enumerate(phases()):
        share = partial(
            run_share,
            config=str(Path(args.config).absolute()),
            overrides=args.set,
            output_dir=str(output_dir),
            stages=stages,
        )
        common = {
            "pipeline": [share],
            "tasks": 1 if stages[0] in GLOBAL_STAGES else args.tasks,
            "workers": args.workers,
            "logging_dir": str(output_dir / "logs" / f"{number}-{stages[0]}"),
            "depends": executor,
            "skip_completed": False,  # the builder knows better what is done
        }
        if args.executor == "local":
            executor = LocalPipelineExecutor(**common)
        else:
            executor = SlurmPipelineExecutor(
                **common,
                job_name=f"{config.name}-{stages[0]}",
                partition=args.partition,
                time=args.time,
                cpus_per_task=args.cpus_per_task,
                mem_per_cpu_gb=args.mem_per_cpu_gb,
                venv_path=args.venv_path,
            )
    executor.run()


if __name__ == "__main__":
    main()
