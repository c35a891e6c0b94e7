"""Tools over checkpoints on disk; no process group, no GPU."""
