"""Against a real SLURM on this machine."""
