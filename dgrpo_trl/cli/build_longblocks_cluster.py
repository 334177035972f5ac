"""Builds a LongBlocks data set with many processes, on one machine or under Slurm, by datatrove's executors.

    python scripts/build_longblocks_cluster.py --config recipes/longblocks/llm.yaml --tasks 8
    python scripts/build_longblocks_cluster.py --config recipes/longblocks/llm.yaml --tasks 64 \
        --executor slurm --partition cpu --time 24:00:00

Keys of the YAML file are flags too, as for build_longblocks. Each task works on its share of the sources, and then of
the parts; the stages that see all parts at once run as one task between them. Run it again after a failure: what is
done is not done again. On Slurm the output folder must be on a file system that all nodes share, and each job starts
when the one before has succeeded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from ..longblocks import STAGES, BuildConfig, Builder, load_config
from ..longblocks.builder.config import GLOBAL_STAGES
from .arguments import exit_with_message, parse_arguments
from .build_longblocks import read_config, split_build_command_line


@dataclass
class ClusterArguments:
    """How the work is shared out."""

    output_dir: str | None = HfArg(default=None, help="Folder of the build; by default outputs/longblocks/NAME.")
    tasks: int = HfArg(default=8, help="Number of shares.")
    workers: int = HfArg(default=-1, help="Shares at a time; -1 for all.")
    executor: str = HfArg(
        default="local", help="Processes, or Slurm's jobs.", metadata={"choices": ["local", "slurm"]}
    )
    partition: str | None = HfArg(default=None, help="Slurm's partition.")
    time: str = HfArg(default="24:00:00", help="Slurm's time limit of a task.")
    cpus_per_task: int = HfArg(default=2, help="CPUs of one of Slurm's tasks.")
    mem_per_cpu_gb: int = HfArg(default=4, help="Memory per CPU under Slurm, in GB.")
    venv_path: str | None = HfArg(default=None, help="Environment that Slurm's jobs activate.")

    def __post_init__(self):
        if self.executor == "slurm" and self.partition is None:
            raise ValueError("`partition` is missing. Slurm needs to know where jobs run. Set it with `--partition`.")


def run_share(
    data: Any,
    rank: int,
    world_size: int,
    config: str,
    overrides: dict[str, Any],
    output_dir: str,
    stages: list[str],
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


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_with_message(ValueError):
        command = split_build_command_line(arguments)
        (args,) = parse_arguments((ClusterArguments,), command.flags, __doc__, BuildConfig.model_fields)
        config, output_dir = read_config(command)  # a wrong configuration is found here, not in a job
    output_dir = Path(args.output_dir or output_dir).absolute()

    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor  # of the extra `cluster`

    executor: Any = None
    for number, stages in enumerate(phases()):
        share = partial(
            run_share,
            config=str(Path(command.required_config).absolute()),
            overrides=command.overrides,
            output_dir=str(output_dir),
            stages=stages,
        )
        common = {
            "pipeline": [share],
            "tasks": 1 if stages[0] in GLOBAL_STAGES else args.tasks,
            "workers": args.workers,
            "logging_dir": str(output_dir / "logs" / f"{number}-{stages[0]}"),
            "depends": executor,
            "skip_completed": False,  # the builder knows what is done
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
