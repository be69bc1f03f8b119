"""Prepared shards → the batches of one worker, decoded by its own threads or by Ray Data tasks.

Reads: the shards that a manifest lists.  Leaves: batches as `ray_jobs.data.batch` defines them.

What is large is made last and kept shortest. A *chunk* is what is read at once, encoded: a window
of the training order, or some rows of an evaluation. Its rows are shuffled as references, and
decoded batch by batch.

    trainer   threads of the training process read the next chunk, and decode the next batches;
              nothing crosses a process. What `python -m benchmarks.feed` shows to be fastest.
    workers   Ray Data tasks, also on nodes without a GPU, read and decode; pixels cross the object
              store.
"""

import math
import pickle
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from ray_jobs.config.spec import DataSpec, Split
from ray_jobs.data.batch import WEIGHT
from ray_jobs.data.cache import Cache, Group, kept_groups
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.prefetch import prefetch, prefetch_map
from ray_jobs.data.reader import Batch, RowDecoder, ShardReader, StoredRows, groups_of
from ray_jobs.data.sampler import RowRange, TrainingSampler, evaluation_rows, stored_ranges
from ray_jobs.storage.folder import Folder

if TYPE_CHECKING:
    import ray.data

Decode = Literal["workers", "trainer"]

_BLOCK_BYTES = 8 << 20
_EVALUATION_PIECE_ROWS = 512
_TASKS_PER_EXECUTION = 2000
"""Ray Data plans all tasks of an execution before the first one starts."""
_MAX_TASKS = 8
_READ_THREADS = 8
"""Shards that are read at once: what hides a store's latency."""
_ROWS_PER_CALL = {"jpeg": 8, "raw": 64}
"""Rows that a thread fills in before it takes the next few, by what images are stored as: pixels
that are only copied would be held up more by the changes of threads."""


@dataclass(frozen=True)
class ReadChunk:
    """What is read at once, and the batches that are made of it."""

    ranges: Sequence[RowRange]
    batches_SB: np.ndarray
    """For each step the places of its rows among those of `ranges`."""
    num_filled: int = 0
    """Rows at the end of the last batch that only fill it: weight 0."""


@dataclass(frozen=True)
class FeedOptions:
    """How a feed works; none of it changes what it yields.

    Args:
        with_image: whether the model takes images, or features of them.
        data: settings of the data.
        decode: where.
        threads: that decode, of the training process.
        cache: of decoded row groups; only the trainer's threads use it.
    """

    with_image: bool = True
    data: DataSpec = field(default_factory=DataSpec)
    decode: Decode = "trainer"
    threads: int = 1
    cache: Cache | None = None


class _Feed:
    """Reads and decodes the chunks of one split for one worker."""

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        split: Split,
        batch_size: int,
        num_workers: int,
        options: FeedOptions,
    ) -> None:
        self.split: Split = split
        self.batch_size, self.options = batch_size, options
        self.num_workers = num_workers
        self.decoder = RowDecoder(
            manifest, with_image=options.with_image, size=options.data.image_size
        )
        self.kept: frozenset[Group] = frozenset()
        """Row groups that the cache may keep."""
        if options.cache is not None:
            self.kept = kept_groups(options.data, manifest, self.decoder.row_bytes)
        shards = manifest.splits[split].shards
        self.reader = ShardReader(folder, shards, self.decoder.columns)
        self.task = partial(_run_task, self.reader, self.decoder)
        """What a Ray Data task does with the chunks it is handed."""

    def _stream(self, chunks: Iterator[ReadChunk]) -> Generator[Batch]:
        """Yield the batches of chunks, in order."""
        if self.options.decode == "workers":
            while some := list(islice(chunks, _TASKS_PER_EXECUTION)):
                yield from self._by_tasks(some)
        else:
            yield from self._by_threads(chunks)

    # -- in threads of this process ---------------------------------------------------------------

    def _by_threads(self, chunks: Iterator[ReadChunk]) -> Iterator[Batch]:
        import cv2

        # One thread an image; more of them would only wait for each other.
        cv2.setNumThreads(1)
        options = self.options
        with (
            ThreadPoolExecutor(_READ_THREADS, "feed-read") as readers,
            ThreadPoolExecutor(options.threads, "feed-decode") as decoders,
            closing(prefetch(self._read(chunks, readers, decoders), 1)) as read,
        ):
            yield from self._decode(read, decoders)

    def _read(
        self, chunks: Iterator[ReadChunk], readers: ThreadPoolExecutor, decoders: ThreadPoolExecutor
    ) -> Iterator[tuple[ReadChunk, StoredRows]]:
        """Yield chunks with their rows, encoded, or decoded where the cache has them."""
        held: dict[tuple[int, int], pa.Table] = {}
        for chunk in chunks:
            wanted = {(s, g) for s, gs in groups_of(chunk.ranges).items() for g in gs}
            # The next window goes on in the row groups that this one ends in.
            tables = {key: held[key] for key in wanted & held.keys()}
            tables |= self._read_groups(sorted(wanted - tables.keys()), readers, decoders)
            held = tables
            yield chunk, StoredRows.of(chunk.ranges, tables)

    def _read_groups(
        self,
        keys: Sequence[tuple[int, int]],
        readers: ThreadPoolExecutor,
        decoders: ThreadPoolExecutor,
    ) -> dict[tuple[int, int], pa.Table]:
        cache = self.options.cache
        found: dict[tuple[int, int], pa.Table] = {}
        if cache is not None:
            named: list[Group] = [(self.split, *key) for key in keys]
            cached = cache.get([name for name in named if name in self.kept])
            found = {(shard, group): table for (_, shard, group), table in cached.items()}
        by_shard: dict[int, list[int]] = {}
        for shard, group in keys:
            if (shard, group) not in found:
                by_shard.setdefault(shard, []).append(group)

        def read(item: tuple[int, list[int]]) -> list[tuple[tuple[int, int], pa.Table]]:
            shard, groups = item
            tables = self.reader.read_groups(shard, groups)
            return [((shard, g), t) for g, t in zip(groups, tables, strict=True)]

        def keep(item: tuple[tuple[int, int], pa.Table]) -> tuple[tuple[int, int], pa.Table]:
            key, table = item
            name: Group = (self.split, *key)
            if cache is not None and name in self.kept:
                table = self.decoder.decoded(table)
                cache.put(name, table)
            return key, table

        read_groups = prefetch_map(read, by_shard.items(), readers, _READ_THREADS)
        flat = (pair for pairs in read_groups for pair in pairs)
        return found | dict(prefetch_map(keep, flat, decoders, self.options.threads))

    def _decode(
        self, read: Iterator[tuple[ReadChunk, StoredRows]], decoders: ThreadPoolExecutor
    ) -> Iterator[Batch]:
        """Yield batches, while threads decode the next ones."""
        size = _ROWS_PER_CALL[self.decoder.manifest.image.encoding]
        depth = max(self.options.data.prefetch_batches, 1) * -(-self.batch_size // size)

        def calls() -> Iterator[tuple[Batch, StoredRows, np.ndarray, int, bool]]:
            for chunk, stored in read:
                for batch, rows in _unfilled(chunk, stored, self.decoder):
                    for first in range(0, len(rows), size):
                        some = rows[first : first + size]
                        yield batch, stored, some, first, first + len(some) == len(rows)

        def fill(call: tuple[Batch, StoredRows, np.ndarray, int, bool]) -> Batch | None:
            batch, stored, rows, first, last = call
            self.decoder.fill(batch, stored, rows, first)
            return batch if last else None

        for batch in prefetch_map(fill, calls(), decoders, depth):
            # In order: a batch's last call comes back when all of its calls have.
            if batch is not None:
                yield batch

    # -- in Ray Data tasks ------------------------------------------------------------------------

    def _by_tasks(self, chunks: Sequence[ReadChunk]) -> Iterator[Batch]:
        """Yield the batches of chunks from one Ray Data execution.

        One for many epochs, since every new one costs its start-up again, and the first rows of the
        next epoch are made ready while the last one is validated.
        """
        batches: Any = self._dataset(chunks).iter_batches(
            batch_size=self.batch_size,
            batch_format="numpy",
            prefetch_batches=self.options.data.prefetch_batches,
        )
        yield from batches

    def _dataset(self, chunks: Sequence[ReadChunk]) -> "ray.data.Dataset":
        """Return the dataset whose i-th task yields the batches of the i-th chunk, in order."""
        import ray.data
        from ray.data import ExecutionResources

        count = len(chunks)
        # As rows, a block and so a task each: in the function they would go to every task.
        items = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
        dataset = ray.data.from_items(items, override_num_blocks=count).map_batches(
            self.task,
            batch_size=None,
            # A task that waits until its worker takes a batch would hold a CPU that another
            # worker's task needs, while the workers wait for each other: so none is held, and the
            # number of tasks is bounded instead.
            num_cpus=0,
            concurrency=min(_tasks_per_worker(self.num_workers), count),
        )
        context = dataset.context
        context.execution_options.preserve_order = True
        if (limit := self.options.data.object_store_memory) is not None:
            context.execution_options.resource_limits = ExecutionResources(
                object_store_memory=limit / self.num_workers
            )
        # Without this, Ray Data gathers 128 MiB of pixels before it hands over the first row.
        context.target_max_block_size = _BLOCK_BYTES
        context.enable_progress_bars = False
        return dataset


class TrainingFeed(_Feed):
    """The training batches of one worker, from any global step on.

    Args:
        folder: prepared data.
        manifest: of it.
        order: of its training rows.
        rank: of the worker.
        num_workers: that share the steps.
        options: how it works.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        order: TrainingSampler,
        rank: int,
        num_workers: int,
        options: FeedOptions,
    ) -> None:
        batch_size = order.global_batch_size // num_workers
        super().__init__(folder, manifest, "train", batch_size, num_workers, options)
        self.order = order
        self.streams = order.streams_of(rank, num_workers)

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """Yield this worker's share of the global steps `start` to `stop` (exclusive)."""
        return self._stream(self.chunks(start, stop))

    def chunks(self, start: int, stop: int) -> Iterator[ReadChunk]:
        """Yield the windows that these steps lie in; of a window all rows are read."""
        for window in self.order.windows(start, stop):
            ranges = [r for stream in self.streams for r in self.order.stream_rows(window, stream)]
            stream_rows = window.num_steps * self.order.rows_per_stream_step
            rows_by_step = np.stack(
                [
                    i * stream_rows + self.order.shuffle(window, x)
                    for i, x in enumerate(self.streams)
                ],
                axis=1,
            )
            steps = rows_by_step.reshape(window.num_steps, self.batch_size)
            yield ReadChunk(ranges, steps[window.steps_to_take(start, stop)])


class EvaluationFeed(_Feed):
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
        options: FeedOptions,
    ) -> None:
        super().__init__(folder, manifest, split, batch_size, num_workers, options)
        info = manifest.splits[split]
        self.rows = evaluation_rows(info, rank, num_workers)
        """Places of the share's rows in the split."""
        self.num_batches = -(-len(self.rows) // batch_size)
        """Batches of one pass."""
        piece_rows = max(1, _EVALUATION_PIECE_ROWS // batch_size) * batch_size
        starts = range(0, len(self.rows), piece_rows)
        self.chunks = [
            _in_order(stored_ranges(info, self.rows[start : start + piece_rows]), batch_size)
            for start in starts
        ]
        """What one pass reads."""

    def batches(self, passes: int = 1) -> Generator[Batch]:
        """Yield every row of the share once a pass; weight 0 marks rows that only fill a batch."""
        return self._stream(chunk for _ in range(passes) for chunk in self.chunks)


def _unfilled(
    chunk: ReadChunk, stored: StoredRows, decoder: RowDecoder
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield the batches of a chunk without their pixels, and the rows they are of."""
    last = len(chunk.batches_SB) - 1
    for step, rows in enumerate(chunk.batches_SB):
        batch = decoder.batch(stored, rows)
        if step == last and chunk.num_filled:
            batch[WEIGHT][-chunk.num_filled :] = 0.0
        yield batch, rows


def _run_task(reader: ShardReader, decoder: RowDecoder, items: Any) -> Iterator[Batch]:
    for item in items["chunk"]:
        chunk: ReadChunk = pickle.loads(item)
        stored = reader.read(chunk.ranges)
        for batch, rows in _unfilled(chunk, stored, decoder):
            decoder.fill(batch, stored, rows)
            yield batch


def _in_order(ranges: Sequence[RowRange], batch_size: int) -> ReadChunk:
    """Return the chunk of some rows in their order, the last one repeated to fill a batch."""
    num_rows = sum(r.num_rows for r in ranges)
    num_batches = -(-num_rows // batch_size)
    rows = np.minimum(np.arange(num_batches * batch_size), num_rows - 1)
    return ReadChunk(ranges, rows.reshape(num_batches, batch_size), len(rows) - num_rows)


def choose_decode(spec: DataSpec, use_gpu: bool) -> Decode:
    """Return what `data.decode` means on this cluster: `workers` where it has nodes without GPUs.

    There the CPUs beside the GPUs are few, and those of the other nodes are free.
    """
    if spec.decode != "auto":
        return spec.decode
    if not use_gpu or spec.cache not in ("auto", "none"):
        return "trainer"
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return (
        "workers" if any("GPU" not in node and node.get("CPU", 0) for node in nodes) else "trainer"
    )


def _tasks_per_worker(num_workers: int) -> int:
    import ray

    total = ray.cluster_resources().get("CPU", 1)
    return max(1, min(_MAX_TASKS, math.floor(total / num_workers) - 1))
