"""Prepares training data: images and a table → shards and a manifest.

In running order, `job.prepare` reads the inputs, plans and writes the shards (`shards`), and writes
the manifest (`new_manifest`). `inputs` opens the source (`sources`, `table_files`, `table`), finds
the classes (`labels`), decides what the columns are (`columns`), and checks the rows
(`row_validation`, with `cell_text`, `number_parsing` and `given_splits`); `pixel_range` finds the
range of images over 8 bits. `dry_run` ends after the plan. `findings` describes problems for both,
for `inspect` and for `doctor`; `prepare_summary` prints the result.

Only `shards.shard_tasks` imports Ray, and nothing imports TensorFlow. Modules that call
`pyarrow.compute` switch off a check of pyright, which cannot see functions that are created at
import.
"""

from ray_jobs.prepare.job import prepare

__all__ = ["prepare"]
