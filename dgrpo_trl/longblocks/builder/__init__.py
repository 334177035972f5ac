"""Building LongBlocks: stages that can be run alone and resume after any crash; see [`builder`]."""
