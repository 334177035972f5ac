"""Runs against each other: `statistics` and `training` compute a comparison, `page` writes it."""
