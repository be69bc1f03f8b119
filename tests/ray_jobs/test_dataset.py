import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.batch import IMAGE, LABEL, NUMERIC, WEIGHT
from ray_jobs.dataset import (
    Batch,
    EvaluationFeed,
    ShardReader,
    TrainingFeed,
    decode,
    stored_columns,
)
from ray_jobs.images import decode_stored
from ray_jobs.manifest import Manifest
from ray_jobs.order import RowRange, TrainingOrder
from ray_jobs.storage import Folder
from tests.ray_jobs.tiny import COLUMNS, ROW, write_prepared

SIZE = 16
COUNTS = {"train": 53, "validation": 22, "test": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared data")
    write_prepared(path, COUNTS, size=SIZE)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    from ray_jobs.manifest import read_manifest

    return read_manifest(Folder(folder))


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split as Parquet has them, in stored order."""
    return {
        split: [row for path in sorted((folder / split).iterdir())
                for row in pq.read_table(path).to_pylist()]
        for split in COUNTS
    }  # fmt: skip


def order_of(manifest: Manifest, batch_size: int = 8, window_rows: int = 16) -> TrainingOrder:
    return TrainingOrder.of(manifest.splits["train"], batch_size, 0, window_rows)


def training_feed(
    folder: Path, manifest: Manifest, rank: int = 0, num_workers: int = 1, **options: Any
) -> TrainingFeed:
    options = {"with_image": True, "prefetch_batches": 2, **options}
    order = options.pop("order", None) or order_of(manifest)
    return TrainingFeed(Folder(folder), manifest, order, rank, num_workers, **options)


def evaluation_feed(
    folder: Path, manifest: Manifest, split: Any = "validation", batch_size: int = 4,
    rank: int = 0, num_workers: int = 1, with_image: bool = True,
) -> EvaluationFeed:  # fmt: skip
    return EvaluationFeed(
        Folder(folder), manifest, split, batch_size, rank, num_workers,
        with_image=with_image, prefetch_batches=2,
    )  # fmt: skip


def ordered_rows(
    manifest: Manifest, order: TrainingOrder, epochs: range, rank: int, num_workers: int
) -> list[list[int]]:
    """The places in the split of the rows of each step on one worker, as the order says."""
    first, places = 0, {}
    for shard, info in enumerate(manifest.splits["train"].shards):
        for group, rows in enumerate(info.row_groups):
            places[shard, group] = first
            first += rows
    found = []
    for window in order.windows(epochs):
        lanes = [
            [places[r.shard, r.group] + i for r in order.lane_rows(window, lane)
             for i in range(r.start, r.stop)]
            for lane in order.lanes_of(rank, num_workers)
        ]  # fmt: skip
        shuffles = [order.shuffle(window, lane) for lane in order.lanes_of(rank, num_workers)]
        for step in range(window.num_steps):
            found.append([
                rows[i] for rows, shuffle in zip(lanes, shuffles, strict=True)
                for i in shuffle[step]
            ])  # fmt: skip
    return found


def row_ids(batch: Batch, real: bool = False) -> list[int]:
    rows = batch[NUMERIC][batch[WEIGHT][:, 0] > 0] if real else batch[NUMERIC]
    return rows[:, ROW].astype(int).tolist()


def assert_is_stored(batch: Batch, rows: list[dict[str, Any]]) -> None:
    """Every row of a batch holds what its stored row holds."""
    for i, place in enumerate(row_ids(batch)):
        row = rows[place]
        numbers = [np.nan if row[name] is None else row[name] for name in COLUMNS]
        np.testing.assert_array_equal(batch[NUMERIC][i], np.array(numbers, np.float32))
        assert batch[LABEL][i, 0] == row["label"]
        if IMAGE in batch:
            np.testing.assert_array_equal(batch[IMAGE][i], decode_stored(row["image"]))


def assert_keeps_the_contract(batch: Batch, num_rows: int, with_image: bool = True) -> None:
    expected: dict[str, Any] = {
        NUMERIC: ((num_rows, len(COLUMNS)), np.float32),
        LABEL: ((num_rows, 1), np.float32),
        WEIGHT: ((num_rows, 1), np.float32),
    }
    if with_image:
        expected[IMAGE] = ((num_rows, SIZE, SIZE, 3), np.uint8)
    assert {name: (v.shape, v.dtype) for name, v in batch.items()} == expected


# -- reading and decoding, without Ray ------------------------------------------------------------


def test_a_reader_returns_ranges_in_their_order_and_a_row_group_for_each(folder, manifest):
    reader = ShardReader(Folder(folder), manifest.splits["train"].shards, ["key"])
    ranges = [RowRange(2, 1, 3, 5), RowRange(0, 0, 0, 2), RowRange(2, 1, 0, 1)]
    assert reader.read(ranges).column("key").to_pylist() == [
        "train-48", "train-49", "train-0", "train-1", "train-45",
    ]  # fmt: skip


def test_a_decoded_batch_keeps_the_contract_and_marks_missing_numbers_by_nan(
    folder, manifest, stored
):
    table = ShardReader(
        Folder(folder), manifest.splits["train"].shards, stored_columns(manifest)
    ).read([RowRange(0, group, 0, 5) for group in range(4)])
    batch = decode(table, manifest)
    assert_keeps_the_contract(batch, 20)
    assert_is_stored(batch, stored["train"])
    assert np.isnan(batch[NUMERIC]).any()
    assert (batch[WEIGHT] == 1).all()


def test_a_model_without_images_reads_none(folder, manifest):
    columns = stored_columns(manifest, with_image=False)
    assert "image" not in columns
    table = ShardReader(Folder(folder), manifest.splits["test"].shards, columns).read(
        [RowRange(0, 0, 0, 3)]
    )
    assert_keeps_the_contract(decode(table, manifest), 3, with_image=False)


def test_data_without_numbers_gives_an_array_of_no_columns(folder, manifest):
    bare = manifest.model_copy(update={"numeric_columns": ()})
    table = ShardReader(Folder(folder), manifest.splits["test"].shards, stored_columns(bare)).read(
        [RowRange(0, 0, 0, 3)]
    )
    batch = decode(table, bare)
    assert (batch[NUMERIC].shape, batch[NUMERIC].dtype) == ((3, 0), np.float32)


def with_image(table: pa.Table, row: int, content: bytes) -> pa.Table:
    images = table.column("image").to_pylist()
    images[row] = content
    return table.set_column(table.column_names.index("image"), "image", pa.array(images))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "0 bytes"), (b"no image", "8 bytes"), (b"\xff\xd8\xff", "3 b")]
)
def test_a_damaged_stored_image_names_its_row_and_the_remedy(folder, manifest, content, reason):
    table = with_image(pq.read_table(folder / "test/part-00000.parquet"), 1, content)
    message = (
        rf"the stored image of row 'test-1' cannot be used: {reason}.*the prepared data is "
        "damaged, prepare it again"
    )
    with pytest.raises(ValueError, match=message):
        decode(table, manifest)


def test_a_stored_image_of_another_size_names_its_row_and_both_sizes(folder, manifest):
    other = manifest.model_copy(update={"image": manifest.image.model_copy(update={"width": 12})})
    message = (
        r"row 'test-0' cannot be used: its shape is \(16, 16, 3\), the manifest says \(16, 12, 3\)"
    )
    with pytest.raises(ValueError, match=message):
        decode(pq.read_table(folder / "test/part-00000.parquet"), other)


# -- training -------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_training_batches_are_those_of_the_order_over_several_epochs(
    folder, manifest, stored, num_workers
):
    order, epochs = order_of(manifest), range(1, 4)
    shares = []
    for rank in range(num_workers):
        feed = training_feed(folder, manifest, rank, num_workers, order=order)
        batches = list(feed.batches(epochs))
        for batch in batches:
            assert_keeps_the_contract(batch, 8 // num_workers)
            assert_is_stored(batch, stored["train"])
            assert (batch[WEIGHT] == 1).all()
        rows = [row_ids(batch) for batch in batches]
        assert rows == ordered_rows(manifest, order, epochs, rank, num_workers)
        shares.append(rows)
    counts = Counter(row for share in shares for step in share for row in step)
    # What epoch 0 left over opens epoch 1, and epoch 3 leaves some over in turn.
    steps = order.steps_before(4) - order.steps_before(1)
    assert counts.total() == steps * 8
    assert set(counts) == set(range(COUNTS["train"]))
    assert set(counts.values()) <= {2, 3, 4}


def test_blocks_of_several_steps_keep_the_order(folder, manifest, monkeypatch):
    from ray_jobs import dataset

    # Room for two batches of 8 rows.
    monkeypatch.setattr(dataset, "_BLOCK_BYTES", 2 * 8 * SIZE * SIZE * 3)
    order = order_of(manifest, window_rows=40)
    feed = training_feed(folder, manifest, order=order)
    window = order.windows(range(1))[0]
    blocks = list(feed.window_batches(window))
    assert [len(block[LABEL]) for block in blocks] == [16, 16, 8]
    expected = ordered_rows(manifest, order, range(1), 0, 1)[: window.num_steps]
    assert [r for block in blocks for r in row_ids(block)] == [r for s in expected for r in s]


def test_training_without_images_or_epochs(folder, manifest, stored):
    feed = training_feed(folder, manifest, with_image=False, prefetch_batches=0)
    assert list(feed.batches(range(2, 2))) == []
    batch = next(feed.batches(range(1)))
    assert_keeps_the_contract(batch, 8, with_image=False)
    assert_is_stored(batch, stored["train"])


def test_damaged_prepared_data_fails_the_training_with_the_rows_key(tmp_path):
    manifest = write_prepared(tmp_path, {"train": 8}, size=SIZE)
    path = tmp_path / "train/part-00000.parquet"
    pq.write_table(with_image(pq.read_table(path), 3, b"damage"), path, row_group_size=5)
    feed = training_feed(tmp_path, manifest, order=order_of(manifest))
    with pytest.raises(Exception, match="the stored image of row 'train-3' cannot be used"):
        list(feed.batches(range(1)))


# -- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_workers", "batch_size"), [(1, 4), (2, 4), (1, 64), (3, 5)])
def test_evaluation_counts_each_row_once_a_pass_and_pads_with_weight_0(
    folder, manifest, stored, num_workers, batch_size
):
    found: list[list[int]] = [[], []]
    for rank in range(num_workers):
        feed = evaluation_feed(folder, manifest, "validation", batch_size, rank, num_workers)
        batches = list(feed.batches(passes=2))
        assert len(batches) == 2 * feed.num_batches
        for n, batch in enumerate(batches):
            assert_keeps_the_contract(batch, batch_size)
            assert_is_stored(batch, stored["validation"])
            found[n // feed.num_batches] += row_ids(batch, real=True)
            # Only the last batch of a pass is filled up.
            real = len(feed.rows) % batch_size or batch_size
            full = (n + 1) % feed.num_batches != 0
            assert batch[WEIGHT][:, 0].tolist() == [
                float(full or i < real) for i in range(batch_size)
            ]
    assert found == [list(range(COUNTS["validation"]))] * 2


def test_a_worker_without_a_row_has_no_batch(folder, manifest):
    shares = []
    for rank in range(5):
        feed = evaluation_feed(folder, manifest, "test", 4, rank, 5)
        batches = list(feed.batches(passes=2))
        assert len(batches) == 2 * feed.num_batches
        shares.append([row for batch in batches for row in row_ids(batch, real=True)])
    assert sorted(shares) == [[], [], [0, 0], [1, 1], [2, 2]]


def test_no_passes_give_no_batches(folder, manifest):
    assert list(evaluation_feed(folder, manifest).batches(passes=0)) == []


def test_evaluation_over_several_tasks_keeps_the_stored_order(folder, manifest, monkeypatch):
    from ray_jobs import dataset

    monkeypatch.setattr(dataset, "_EVALUATION_TASK_ROWS", 8)
    monkeypatch.setattr(dataset, "_BLOCK_BYTES", 4 * SIZE * SIZE * 3)
    feed = evaluation_feed(folder, manifest)
    assert [sum(r.num_rows for r in task) for task in feed.tasks] == [8, 8, 6]
    rows = [row for batch in feed.batches(passes=2) for row in row_ids(batch, real=True)]
    assert rows == [*range(22), *range(22)]


# -- what is left of it ---------------------------------------------------------------------------


def until(holds: Callable[[], Any], timeout_s: float = 60) -> Any:
    """Poll until something holds; return its last value."""
    deadline = time.monotonic() + timeout_s
    while not (value := holds()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value


def running_tasks() -> list[str]:
    import ray
    from ray.util.state import list_tasks

    address = ray.get_runtime_context().gcs_address
    tasks: list[Any] = list_tasks(address, limit=10_000, timeout=60)
    return [task.name for task in tasks if task.state not in ("FINISHED", "FAILED")]


# Far more rows than are made ready ahead.
ENDLESS: dict[str, Callable[[Path, Manifest], Iterator[Batch]]] = {
    "training": lambda folder, manifest: training_feed(folder, manifest).batches(range(300)),
    "evaluation": lambda folder, manifest: evaluation_feed(folder, manifest).batches(passes=300),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_iterator_that_is_left_half_way_leaves_no_task_and_no_cpu_taken(folder, manifest, kind):
    import ray

    batches = ENDLESS[kind](folder, manifest)
    for _ in range(3):
        next(batches)
    assert until(running_tasks)
    del batches
    assert until(lambda: not running_tasks()), running_tasks()
    assert until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


def test_an_iterator_that_is_read_to_the_end_leaves_no_task_and_no_cpu_taken(folder, manifest):
    import ray

    assert len(list(training_feed(folder, manifest).batches(range(2)))) == 13
    assert until(lambda: not running_tasks()), running_tasks()
    assert until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
