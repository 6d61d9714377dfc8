"""What a CUDA device may do differently. Skipped without one, but for checks of `sbs` that run on the CPU, too."""
