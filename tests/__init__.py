"""Tests: unit, numerics (oracles), integration (ranks, Ray, MLflow), slurm, gpu; benchmarks apart."""
