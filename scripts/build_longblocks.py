"""See `dgrpo_trl/cli/build_longblocks.py`, or `python scripts/build_longblocks.py --help`."""

from dgrpo_trl.cli.build_longblocks import main


if __name__ == "__main__":
    main()
