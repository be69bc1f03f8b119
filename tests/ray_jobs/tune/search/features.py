"""Runs with a frozen backbone, and what their stored features contain."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.config.prepare_spec import Split
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.batch import FEATURES
from ray_jobs.data.decoder import RowDecoder
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.scenarios import PLAIN

SIZE = 24
COUNTS = {"train": 53, "validation": 22, "test": 3}
FROZEN = {**PLAIN["image"], "trainable": False}


def spec_of(folder: Path, **changes: Any) -> RunSpec:
    """Return a training with a frozen backbone on the prepared data in a folder."""
    spec = RunSpec.model_validate(
        {
            "run": {"storage_path": str(folder / "runs"), "seed": 3},
            "data": {"prepared": str(folder / "prepared")},
            "model": {**PLAIN, "image": FROZEN, "text": {"missing_dropout": 0}},
            "train": {"global_batch_size": 8, "epochs": 4, "learning_rate": 3e-3},
        }
    )
    return spec.overlay({path.replace("__", "."): value for path, value in changes.items()})


def rows_of(folder: Folder, manifest: Manifest, split: Split) -> pa.Table:
    return pa.concat_tables([pq.read_table(folder.locate(s.path)) for s in shards(manifest, split)])


def shards(manifest: Manifest, split: Split) -> Any:
    return manifest.splits[split].shards


def hashes(folder: Folder) -> dict[str, tuple[str, int]]:
    """Return the content hash and the modification time of every file."""
    files = {name: Path(folder.locate(name)) for name in folder.names()}
    return {
        name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for name, path in files.items()
    }


def features_in(folder: Folder, split: Split) -> np.ndarray:
    """Return the features of a split as in a batch."""
    manifest = read_manifest(folder)
    return RowDecoder(manifest, with_image=True).decode(rows_of(folder, manifest, split))[FEATURES]


def inputs_of(model: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: batch[name] for name in model.input_names}


def copy_weights(source: Any, target: Any) -> None:
    """Copy weights between the layers of the same names in two models."""
    given, own = ({v.path: v for v in model.variables} for model in (source, target))
    for path in given.keys() & own.keys():
        own[path].assign(given[path])
