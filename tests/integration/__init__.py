"""Several processes: ranks, Ray, MLflow, kill and resume."""
