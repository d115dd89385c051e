"""The one training loop: models, batches, fit, checkpoints, metrics, export. Knows neither Ray nor MLflow."""
