"""Prepares training data: images and a table → shards and a manifest.

In running order, `job.prepare` opens the source (`sources`, `table`, with `cell_text`), finds the
classes (`labels`), checks the rows (`row_validation`, with `number_parsing`), plans splits and
shards (`shard_plan`, `splits`), and writes the shards in Ray tasks (`shard_writer`, `journal`).
Only `job` imports Ray, and nothing imports TensorFlow. Modules that call `pyarrow.compute` switch
off a check of pyright, which cannot see functions that are created at import.
"""

from ray_jobs.prepare.job import prepare

__all__ = ["prepare"]
