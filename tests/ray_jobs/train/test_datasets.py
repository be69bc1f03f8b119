import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from ray_jobs.data.reader import ShardReader
from ray_jobs.train import datasets
from ray_jobs.train.job import fit
from ray_jobs.train.worker import train_on_worker
from tests.ray_jobs.scenarios import SCENARIOS
from tests.ray_jobs.train.test_train import prepared_in, spec_in

READ = "read.json"


def train_and_record(config: dict[str, Any]) -> None:
    """Train, and write how many rows Ray Data has read, and how often the worker read in place."""
    shards: dict[str, Any] = {}
    in_place: list[int] = []
    get_dataset_shard, read_groups = datasets.get_dataset_shard, ShardReader.read_groups

    def get_and_keep(name: str) -> Any:
        shards[name] = get_dataset_shard(name)
        return shards[name]

    def count_and_read(reader: ShardReader, shard: int, groups: Any) -> Any:
        in_place.append(shard)
        return read_groups(reader, shard, groups)

    with (
        patch.object(datasets, "get_dataset_shard", get_and_keep),
        patch.object(ShardReader, "read_groups", count_and_read),
    ):
        train_on_worker(config)
    read = {
        name: int(re.findall(r"Total output num rows: (\d+) rows", shard.stats())[-1])
        for name, shard in shards.items()
    }
    Path(config["spec"]["run"]["storage_path"], READ).write_text(
        json.dumps(read | {"in_place": len(in_place)})
    )


@pytest.mark.parametrize("cache", ["none", pytest.param("object_store", marks=pytest.mark.slow)])
def test_each_epoch_takes_its_rows_from_the_dataset_unless_they_are_cached(
    ray_local, tmp_path, cache
):
    prepared_in(tmp_path)
    # Without random operations, which are slow to trace.
    changes = {"model": SCENARIOS["patience"]["model"], "train.num_workers": 1}
    # Several windows per epoch, and less memory than they take.
    changes |= {"data.cache": cache, "data.shuffle_window_rows": 16, "data.buffer_bytes": 100_000}
    spec = spec_in(tmp_path).overlay(changes)
    with patch("ray_jobs.train.job.train_on_worker", train_and_record):
        fit(spec)
    read = json.loads((tmp_path / "runs" / READ).read_text())
    assert read["in_place"] == 0
    sizes = {"train": 101, "validation": 37}
    for split, num_rows in sizes.items():
        # A row group of several windows is read several times.
        if cache == "none":
            assert read[split] >= 3 * num_rows
        else:
            assert num_rows <= read[split] < 2 * num_rows
