"""Splits the rows and writes them as shards.

`shard_plan` (with `splits`) decides the split and shard of each row, `shard_writer` writes a shard,
and `shard_tasks` writes all of them in Ray tasks.
"""
