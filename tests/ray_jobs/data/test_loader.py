import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ray_jobs.config.spec import DataSpec
from ray_jobs.data import chunks
from ray_jobs.data.batch import IMAGE, LABEL, NUMERIC, WEIGHT
from ray_jobs.data.chunks import keys_of
from ray_jobs.data.decoder import Batch
from ray_jobs.data.images import decode_stored
from ray_jobs.data.loader import (
    EvaluationFeed,
    FeedOptions,
    ReadAhead,
    TrainingFeed,
    choose_decode,
)
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.ray_reading import places_dataset
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.data.steps import all_rows, steps_between
from tests.ray_jobs.feeds import COUNTS, SIZE, row_ids, sampler_of, training_feed
from tests.ray_jobs.hosts import wait_until
from tests.ray_jobs.tiny import COLUMNS, with_image, write_prepared


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split in stored order."""
    return {split: pq.read_table(folder / split).to_pylist() for split in COUNTS}


def evaluation_feed(
    folder: Path, manifest: Manifest, split: Any = "validation", batch_size: int = 4,
    rank: int = 0, num_workers: int = 1, **options: Any,
) -> EvaluationFeed:  # fmt: skip
    return EvaluationFeed(
        Folder(folder), manifest, split, batch_size, rank, num_workers, FeedOptions(**options)
    )


def expected_rows(feed: TrainingFeed, start: int, stop: int, rank: int = 0) -> list[list[int]]:
    """Return the indices in the split of each step's rows on one worker."""
    groups = [shard.row_groups for shard in feed.reader.shards]
    places = {row: place for place, row in enumerate(all_rows(groups))}
    steps = steps_between(feed.sampler, start, stop, rank, feed.num_workers)
    return [[places[row] for row in step] for step in steps]


def assert_equals_stored_rows(batch: Batch, rows: list[dict[str, Any]], num_rows: int) -> None:
    """Check the types and shapes of a batch, and that each row equals its stored row."""
    expected = {
        IMAGE: ((num_rows, SIZE, SIZE, 3), np.uint8),
        NUMERIC: ((num_rows, len(COLUMNS)), np.float32),
        LABEL: ((num_rows, 1), np.float32),
        WEIGHT: ((num_rows, 1), np.float32),
    }
    assert {name: (v.shape, v.dtype) for name, v in batch.items()} == expected
    for i, place in enumerate(row_ids(batch)):
        row = rows[place]
        numbers = [np.nan if row[name] is None else row[name] for name in COLUMNS]
        np.testing.assert_array_equal(batch[NUMERIC][i], np.array(numbers, np.float32))
        assert batch[LABEL][i, 0] == row["label"]
        np.testing.assert_array_equal(batch[IMAGE][i], decode_stored(row["image"]))


# -- training -------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("ray_local")


both_decoders = pytest.mark.parametrize("decode", ["trainer", "workers"])


@both_decoders
@pytest.mark.parametrize("num_workers", [1, 2])
def test_training_batches_follow_the_sampler_over_several_epochs(
    folder, manifest, stored, num_workers, decode
):
    sampler = sampler_of(manifest)
    steps = sampler.steps_before(1), sampler.steps_before(4)
    for rank in range(num_workers):
        feed = training_feed(folder, manifest, rank, num_workers, sampler, decode=decode, threads=2)
        batches = list(feed.batches(*steps))
        for batch in batches:
            assert_equals_stored_rows(batch, stored["train"], 8 // num_workers)
            assert (batch[WEIGHT] == 1).all()
        assert [row_ids(batch) for batch in batches] == expected_rows(feed, *steps, rank)


@pytest.mark.parametrize(("decode", "starts"), [("trainer", range(14)), ("workers", [7])])
def test_a_feed_resumes_at_any_step(folder, manifest, decode, starts):
    feed = training_feed(folder, manifest, decode=decode)
    expected = expected_rows(feed, 0, 13)
    for start in starts:
        assert [row_ids(batch) for batch in feed.batches(start, 13)] == expected[start:]


@both_decoders
@pytest.mark.parametrize(("planned", "start"), [(7, 7), (1, 9), (9, 2)])
def test_rows_that_ray_data_reads_ahead_are_the_same_from_any_step(
    folder, manifest, decode, planned, start
):
    feed = training_feed(folder, manifest, decode=decode)
    plan = feed.plan(planned, 26)
    rows = feed.dataset(places_dataset(list(plan.unread_places()), decode), plan).iterator()
    ahead = {"train": ReadAhead(feed.iterate(rows), planned)}
    resumed = training_feed(folder, manifest, decode=decode, ahead=ahead)
    batches = [row_ids(batch) for batch in resumed.batches(start, 26)]
    assert batches == expected_rows(feed, start, 26)


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
    wanted = [keys_of(feed.chunks.ranges(place)) for place in feed.chunks.places(0, last)]
    assert len(wanted) > 2
    new = [wanted[0], *(now - before for before, now in pairwise(wanted))]
    assert sorted(read) == sorted(group for groups in new for group in groups)
    assert len(read) < sum(map(len, wanted))


def test_training_without_images_or_steps(folder, manifest):
    feed = training_feed(folder, manifest, with_image=False, data=DataSpec(prefetch_batches=0))
    assert list(feed.batches(5, 5)) == []
    batches = list(feed.batches(0, 6))
    assert batches[0].keys() == {NUMERIC, LABEL, WEIGHT}
    assert [row_ids(batch) for batch in batches] == expected_rows(feed, 0, 6)


@both_decoders
def test_a_damaged_image_raises_an_error_with_its_key(tmp_path, decode):
    manifest = write_prepared(tmp_path, {"train": 8, "validation": 3, "test": 3}, size=SIZE)
    path = tmp_path / "train/part-00000.parquet"
    pq.write_table(with_image(pq.read_table(path), 3, b"damage"), path, row_group_size=5)
    feed = training_feed(tmp_path, manifest, decode=decode)
    with pytest.raises(Exception, match="the stored image of row 'train-3' is damaged"):
        list(feed.batches(0, 1))


# -- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "num_workers", "batch_size", "decode"),
    [
        ("validation", 1, 4, "trainer"),
        ("validation", 1, 64, "trainer"),
        ("validation", 3, 5, "trainer"),
        ("validation", 2, 4, "workers"),
        # Some workers have no rows.
        ("test", 5, 4, "trainer"),
    ],
)
def test_evaluation_yields_each_row_once_per_pass_and_pads_with_weight_0(
    folder, manifest, stored, split, num_workers, batch_size, decode
):
    found: list[list[int]] = [[], []]
    for rank in range(num_workers):
        feed = evaluation_feed(
            folder, manifest, split, batch_size, rank, num_workers, decode=decode
        )
        assert list(feed.batches(0, 0)) == []
        batches = list(feed.batches(0, 2))
        assert len(batches) == 2 * feed.num_batches
        for n, batch in enumerate(batches):
            assert_equals_stored_rows(batch, stored[split], batch_size)
            found[n // feed.num_batches] += row_ids(batch, real=True)
            # Only the last batch of a pass is padded.
            is_last = (n + 1) % feed.num_batches == 0
            real = len(feed.rows) % batch_size or batch_size if is_last else batch_size
            assert batch[WEIGHT][:, 0].tolist() == [1.0] * real + [0.0] * (batch_size - real)
    assert found == [list(range(COUNTS[split]))] * 2


@both_decoders
def test_evaluation_in_several_chunks_keeps_the_stored_order(folder, manifest, monkeypatch, decode):
    monkeypatch.setattr(chunks, "_EVALUATION_CHUNK_ROWS", 8)
    feed = evaluation_feed(folder, manifest, decode=decode)
    places = feed.chunks.places(0, 1)
    assert [sum(r.num_rows for r in feed.chunks.ranges(p)) for p in places] == [8, 8, 6]
    rows = [row for batch in feed.batches(0, 2) for row in row_ids(batch, real=True)]
    assert rows == [*range(22), *range(22)]


# -- clean-up -------------------------------------------------------------------------------------


def running_tasks() -> list[str]:
    import ray
    from ray.util.state import list_tasks

    address = ray.get_runtime_context().gcs_address
    tasks: list[Any] = list_tasks(address, limit=10_000, timeout=60)
    return [task.name for task in tasks if task.state not in ("FINISHED", "FAILED")]


def test_an_abandoned_iterator_leaves_no_tasks_and_frees_all_cpus(folder, manifest):
    import ray

    # Far more rows than are prefetched.
    batches = training_feed(folder, manifest, decode="workers").batches(0, 2000)
    for _ in range(3):
        next(batches)
    wait_until(running_tasks, 60, "tasks run")
    del batches
    wait_until(lambda: not running_tasks(), 60, "no tasks run")
    num_cpus = ray.cluster_resources()["CPU"]
    wait_until(lambda: ray.available_resources().get("CPU") == num_cpus, 60, "CPUs are free")


def test_an_abandoned_iterator_leaves_no_threads(folder, manifest):
    def feed_threads() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("feed")]

    batches = evaluation_feed(folder, manifest, decode="trainer").batches(0, 300)
    for _ in range(3):
        next(batches)
    assert feed_threads()
    del batches
    assert feed_threads() == []


# -- where rows are decoded -----------------------------------------------------------------------


def test_tasks_decode_only_if_some_nodes_have_no_gpu():
    assert choose_decode(DataSpec(), use_gpu=False) == "trainer"
    # The tests' local Ray has no GPU.
    assert choose_decode(DataSpec(), use_gpu=True) == "workers"
    assert choose_decode(DataSpec(decode="trainer"), use_gpu=True) == "trainer"
    assert choose_decode(DataSpec(cache="disk"), use_gpu=True) == "trainer"
