"""Writes run folders as `train` does, with a tiny model."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_model.spec import ImageSpec, ModelSpec, NumericSpec
from ray_jobs.config.prepare_spec import Split
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.images import decode_stored
from ray_jobs.data.manifest import Manifest
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.tiny import with_image

THRESHOLD = 0.45


def write_run(folder: Path, manifest: Manifest, image: str = "tiny", numeric: str = "mlp") -> Any:
    """Write a run folder and return its model, which predicts a different probability per row."""
    import keras

    from mm_model import build_model
    from tests.mm_model.examples import with_random_heads

    spec = ModelSpec(
        image=ImageSpec(kind=image, weights=None, units=8),
        numeric=NumericSpec(kind=numeric, units=(8,)),
    )
    size = manifest.image.height
    keras.utils.set_random_seed(1)
    model = build_model(
        spec,
        manifest.statistics,
        (size, size, 3),
        None if manifest.statistics else (0,),
        manifest.vocabularies,
    )
    with_random_heads(model)
    model.calibration.set([2.0], -0.3)
    manifest.write(Folder(folder))
    (folder / "model").mkdir()
    model.save(folder / "model/model.keras")
    Folder(folder).write_json("summary.json", {"decision_threshold": THRESHOLD})
    return model


def train_here(spec: RunSpec, manifest: Manifest) -> None:
    """Train a run in this process, without Ray."""
    from ray_jobs.cluster.strategy import WorkerContext
    from ray_jobs.train.finalize import finalize
    from ray_jobs.train.job import begin_run, run_folder
    from ray_jobs.train.loop import Loop

    begin_run(spec, manifest, run_folder(spec))
    loop = Loop(spec, manifest, WorkerContext())
    finalize(loop, loop.run(), run_folder(spec), train_s=1.0)


def stored_rows(folder: Path, manifest: Manifest, split: Split) -> pa.Table:
    """Return the stored rows of a split."""
    shards = manifest.splits[split].shards
    return pa.concat_tables(pq.read_table(folder / shard.path) for shard in shards)


def probabilities(model: Any, rows: pa.Table, manifest: Manifest) -> np.ndarray:
    """Return the probabilities of stored rows, computed in this process in one batch."""
    images = np.stack([decode_stored(content) for content in rows["image"].to_pylist()])
    columns = [rows[name].to_numpy().astype(np.float32) for name in manifest.numeric_columns]
    inputs = {"image": images, "numeric": np.stack(columns, axis=1)}
    return np.asarray(model(inputs, training=False))[:, 0].astype(np.float64)


def damage_image(folder: Path, manifest: Manifest, split: Split, shard: int, row: int) -> Manifest:
    """Truncate a stored image in a valid Parquet file, and return the new manifest."""
    info = manifest.splits[split]
    path = folder / info.shards[shard].path
    table = pq.read_table(path)
    table = with_image(table, row, table["image"][row].as_py()[:40])
    pq.write_table(table, path, row_group_size=info.shards[shard].row_groups[0])
    shards = list(info.shards)
    shards[shard] = shards[shard].model_copy(update={"num_bytes": path.stat().st_size})
    splits = {**manifest.splits, split: info.model_copy(update={"shards": tuple(shards)})}
    damaged = manifest.model_copy(update={"splits": splits})
    damaged.write(Folder(folder))
    return damaged
