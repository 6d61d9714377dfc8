"""How to train: recipes, FFCV data, the distributed loop and its stages, Ray Train, MLflow."""
