"""Shards → a trained run."""

from ray_jobs.train.job import fit

__all__ = ["fit"]
