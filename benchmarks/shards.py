"""Writes prepared data for benchmarks: many rows of a few distinct images."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_model.statistics import fit_numeric_statistics
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.data.manifest import ImageInfo, Manifest, Shard, SplitInfo
from ray_jobs.storage.folder import Folder

COLUMNS = ("row", "signal")
"""Index of the row in its split, and a number that determines the label, up to noise."""
_ROWS_PER_SHARD = 1024
_ROWS_PER_GROUP = 64


def write_shards(
    folder: Path, num_rows: dict[str, int], images: Sequence[bytes], size: int
) -> Manifest:
    """Write shards and manifest as `prepare` does, and return the manifest.

    Args:
        folder: Folder to create.
        num_rows: Rows of each split.
        images: JPEGs of `size` × `size` pixels, which the rows repeat.
        size: Side in pixels.
    """
    rng = np.random.default_rng(0)
    splits, statistics = {}, None
    for split, count in num_rows.items():
        numbers = np.stack([np.arange(count), rng.normal(size=count)], axis=1).astype(np.float32)
        label = (numbers[:, 1] + rng.normal(size=count) > 0).astype(np.int8)
        if split == "train":
            statistics = fit_numeric_statistics(numbers[:100_000], COLUMNS)
        shards = []
        for start in range(0, count, _ROWS_PER_SHARD):
            rows = range(start, min(start + _ROWS_PER_SHARD, count))
            columns = {
                "key": [f"{split}-{row}" for row in rows],
                "image": [images[row % len(images)] for row in rows],
                **{name: numbers[rows, i] for i, name in enumerate(COLUMNS)},
                "label": label[rows],
            }
            shards.append(_write_shard(folder, f"{split}/part-{start:09d}.parquet", columns))
        counts = (int((label == 0).sum()), int((label == 1).sum()))
        splits[split] = SplitInfo(num_rows=count, class_counts=counts, shards=tuple(shards))
    manifest = Manifest(
        prepare=PrepareSpec(image_size=size, output=str(folder)),
        seed=0,
        image=ImageInfo(height=size, width=size),
        numeric_columns=COLUMNS,
        negative_label="0",
        positive_label="1",
        splits=splits,
        cuts=None,
        statistics=statistics,
        quarantine={},
    )
    manifest.write(Folder(folder))
    return manifest


def _write_shard(folder: Path, name: str, columns: dict) -> Shard:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, path, row_group_size=_ROWS_PER_GROUP, **options)
    starts = range(0, table.num_rows, _ROWS_PER_GROUP)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(
        path=name,
        num_rows=table.num_rows,
        row_groups=tuple(min(_ROWS_PER_GROUP, table.num_rows - start) for start in starts),
        num_bytes=path.stat().st_size,
        sha256=digest,
    )
