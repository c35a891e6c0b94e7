"""Starting runs: on this machine, on Slurm, and many of them as a sweep. Works on a login node: imports no torch."""
