"""Jobs at a cluster: what is sent, how its server is spoken to, how a job is followed."""

from ray_jobs.submit.job import submit

__all__ = ["submit"]
