"""Build a LongBlocks data set: long documents in, verified questions with their evidence out, onto the Hub.

    python scripts/build_longblocks.py --config recipes/longblocks/quickstart.yaml
    python scripts/build_longblocks.py --config recipes/longblocks/llm.yaml --stages sources deduplication --dry_run

Stopped at any moment, it goes on where it was when it is started again with the same configuration. Nothing is
uploaded without `--push`.
"""

import argparse
import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from dgrpo_trl.longblocks import STAGES, Builder, load_config


def log_to(folder: Path) -> None:
    """Log to the terminal, and in full to `build.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / "build.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=logging.INFO, handlers=[terminal, file], format="%(message)s")
    for name in ("httpx", "httpx2", "openai", "datasets", "filelock"):  # a line a request
        logging.getLogger(name).setLevel(logging.WARNING)


def print_summary(summary: dict) -> None:
    table = Table("stage", "kept", "dropped", "reasons", title=f"{summary['name']}: {summary['output_dir']}")
    for stage, counts in summary["stages"].items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items())
        table.add_row(stage, str(counts["kept"]), str(sum(counts["dropped"].values())), reasons)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see recipes/longblocks")
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="keys to change: seed=1 mixing.max_rows=10",
    )
    parser.add_argument("--output_dir", type=Path, help="folder of the build (default: outputs/longblocks/<name>)")
    parser.add_argument(
        "--stages", nargs="+", default=STAGES, choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}"
    )
    parser.add_argument("--shard", type=int, default=0, help="which share of the work this process does")
    parser.add_argument("--num_shards", type=int, default=1, help="number of processes that share the work")
    parser.add_argument(
        "--restart_from", choices=STAGES, metavar="STAGE", help="make this stage and those after it again"
    )
    parser.add_argument("--retry_failed", action="store_true", help="ask again what a server's failure left out")
    parser.add_argument(
        "--dry_run", action="store_true", help="check the configuration and the sources; build nothing"
    )
    parser.add_argument(
        "--push", action="store_true", help="upload to the Hub (`publish.repo_id`), private unless said"
    )
    args = parser.parse_args()
    try:
        config = load_config(args.config, args.set)
        output_dir = args.output_dir or Path("outputs/longblocks") / config.name
        log_to(output_dir / "logs")
        builder = Builder(config, output_dir, args.shard, args.num_shards)
        if args.dry_run:
            builder.check()
            return
        summary = builder.run(args.stages, args.restart_from, args.retry_failed, args.push)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped. Start again with the same command to go on.")
    print_summary(summary)


if __name__ == "__main__":
    main()
