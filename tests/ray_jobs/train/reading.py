"""Records how the workers of a training run read their rows."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ray_jobs.data.reader import ShardReader
from ray_jobs.train.worker import train_on_worker


@contextmanager
def recorded_reading() -> Iterator[None]:
    """Make each worker of a run write what `rows_read` returns."""
    with patch("ray_jobs.train.job.train_on_worker", _train_and_record):
        yield


def rows_read(runs: Path) -> Counter[str]:
    """Return the rows that Ray Data has read by split, and how often workers read `in_place`.

    Args:
        runs: Storage path of the run.
    """
    read = Counter[str]()
    for path in runs.glob("read-*.json"):
        read.update(json.loads(path.read_text()))
    return read


def _train_and_record(config: dict[str, Any]) -> None:
    import ray.train

    from ray_jobs.train import datasets, finalize

    shards: dict[str, Any] = {}
    in_place: list[int] = []
    get_dataset_shard, read_groups = datasets.get_dataset_shard, ShardReader.read_groups
    finalize_run = finalize.finalize

    def get_and_keep(name: str) -> Any:
        shards[name] = get_dataset_shard(name)
        return shards[name]

    def finalize_uncounted(*args: Any) -> Any:
        before = len(in_place)
        result = finalize_run(*args)
        del in_place[before:]
        return result

    def count_and_read(reader: ShardReader, shard: int, groups: Any) -> Any:
        in_place.append(shard)
        return read_groups(reader, shard, groups)

    with (
        patch.object(datasets, "get_dataset_shard", get_and_keep),
        patch.object(ShardReader, "read_groups", count_and_read),
        # It reads a sample of the rows itself.
        patch.object(finalize, "finalize", finalize_uncounted),
    ):
        train_on_worker(config)
    read = {
        name: int(re.findall(r"Total output num rows: (\d+) rows", shard.stats())[-1])
        for name, shard in shards.items()
    }
    rank = ray.train.get_context().get_world_rank()
    path = Path(config["spec"]["run"]["storage_path"], f"read-{rank}.json")
    path.write_text(json.dumps(read | {"in_place": len(in_place)}))
