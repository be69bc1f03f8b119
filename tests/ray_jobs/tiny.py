"""Writes prepared data of a few rows as `prepare` does, with real shards and JPEGs."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mm_model.backbones.tokenizer import fit_words
from mm_model.statistics import fit_numeric_statistics
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.data.batch import ORIGINAL_PIXELS
from ray_jobs.data.manifest import ImageInfo, Manifest, Shard, SplitInfo, read_manifest
from ray_jobs.storage.folder import Folder

COLUMNS = ("alpha", "beta", "row")
TEXT_COLUMN = "note"
ROW = COLUMNS.index("row")
"""Column with each row's index in its split, by which tests identify rows."""


def write_prepared(
    folder: Path,
    num_rows: dict[str, int],
    *,
    size: int = 16,
    rows_per_group: int = 5,
    rows_per_shard: int = 20,
    seed: int = 0,
    weights: Sequence[float] = (),
    repeat: bool = False,
    texts: bool = False,
) -> Manifest:
    """Write shards and a manifest; one number and the colour of the image depend on the label.

    Args:
        folder: Folder to write.
        num_rows: Rows of each split.
        size: Side of the images.
        rows_per_group: Rows of a row group.
        rows_per_shard: Rows of a shard.
        seed: Seed of the rows.
        weights: Weights of the rows of each split, repeated until every row has one.
        repeat: Whether to repeat each row as many times as its weight says, instead of weighting.
        texts: Whether the rows have texts, of which some are missing.
    """
    rng = np.random.default_rng(seed)
    splits, statistics, text_words = {}, None, ()
    for split, count in num_rows.items():
        label = (np.arange(count) % 3 == 0).astype(np.int8)
        numbers = rng.normal(size=(count, len(COLUMNS))).astype(np.float32)
        numbers[:, 0] += 1.5 * label
        numbers[rng.random((count, len(COLUMNS))) < 0.1] = np.nan
        numbers[:, ROW] = np.arange(count)
        colour = rng.integers(60, 120, (count, 1, 1, 3)) + 60 * label[:, None, None, None]
        pixels = (colour + rng.integers(-20, 20, (count, size, size, 3))).astype(np.uint8)
        columns = {n: pa.array(numbers[:, i], from_pandas=True) for i, n in enumerate(COLUMNS)}
        keys, images = [f"{split}-{i}" for i in range(count)], [jpeg(image) for image in pixels]
        table = pa.table({"key": keys, "image": images, **columns, "label": label})
        table = table.append_column(ORIGINAL_PIXELS, pa.array(100 * np.arange(count), pa.int32()))
        weight, sums = np.resize(np.asarray(weights or [1], np.float32), count), None
        if repeat:
            table = table.take(np.repeat(np.arange(count), weight.astype(int)))
        elif weights:
            table = table.append_column("weight", pa.array(weight))
            sums = tuple(np.bincount(label, weight, minlength=2).tolist())
        label = table["label"].to_numpy()
        if texts:
            words = np.where(label[:, None], ["red", "hot"], ["blue", "cold"])
            notes = [None if i % 7 == 0 else f"a {rng.choice(w)} part" for i, w in enumerate(words)]
            table = table.append_column(TEXT_COLUMN, pa.array(notes, pa.string()))
            if split == "train":
                text_words = fit_words(notes)
        if split == "train":
            statistics = fit_numeric_statistics(numbers, COLUMNS)
        shards = [
            _write_shard(folder, f"{split}/part-{n:05d}.parquet", part, rows_per_group)
            for n, start in enumerate(range(0, len(label), rows_per_shard))
            for part in [table.slice(start, rows_per_shard)]
        ]
        splits[split] = SplitInfo(
            num_rows=len(label),
            class_weights=sums,
            class_counts=tuple(np.bincount(label, minlength=2).tolist()),
            shards=tuple(shards),
        )
    manifest = Manifest(
        prepare=PrepareSpec(
            image_size=size,
            output=str(folder),
            weight_column="weight" if weights and not repeat else None,
        ),
        seed=seed,
        image=ImageInfo(height=size, width=size),
        numeric_columns=COLUMNS,
        text_columns=(TEXT_COLUMN,) if texts else (),
        text_words=text_words,
        negative_label="0",
        positive_label="1",
        splits=splits,
        cuts=None,
        statistics=statistics,
        quarantine={},
    )
    manifest.write(Folder(folder))
    return read_manifest(Folder(folder))


def with_image(table: pa.Table, row: int, content: bytes) -> pa.Table:
    """Return a table with the stored image of one row replaced."""
    images = table.column("image").to_pylist()
    images[row] = content
    return table.set_column(table.column_names.index("image"), "image", pa.array(images))


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=quality)
    return content.getvalue()


def _write_shard(folder: Path, name: str, table: pa.Table, rows_per_group: int) -> Shard:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_per_group)
    content, metadata = path.read_bytes(), pq.read_metadata(path)
    return Shard(
        path=name,
        num_rows=table.num_rows,
        row_groups=tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)),
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
