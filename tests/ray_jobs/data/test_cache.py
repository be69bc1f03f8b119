import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.spec import DataSpec
from ray_jobs.data.cache import DiskCache, choose_cache, make_cache_index, open_cache
from tests.ray_jobs.feeds import SIZE, row_ids, training_feed


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("kind", "num_cached"),
    [("object_store", 20), ("object_store", 1000), ("disk", 0), ("disk", 20), ("disk", 1000)],
)
def test_a_cache_keeps_batches_equal_and_decodes_a_row_group_once(
    folder, manifest, monkeypatch, tmp_path, kind, num_cached
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    data = DataSpec(cache=kind, cache_bytes=num_cached * SIZE * SIZE * 3, image_size=12)
    plain = training_feed(folder, manifest, data=DataSpec(cache="none", image_size=12))
    cache = open_cache(kind, manifest, 12, make_cache_index())
    feed = training_feed(folder, manifest, data=data, cache=cache, threads=2)
    decoded: list[int] = []
    decode_images = feed.decoder.decode_images

    def count_and_decode(table: pa.Table) -> pa.Table:
        decoded.append(table.num_rows)
        return decode_images(table)

    monkeypatch.setattr(feed.decoder, "decode_images", count_and_decode)
    for start, stop in ((0, 13), (13, 26)):
        for batch, expected in zip(
            feed.batches(start, stop), plain.batches(start, stop), strict=True
        ):
            for name, values in expected.items():
                np.testing.assert_array_equal(batch[name], values)
    sizes = [rows for shard in manifest.splits["train"].shards for rows in shard.row_groups]
    budget = num_cached * SIZE * SIZE // 12**2
    cacheable = [rows for i, rows in enumerate(sizes) if sum(sizes[: i + 1]) <= budget]
    assert sorted(decoded) == sorted(cacheable)
    assert cache is not None
    cache.close()
    assert list(tmp_path.glob("multimodal-ray-*/*")) == []


def test_auto_caches_rows_that_need_decoding_and_fit(manifest):
    row_bytes = SIZE * SIZE * 3
    # All rows of training and validation.
    needed = 75 * row_bytes

    def kind(budget: int, store: int = 1 << 40, data=manifest, row_bytes=row_bytes) -> str:
        return choose_cache(DataSpec(cache_bytes=budget), data, row_bytes, store)

    assert kind(needed, 2 * needed) == "object_store"
    assert kind(needed, 2 * needed - 1) == "disk"
    assert kind(needed - 1) == "none"
    raw = manifest.image.model_copy(update={"encoding": "raw"})
    stored_as_used = manifest.model_copy(update={"image": raw})
    assert kind(needed, data=stored_as_used) == "none"
    assert kind(needed, data=stored_as_used, row_bytes=12 * 12 * 3) == "object_store"
    assert kind(needed, row_bytes=0) == "none"


@pytest.mark.usefixtures("ray_local")
def test_a_lost_object_is_decoded_again(folder, manifest):
    import ray

    cache = open_cache("object_store", manifest, None, make_cache_index())
    data = DataSpec(cache="object_store")

    @ray.remote(num_cpus=0)
    class Worker:
        def run(self, cache: Any) -> list[list[int]]:
            feed = training_feed(folder, manifest, data=data, cache=cache)
            return [row_ids(batch) for batch in feed.batches(0, 6)]

    first = Worker.remote()
    expected = ray.get(first.run.remote(cache))
    ray.kill(first)
    second = Worker.remote()
    assert ray.get(second.run.remote(cache), timeout=120) == expected


# -- concurrent runs with a disk cache ------------------------------------------------------------

GROUP = ("train", 0, 0)
TABLE = pa.table({"image": [b"pixels"]})
OPEN_AND_WAIT = """
import sys
from pathlib import Path
from ray_jobs.data.cache import DiskCache

cache = DiskCache(Path(sys.argv[1]))
print(flush=True)
input()
cache.close()
"""


def open_in_another_process(folder: Path) -> subprocess.Popen[bytes]:
    """Return a process that has opened the cache, and closes it after a line on its stdin."""
    process = subprocess.Popen(
        [sys.executable, "-c", OPEN_AND_WAIT, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    return process


def cached(cache: DiskCache) -> bool:
    return cache.get([GROUP]) == {GROUP: TABLE}


def test_the_last_of_two_runs_deletes_their_cache(tmp_path):
    cache = DiskCache(tmp_path / "data")
    cache.put(GROUP, TABLE)
    with open_in_another_process(tmp_path / "data") as process:
        process.communicate(b"\n")
    assert process.returncode == 0
    assert cached(cache)

    with open_in_another_process(tmp_path / "data") as process:
        cache.close()
        other = DiskCache(tmp_path / "data")
        assert cached(other)
        other.close()
        assert (tmp_path / "data").is_dir()
        process.communicate(b"\n")
    assert list(tmp_path.iterdir()) == []


def test_a_run_uses_or_deletes_what_a_killed_run_left(tmp_path):
    process = open_in_another_process(tmp_path / "data")
    cache = DiskCache(tmp_path / "data")
    cache.put(GROUP, TABLE)
    with process:
        process.send_signal(signal.SIGKILL)
    assert cached(cache)
    cache.close()
    assert list(tmp_path.iterdir()) == []

    with open_in_another_process(tmp_path / "data") as process:
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "data").is_dir()
    other_data = DiskCache(tmp_path / "other data")
    assert not (tmp_path / "data").exists()
    other_data.close()
    assert list(tmp_path.iterdir()) == []


def test_threads_that_open_and_close_a_cache_do_not_delete_it_from_each_other(tmp_path):
    lost: list[int] = []

    def work(i: int) -> None:
        for n in range(50):
            cache = DiskCache(tmp_path / f"data {(i + n) % 2}")
            group = ("train", i, 0)
            cache.put(group, TABLE)
            if not cache.get([group]):
                lost.append(n)
            cache.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
    assert list(tmp_path.iterdir()) == []
