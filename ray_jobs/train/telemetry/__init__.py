"""History, console, MLflow, profiler."""
