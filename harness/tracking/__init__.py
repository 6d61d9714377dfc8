"""MLflow as a view of the run directories. Importing this package does not import mlflow; using a `Store` does."""
