"""See `dgrpo_trl/cli/train_dgrpo.py`, or `python scripts/train_dgrpo.py --help`."""

from dgrpo_trl.cli.train_dgrpo import main


if __name__ == "__main__":
    main()
