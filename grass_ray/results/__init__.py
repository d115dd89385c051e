"""WHAT came out: run records, MLflow tracking, leaderboard, statistics, plots. The only room that imports mlflow."""
