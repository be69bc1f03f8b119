"""Prepared shards → Ray Data → the batches of one worker.

Reads: the shards that a manifest lists.  Leaves: batches as `ray_jobs.batch` defines them.

A task reads one window of row groups, shuffles the encoded rows, and decodes them step by step, so
that what is large (pixels) is made last and kept shortest.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.batch import IMAGE, KEY, LABEL, NUMERIC, WEIGHT
from ray_jobs.images import decode_stored
from ray_jobs.manifest import Manifest, Shard
from ray_jobs.order import RowRange, TrainingOrder, Window, evaluation_rows, stored_ranges
from ray_jobs.spec import Split
from ray_jobs.storage import Folder

if TYPE_CHECKING:
    import ray.data

Batch = dict[str, np.ndarray]

_BLOCK_BYTES = 8 << 20
_EVALUATION_TASK_ROWS = 512
_TASKS_PER_EXECUTION = 2000
"""Ray Data plans all tasks of an execution before the first one starts."""
_MAX_TASKS = 8


class ShardReader:
    """Reads row ranges of a split's shards as Arrow tables.

    Args:
        folder: prepared data.
        shards: of one split.
        columns: to read.
    """

    def __init__(self, folder: Folder, shards: Sequence[Shard], columns: Sequence[str]) -> None:
        self.folder, self.shards, self.columns = folder, shards, list(columns)

    def read(self, ranges: Sequence[RowRange]) -> pa.Table:
        """Return the rows of all ranges, in their order; each row group is read once."""
        groups = sorted({(r.shard, r.group) for r in ranges})
        tables: dict[tuple[int, int], pa.Table] = {}
        for shard in sorted({shard for shard, _ in groups}):
            path = self.folder.locate(self.shards[shard].path)
            with pq.ParquetFile(self.folder.filesystem.open_input_file(path)) as file:
                for group in (g for s, g in groups if s == shard):
                    tables[shard, group] = file.read_row_group(
                        group, columns=self.columns, use_threads=False
                    )
        parts = [tables[r.shard, r.group].slice(r.start, r.num_rows) for r in ranges]
        return pa.concat_tables(parts)


def stored_columns(manifest: Manifest, with_image: bool = True) -> list[str]:
    """Return the shards' columns that a model needs."""
    return [KEY, *([IMAGE] if with_image else []), *manifest.numeric_columns, LABEL]


def decode(table: pa.Table, manifest: Manifest) -> Batch:
    """Return the batch of some stored rows: pixels decoded, every weight 1.

    Raises:
        ValueError: if a stored image cannot be decoded or has another size, naming the row.
    """
    columns = [
        table.column(name).to_numpy().astype(np.float32) for name in manifest.numeric_columns
    ]
    num_rows = table.num_rows
    batch = {
        NUMERIC: np.stack(columns, axis=1) if columns else np.empty((num_rows, 0), np.float32),
        LABEL: table.column(LABEL).to_numpy().astype(np.float32)[:, None],
        WEIGHT: np.ones((num_rows, 1), np.float32),
    }
    if IMAGE in table.column_names:
        shape = (manifest.image.height, manifest.image.width, 3)
        images = np.empty((num_rows, *shape), np.uint8)
        for i, content in enumerate(table.column(IMAGE)):
            try:
                image = decode_stored(content.as_py())
                if image.shape != shape:
                    raise ValueError(f"its shape is {image.shape}, the manifest says {shape}")
            except ValueError as error:
                key = table.column(KEY)[i].as_py()
                raise ValueError(
                    f"the stored image of row {key!r} cannot be used: {error}; the prepared data "
                    "is damaged, prepare it again"
                ) from error
            images[i] = image
        batch[IMAGE] = images
    return batch


class TrainingFeed:
    """The training batches of one worker, from a global step on.

    Args:
        folder: prepared data.
        manifest: of it.
        order: of its training rows.
        rank: of the worker.
        num_workers: that share the steps.
        with_image: whether the model takes images.
        prefetch_batches: to make ready ahead of the step.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        order: TrainingOrder,
        rank: int,
        num_workers: int,
        *,
        with_image: bool,
        prefetch_batches: int,
    ) -> None:
        self.manifest, self.order = manifest, order
        self.lanes = order.lanes_of(rank, num_workers)
        self.batch_size = order.global_batch_size // num_workers
        self.prefetch_batches = prefetch_batches
        self.num_tasks = _tasks_per_worker(num_workers)
        self.reader = ShardReader(
            folder, manifest.splits["train"].shards, stored_columns(manifest, with_image)
        )

    def batches(self, epochs: range) -> Iterator[Batch]:
        """Yield the batches of whole epochs, one a step, from a single Ray Data execution.

        One execution for many epochs, since every new one costs its start-up again, and the first
        rows of the next epoch are made ready while the last one is validated.
        """
        windows = self.order.windows(epochs)
        for start in range(0, len(windows), _TASKS_PER_EXECUTION):
            yield from self._window_run(windows[start : start + _TASKS_PER_EXECUTION])

    def _window_run(self, windows: Sequence[Window]) -> Iterator[Batch]:
        dataset = _tasks(len(windows), lambda i: self.window_batches(windows[i]), self)
        yield from _iterate(dataset, self.batch_size, self.prefetch_batches)

    def window_batches(self, window: Window) -> Iterator[Batch]:
        """Yield one window's batches: read, shuffle encoded rows, decode."""
        ranges = [self.order.lane_rows(window, lane) for lane in self.lanes]
        table = self.reader.read([r for lane in ranges for r in lane])
        lane_rows = window.num_steps * self.order.rows_per_lane_step
        steps_lanes = np.stack(
            [i * lane_rows + self.order.shuffle(window, lane) for i, lane in enumerate(self.lanes)],
            axis=1,
        )
        rows = steps_lanes.reshape(window.num_steps * self.batch_size)
        block_rows = _block_rows(self.manifest, self.batch_size)
        for start in range(0, len(rows), block_rows):
            yield decode(table.take(pa.array(rows[start : start + block_rows])), self.manifest)


class EvaluationFeed:
    """One worker's share of a split in stored order, again and again, in batches of one size.

    Args: as of `TrainingFeed`, and
        split: to read.
        batch_size: rows of a batch; the last one of a pass is filled with rows of weight 0.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        split: Split,
        batch_size: int,
        rank: int,
        num_workers: int,
        *,
        with_image: bool,
        prefetch_batches: int,
    ) -> None:
        self.manifest, self.batch_size = manifest, batch_size
        self.prefetch_batches = prefetch_batches
        self.num_tasks = _tasks_per_worker(num_workers)
        info = manifest.splits[split]
        self.rows = evaluation_rows(info, rank, num_workers)
        """Places of the share's rows in the split."""
        self.num_batches = -(-len(self.rows) // batch_size)
        """Batches of one pass."""
        block_rows = _block_rows(manifest, batch_size)
        task_rows = max(1, _EVALUATION_TASK_ROWS // block_rows) * block_rows
        self.tasks = [
            stored_ranges(info, self.rows[start : start + task_rows])
            for start in range(0, len(self.rows), task_rows)
        ]
        self.reader = ShardReader(folder, info.shards, stored_columns(manifest, with_image))

    def batches(self, passes: int = 1) -> Iterator[Batch]:
        """Yield every row of the share once a pass; weight 0 marks rows that only fill a batch."""
        if not self.tasks:
            return
        count = len(self.tasks)
        at_once = max(1, _TASKS_PER_EXECUTION // count)
        for start in range(0, passes, at_once):
            now = min(at_once, passes - start)
            dataset = _tasks(count * now, lambda i: self.task_batches(i % count), self)
            yield from _iterate(dataset, self.batch_size, self.prefetch_batches)

    def task_batches(self, task: int) -> Iterator[Batch]:
        """Yield the rows of one task, decoded and filled up to whole batches."""
        table = self.reader.read(self.tasks[task])
        block_rows = _block_rows(self.manifest, self.batch_size)
        for start in range(0, table.num_rows, block_rows):
            batch = decode(table.slice(start, block_rows), self.manifest)
            missing = -len(batch[WEIGHT]) % self.batch_size
            yield _padded(batch, missing) if missing else batch


def _tasks(count: int, make: Any, feed: TrainingFeed | EvaluationFeed) -> "ray.data.Dataset":
    """Return the dataset whose i-th task yields the batches `make(i)`, in order."""
    import ray.data

    def run(items: Any) -> Iterator[Any]:
        for item in items["id"]:
            yield from make(int(item))

    dataset = ray.data.range(count, override_num_blocks=count).map_batches(
        run,
        batch_size=None,
        # A task that waits until its worker takes a batch would hold a CPU that another worker's
        # task needs, while the workers wait for each other: so none is held, and the number of
        # tasks is bounded instead.
        num_cpus=0,
        concurrency=min(feed.num_tasks, count),
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    # Without this, Ray Data gathers 128 MiB of pixels before it hands over the first row.
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    return dataset


def _iterate(
    dataset: "ray.data.Dataset", batch_size: int, prefetch_batches: int
) -> Iterator[Batch]:
    batches: Any = dataset.iter_batches(
        batch_size=batch_size, batch_format="numpy", prefetch_batches=prefetch_batches
    )
    yield from batches


def _tasks_per_worker(num_workers: int) -> int:
    import ray

    total = ray.cluster_resources().get("CPU", 1)
    return max(1, min(_MAX_TASKS, int(total // num_workers) - 1))


def _block_rows(manifest: Manifest, batch_size: int) -> int:
    """Return the rows of as many whole batches as a block holds, one at least."""
    row_bytes = manifest.image.height * manifest.image.width * 3
    return max(1, _BLOCK_BYTES // (row_bytes * batch_size)) * batch_size


def _padded(batch: Batch, missing: int) -> Batch:
    filled = {
        name: np.concatenate([v, np.repeat(v[-1:], missing, axis=0)]) for name, v in batch.items()
    }
    filled[WEIGHT][len(filled[WEIGHT]) - missing :] = 0.0
    return filled
