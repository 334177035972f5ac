"""See `dgrpo_trl/cli/build_longblocks_cluster.py`, or `python scripts/build_longblocks_cluster.py --help`."""

from dgrpo_trl.cli.build_longblocks_cluster import main


if __name__ == "__main__":
    main()
