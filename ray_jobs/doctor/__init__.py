"""The checks as a job of their own."""

from ray_jobs.doctor.job import examine

__all__ = ["examine"]
