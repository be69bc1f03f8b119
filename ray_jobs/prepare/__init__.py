"""Images and a table → shards and a manifest."""

from ray_jobs.prepare.job import prepare

__all__ = ["prepare"]
