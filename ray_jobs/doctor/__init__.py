"""Runs the checks as a separate job.

Input: a specification. Output: findings, printed and returned.
"""

from ray_jobs.doctor.job import examine

__all__ = ["examine"]
