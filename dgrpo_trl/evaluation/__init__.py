"""Evaluation: `runs` is the way in, `compare` sets runs against each other. Nothing here imports the trainer."""
