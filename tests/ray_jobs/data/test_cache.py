import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.spec import DataSpec
from ray_jobs.data.cache import choose_kind, make_index, open_cache
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.feeds import COUNTS, SIZE, row_ids, training_feed
from tests.ray_jobs.tiny import write_prepared

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared data")
    write_prepared(path, COUNTS, size=SIZE)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return read_manifest(Folder(folder))


@pytest.mark.parametrize("kind", ["object_store", "disk"])
@pytest.mark.parametrize("num_kept", [0, 20, 1000])
def test_a_cache_changes_no_batch_and_decodes_a_row_group_once(
    folder, manifest, monkeypatch, tmp_path, kind, num_kept
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    data = DataSpec(cache=kind, cache_bytes=num_kept * SIZE * SIZE * 3, image_size=12)
    plain = training_feed(folder, manifest, data=DataSpec(cache="none", image_size=12))
    cache = open_cache(kind, manifest, 12, make_index())
    feed = training_feed(folder, manifest, data=data, cache=cache, threads=2)
    decoded: list[int] = []
    decode = feed.decoder.decoded

    def noted(table: pa.Table) -> pa.Table:
        decoded.append(table.num_rows)
        return decode(table)

    monkeypatch.setattr(feed.decoder, "decoded", noted)
    for start, stop in ((0, 13), (13, 26)):
        for batch, expected in zip(
            feed.batches(start, stop), plain.batches(start, stop), strict=True
        ):
            for name, values in expected.items():
                np.testing.assert_array_equal(batch[name], values)
    sizes = [rows for shard in manifest.splits["train"].shards for rows in shard.row_groups]
    budget = num_kept * SIZE * SIZE // 12**2
    kept = [rows for i, rows in enumerate(sizes) if sum(sizes[: i + 1]) <= budget]
    assert sorted(decoded) == sorted(kept)
    assert cache is not None
    cache.close()


@pytest.mark.parametrize(
    ("cache_bytes", "object_store", "kind"),
    [
        (75 * SIZE * SIZE * 3, 150 * SIZE * SIZE * 3, "object_store"),
        (75 * SIZE * SIZE * 3, 149 * SIZE * SIZE * 3, "disk"),
        (75 * SIZE * SIZE * 3 - 1, 1 << 30, "none"),
    ],
)
def test_auto_keeps_rows_where_all_that_are_trained_and_validated_on_fit(
    manifest, cache_bytes, object_store, kind
):
    data = DataSpec(cache_bytes=cache_bytes)
    assert choose_kind(data, manifest, SIZE * SIZE * 3, object_store) == kind


def test_auto_keeps_nothing_that_is_stored_as_the_model_takes_it(manifest):
    raw = manifest.model_copy(
        update={"image": manifest.image.model_copy(update={"encoding": "raw"})}
    )
    assert choose_kind(DataSpec(), raw, SIZE * SIZE * 3, 1 << 40) == "none"
    assert choose_kind(DataSpec(), raw, 12 * 12 * 3, 1 << 40) == "object_store"
    assert choose_kind(DataSpec(), manifest, 0, 1 << 40) == "none"


def test_a_lost_object_is_decoded_anew(folder, manifest):
    import ray

    cache = open_cache("object_store", manifest, None, make_index())
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
