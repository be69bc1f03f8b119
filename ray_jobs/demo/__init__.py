"""Runs the whole pipeline on generated data: job.py runs the verbs, synthetic.py generates it."""

from ray_jobs.demo.job import demo

__all__ = ["demo"]
