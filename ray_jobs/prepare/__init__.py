"""Prepares training data: images and a table → shards and a manifest.

In running order, `job.prepare` opens the source (`sources`, `table_files`, `table`), finds the
classes (`labels`), decides what the columns are (`columns`), checks the rows (`row_validation`,
with `cell_text`, `number_parsing` and `given_splits`), finds the range of images over 8 bits
(`pixel_range`), plans splits and shards (`shard_plan`, `splits`), and writes the shards in Ray
tasks (`shard_tasks`, `shard_writer`). A dry run ends after the plan; `findings` describes problems
for it, `inspect` and `doctor`. Only `shard_tasks` imports Ray, and nothing imports TensorFlow.
Modules that call `pyarrow.compute` switch off a check of pyright, which cannot see functions that
are created at import.
"""

from ray_jobs.prepare.job import prepare

__all__ = ["prepare"]
