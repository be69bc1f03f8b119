"""Creates feeds of small prepared data for the tests of feeds and caches."""

from pathlib import Path
from typing import Any

from ray_jobs.config.spec import DataSpec
from ray_jobs.data.batch import NUMERIC, WEIGHT
from ray_jobs.data.decoder import Batch
from ray_jobs.data.loader import FeedOptions, TrainingFeed
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.sampler import TrainingSampler
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.tiny import ROW

SIZE = 16
COUNTS = {"train": 53, "validation": 22, "test": 3}


def sampler_of(manifest: Manifest, batch_size: int = 8, window_rows: int = 16) -> TrainingSampler:
    data = DataSpec(shuffle_window_rows=window_rows)
    return TrainingSampler.of(manifest.splits["train"], batch_size, 0, data)


def training_feed(
    folder: Path, manifest: Manifest, rank: int = 0, num_workers: int = 1,
    sampler: TrainingSampler | None = None, **options: Any,
) -> TrainingFeed:  # fmt: skip
    sampler = sampler or sampler_of(manifest)
    return TrainingFeed(
        Folder(folder), manifest, sampler, rank, num_workers, FeedOptions(**options)
    )


def row_ids(batch: Batch, real: bool = False) -> list[int]:
    rows = batch[NUMERIC][batch[WEIGHT][:, 0] > 0] if real else batch[NUMERIC]
    return rows[:, ROW].astype(int).tolist()
