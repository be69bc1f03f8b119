"""Runs the whole pipeline on generated data: job.py runs the verbs, synthetic.py makes the data."""

from ray_jobs.demo.job import demo

__all__ = ["demo"]
