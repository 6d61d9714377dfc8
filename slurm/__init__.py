"""Where it runs: submits any command, or a Ray cluster with a command in it, to SLURM."""
