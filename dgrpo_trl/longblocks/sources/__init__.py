"""Sources of documents: their configuration, and how files and rows become documents; see [`reading`]."""
