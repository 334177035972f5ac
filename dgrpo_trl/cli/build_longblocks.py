"""Builds a LongBlocks data set: long documents in, verified questions with their evidence out, onto the Hub.

    python scripts/build_longblocks.py --config recipes/longblocks/quickstart.yaml
    python scripts/build_longblocks.py --config recipes/longblocks/llm.yaml --stages sources deduplication --dry_run
    python scripts/build_longblocks.py --config recipes/longblocks/quickstart.yaml --mixing.max_rows 10

Every key of the YAML file is a flag too: `--tokenizer PATH`, `--questions.seed 1`, `--sources.0.path FILE`. Stopped
at any moment, the build resumes when it is started again with the same configuration. Nothing is uploaded without
`--push`.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from transformers.hf_argparser import HfArg

from ..longblocks import STAGES, BuildConfig, Builder, load_config
from .arguments import CommandLine, exit_with_message, parse_arguments, split_command_line


@dataclass
class BuildArguments:
    """What to do of a build, and where."""

    output_dir: str | None = HfArg(default=None, help="Folder of the build; by default outputs/longblocks/NAME.")
    stages: list[str] = HfArg(
        default_factory=lambda: list(STAGES), help="Stages to run.", metadata={"choices": STAGES, "metavar": "STAGE"}
    )
    shard: int = HfArg(default=0, help="Which share of the work this process does.")
    num_shards: int = HfArg(default=1, help="Number of processes that share the work.")
    restart_from: str | None = HfArg(
        default=None, help="Make this stage and those after it again.", metadata={"choices": STAGES}
    )
    retry_failed: bool = HfArg(default=False, help="Ask again for what failures of a server left out.")
    dry_run: bool = HfArg(default=False, help="Check the configuration and the sources; build nothing.")
    push: bool = HfArg(default=False, help="Upload to the Hub (`publish.repo_id`), private unless `publish` says not.")


def split_build_command_line(arguments: Sequence[str] | None) -> CommandLine:
    """The parts of a command line, whose flags may be keys of the configuration."""
    return split_command_line(arguments, BuildConfig.model_fields)


def read_config(command: CommandLine) -> tuple[BuildConfig, Path]:
    """The configuration, and the folder where it is built by default."""
    config = load_config(command.required_config, command.overrides)
    return config, Path("outputs/longblocks") / config.name


def log_to(folder: Path) -> None:
    """Logs to the terminal, and in full to `build.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / "build.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=logging.INFO, handlers=[terminal, file], format="%(message)s")
    for name in ("httpx", "httpx2", "openai", "datasets", "filelock"):  # one line per request
        logging.getLogger(name).setLevel(logging.WARNING)


def print_summary(summary: dict[str, Any]) -> None:
    table = Table("stage", "kept", "dropped", "reasons", title=f"{summary['name']}: {summary['output_dir']}")
    for stage, counts in summary["stages"].items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items())
        table.add_row(stage, str(counts["kept"]), str(sum(counts["dropped"].values())), reasons)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        with exit_with_message(ValueError, RuntimeError, OSError, ImportError):
            command = split_build_command_line(arguments)
            (args,) = parse_arguments((BuildArguments,), command.flags, __doc__, BuildConfig.model_fields)
            config, output_dir = read_config(command)
            output_dir = Path(args.output_dir or output_dir)
            log_to(output_dir / "logs")
            builder = Builder(config, output_dir, args.shard, args.num_shards)
            if args.dry_run:
                return builder.check()
            print_summary(builder.run(args.stages, args.restart_from, args.retry_failed, args.push))
    except KeyboardInterrupt:
        sys.exit("Stopped. Run the same command again to resume.")
