"""See `dgrpo_trl/cli/compare.py`, or `python scripts/compare.py --help`."""

from dgrpo_trl.cli.compare import main


if __name__ == "__main__":
    main()
