"""A trained run and a split → metrics and plots."""

from ray_jobs.evaluate.job import evaluate

__all__ = ["evaluate"]
