"""A trained run and rows → Parquet."""

from ray_jobs.predict.job import predict

__all__ = ["predict"]
