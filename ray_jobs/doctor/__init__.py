"""Runs the checks as a job of their own.

Input: a specification. Output: findings, printed and returned.
"""

from ray_jobs.doctor.job import examine

__all__ = ["examine"]
