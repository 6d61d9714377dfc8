"""The parts of `scripts/gpu/run.py`: each is a program of its own, see `scripts.gpu.part`."""
