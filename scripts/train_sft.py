"""See `dgrpo_trl/cli/train_sft.py`, or `python scripts/train_sft.py --help`."""

from dgrpo_trl.cli.train_sft import main


if __name__ == "__main__":
    main()
