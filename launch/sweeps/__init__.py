"""Many runs that differ in some keys: which they are, running them here or on Slurm, and comparing them."""
