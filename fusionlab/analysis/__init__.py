"""Parameters, FLOPs and memory of a config, allocating nothing."""
