"""See `dgrpo_trl/cli/evaluate.py`, or `python scripts/evaluate.py --help`."""

from dgrpo_trl.cli.evaluate import main


if __name__ == "__main__":
    main()
