import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ray_jobs.config.spec import DataSpec
from ray_jobs.data.batch import IMAGE, LABEL, NUMERIC, WEIGHT
from ray_jobs.data.decoder import Batch
from ray_jobs.data.images import decode_stored
from ray_jobs.data.loader import EvaluationFeed, FeedOptions, TrainingFeed, choose_decode
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.sampler import TrainingSampler
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.feeds import COUNTS, SIZE, row_ids, sampler_of, training_feed
from tests.ray_jobs.tiny import COLUMNS, with_image, write_prepared


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared data")
    write_prepared(path, COUNTS, size=SIZE)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    from ray_jobs.data.manifest import read_manifest

    return read_manifest(Folder(folder))


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split in stored order."""
    return {
        split: [row for path in sorted((folder / split).iterdir())
                for row in pq.read_table(path).to_pylist()]
        for split in COUNTS
    }  # fmt: skip


def evaluation_feed(
    folder: Path, manifest: Manifest, split: Any = "validation", batch_size: int = 4,
    rank: int = 0, num_workers: int = 1, **options: Any,
) -> EvaluationFeed:  # fmt: skip
    return EvaluationFeed(
        Folder(folder), manifest, split, batch_size, rank, num_workers, FeedOptions(**options)
    )


def batches_of_epochs(feed: TrainingFeed, epochs: range) -> Iterator[Batch]:
    first, last = (feed.sampler.steps_before(epoch) for epoch in (epochs.start, epochs.stop))
    return feed.batches(first, last)


def expected_rows(
    manifest: Manifest, sampler: TrainingSampler, epochs: range, rank: int, num_workers: int
) -> list[list[int]]:
    """Return the indices in the split of each step's rows on one worker."""
    first, places = 0, {}
    for shard, info in enumerate(manifest.splits["train"].shards):
        for group, rows in enumerate(info.row_groups):
            places[shard, group] = first
            first += rows
    found = []
    first_step, last_step = (sampler.steps_before(epoch) for epoch in (epochs.start, epochs.stop))
    for window in sampler.windows(first_step, last_step):
        streams = [
            [places[r.shard, r.group] + i for r in sampler.stream_rows(window, stream)
             for i in range(r.start, r.stop)]
            for stream in sampler.streams_of(rank, num_workers)
        ]  # fmt: skip
        shuffles = [
            sampler.shuffle(window, stream) for stream in sampler.streams_of(rank, num_workers)
        ]
        for step in range(window.num_steps):
            found.append([
                rows[i] for rows, shuffle in zip(streams, shuffles, strict=True)
                for i in shuffle[step]
            ])  # fmt: skip
    return found


def assert_equals_stored_rows(batch: Batch, rows: list[dict[str, Any]]) -> None:
    """Check that each row of a batch equals its stored row."""
    for i, place in enumerate(row_ids(batch)):
        row = rows[place]
        numbers = [np.nan if row[name] is None else row[name] for name in COLUMNS]
        np.testing.assert_array_equal(batch[NUMERIC][i], np.array(numbers, np.float32))
        assert batch[LABEL][i, 0] == row["label"]
        if IMAGE in batch:
            np.testing.assert_array_equal(batch[IMAGE][i], decode_stored(row["image"]))


def assert_types_and_shapes(batch: Batch, num_rows: int, with_image: bool = True) -> None:
    expected: dict[str, Any] = {
        NUMERIC: ((num_rows, len(COLUMNS)), np.float32),
        LABEL: ((num_rows, 1), np.float32),
        WEIGHT: ((num_rows, 1), np.float32),
    }
    if with_image:
        expected[IMAGE] = ((num_rows, SIZE, SIZE, 3), np.uint8)
    assert {name: (v.shape, v.dtype) for name, v in batch.items()} == expected


# -- training -------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("ray_local")


both_decoders = pytest.mark.parametrize("decode", ["trainer", "workers"])


@both_decoders
@pytest.mark.parametrize("num_workers", [1, 2])
def test_training_batches_follow_the_sampler_over_several_epochs(
    folder, manifest, stored, num_workers, decode
):
    sampler, epochs = sampler_of(manifest), range(1, 4)
    shares = []
    for rank in range(num_workers):
        feed = training_feed(folder, manifest, rank, num_workers, sampler, decode=decode, threads=2)
        batches = list(batches_of_epochs(feed, epochs))
        for batch in batches:
            assert_types_and_shapes(batch, 8 // num_workers)
            assert_equals_stored_rows(batch, stored["train"])
            assert (batch[WEIGHT] == 1).all()
        rows = [row_ids(batch) for batch in batches]
        assert rows == expected_rows(manifest, sampler, epochs, rank, num_workers)
        shares.append(rows)
    counts = Counter(row for share in shares for step in share for row in step)
    # Rows left over from epoch 0 start epoch 1, and epoch 3 leaves some over.
    steps = sampler.steps_before(4) - sampler.steps_before(1)
    assert counts.total() == steps * 8
    assert set(counts) == set(range(COUNTS["train"]))
    assert set(counts.values()) <= {2, 3, 4}


@both_decoders
@pytest.mark.parametrize("start", [1, 5, 7, 12])
def test_a_feed_resumes_at_any_step(folder, manifest, decode, start):
    feed = training_feed(folder, manifest, decode=decode)
    expected = expected_rows(manifest, feed.sampler, range(2), 0, 1)
    assert [row_ids(batch) for batch in feed.batches(start, 13)] == expected[start:]


def test_a_row_group_shared_by_two_windows_is_read_once(folder, manifest, monkeypatch):
    feed = training_feed(folder, manifest)
    read: list[tuple[int, int]] = []
    read_groups = feed.reader.read_groups

    def record_and_read(shard: int, groups: Any) -> Any:
        read.extend((shard, group) for group in groups)
        return read_groups(shard, groups)

    monkeypatch.setattr(feed.reader, "read_groups", record_and_read)
    last = feed.sampler.steps_before(1)
    list(feed.batches(0, last))
    wanted = [{(r.shard, r.group) for r in chunk.ranges} for chunk in feed.chunks(0, last)]
    assert len(wanted) > 2
    new = [wanted[0], *(now - before for before, now in pairwise(wanted))]
    assert sorted(read) == sorted(group for groups in new for group in groups)
    assert len(read) < sum(map(len, wanted))


def test_a_task_does_not_receive_the_chunks_of_other_tasks(tmp_path):
    """Use many chunks, as a long validation split has."""
    sizes = []
    for count in (600, 6000):
        manifest = write_prepared(
            tmp_path / str(count), {"train": 8, "validation": count, "test": 3}, size=4,
            rows_per_group=10_000, rows_per_shard=10_000,
        )  # fmt: skip
        feed = evaluation_feed(tmp_path / str(count), manifest, decode="workers")
        sizes.append(len(pickle.dumps(feed.task)))
    assert abs(sizes[1] - sizes[0]) < 200


def test_training_without_images_or_steps(folder, manifest, stored):
    feed = training_feed(folder, manifest, with_image=False, data=DataSpec(prefetch_batches=0))
    assert list(feed.batches(5, 5)) == []
    batch = next(feed.batches(0, 6))
    assert_types_and_shapes(batch, 8, with_image=False)
    assert_equals_stored_rows(batch, stored["train"])


@both_decoders
def test_a_damaged_image_raises_an_error_with_its_key(tmp_path, decode):
    manifest = write_prepared(tmp_path, {"train": 8, "validation": 3, "test": 3}, size=SIZE)
    path = tmp_path / "train/part-00000.parquet"
    pq.write_table(with_image(pq.read_table(path), 3, b"damage"), path, row_group_size=5)
    feed = training_feed(tmp_path, manifest, decode=decode)
    with pytest.raises(Exception, match="the stored image of row 'train-3' is damaged"):
        list(feed.batches(0, 1))


# -- evaluation -----------------------------------------------------------------------------------


@both_decoders
@pytest.mark.parametrize(("num_workers", "batch_size"), [(1, 4), (2, 4), (1, 64), (3, 5)])
def test_evaluation_yields_each_row_once_per_pass_and_pads_with_weight_0(
    folder, manifest, stored, num_workers, batch_size, decode
):
    found: list[list[int]] = [[], []]
    for rank in range(num_workers):
        feed = evaluation_feed(
            folder, manifest, "validation", batch_size, rank, num_workers, decode=decode
        )
        batches = list(feed.batches(passes=2))
        assert len(batches) == 2 * feed.num_batches
        for n, batch in enumerate(batches):
            assert_types_and_shapes(batch, batch_size)
            assert_equals_stored_rows(batch, stored["validation"])
            found[n // feed.num_batches] += row_ids(batch, real=True)
            # Only the last batch of a pass is padded.
            real = len(feed.rows) % batch_size or batch_size
            full = (n + 1) % feed.num_batches != 0
            assert batch[WEIGHT][:, 0].tolist() == [
                float(full or i < real) for i in range(batch_size)
            ]
    assert found == [list(range(COUNTS["validation"]))] * 2


def test_a_worker_without_rows_has_no_batches(folder, manifest):
    shares = []
    for rank in range(5):
        feed = evaluation_feed(folder, manifest, "test", 4, rank, 5)
        batches = list(feed.batches(passes=2))
        assert len(batches) == 2 * feed.num_batches
        shares.append([row for batch in batches for row in row_ids(batch, real=True)])
    assert sorted(shares) == [[], [], [0, 0], [1, 1], [2, 2]]


def test_zero_passes_yield_no_batches(folder, manifest):
    assert list(evaluation_feed(folder, manifest).batches(passes=0)) == []


@both_decoders
def test_evaluation_in_several_chunks_keeps_the_stored_order(folder, manifest, monkeypatch, decode):
    from ray_jobs.data import loader

    monkeypatch.setattr(loader, "_EVALUATION_CHUNK_ROWS", 8)
    feed = evaluation_feed(folder, manifest, decode=decode)
    assert [sum(r.num_rows for r in chunk.ranges) for chunk in feed.chunks] == [8, 8, 6]
    rows = [row for batch in feed.batches(passes=2) for row in row_ids(batch, real=True)]
    assert rows == [*range(22), *range(22)]


# -- clean-up -------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    """Poll a condition until it is true or times out, and return its last value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value


def running_tasks() -> list[str]:
    import ray
    from ray.util.state import list_tasks

    address = ray.get_runtime_context().gcs_address
    tasks: list[Any] = list_tasks(address, limit=10_000, timeout=60)
    return [task.name for task in tasks if task.state not in ("FINISHED", "FAILED")]


# Far more rows than are prefetched.
LONG_FEEDS: dict[str, Callable[..., Iterator[Batch]]] = {
    "training": lambda *where, decode: training_feed(*where, decode=decode).batches(0, 2000),
    "evaluation": lambda *where, decode: evaluation_feed(*where, decode=decode).batches(300),
}
both_feeds = pytest.mark.parametrize("kind", LONG_FEEDS)


@both_feeds
def test_an_abandoned_iterator_leaves_no_tasks_and_frees_all_cpus(folder, manifest, kind):
    import ray

    batches = LONG_FEEDS[kind](folder, manifest, decode="workers")
    for _ in range(3):
        next(batches)
    assert wait_until(running_tasks)
    del batches
    assert wait_until(lambda: not running_tasks()), running_tasks()
    assert wait_until(
        lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
    )


@both_feeds
def test_an_abandoned_iterator_leaves_no_threads(folder, manifest, kind):
    batches = LONG_FEEDS[kind](folder, manifest, decode="trainer")
    for _ in range(3):
        next(batches)
    assert any(thread.name.startswith("feed") for thread in threading.enumerate())
    del batches
    assert not [t.name for t in threading.enumerate() if t.name.startswith("feed")]


def test_an_exhausted_iterator_leaves_no_tasks_and_frees_all_cpus(folder, manifest):
    import ray

    assert len(list(training_feed(folder, manifest, decode="workers").batches(0, 13))) == 13
    assert wait_until(lambda: not running_tasks()), running_tasks()
    assert wait_until(
        lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
    )


# -- where rows are decoded -----------------------------------------------------------------------


def test_tasks_decode_only_if_some_nodes_have_no_gpu():
    assert choose_decode(DataSpec(), use_gpu=False) == "trainer"
    # The tests' local Ray has no GPU.
    assert choose_decode(DataSpec(), use_gpu=True) == "workers"
    assert choose_decode(DataSpec(decode="trainer"), use_gpu=True) == "trainer"
    assert choose_decode(DataSpec(cache="disk"), use_gpu=True) == "trainer"
