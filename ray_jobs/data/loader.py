"""Feeds one worker with batches from prepared shards.

A read chunk consists of the rows that are read at once, still encoded: a window of the training
order, or some rows of an evaluation. Only the indices of its rows are shuffled, and rows are
decoded batch by batch, so few pixels are in memory.

    trainer   Threads of the training process read the next chunk and decode the next batches. No
              data is sent between processes; this is the fastest according to `python -m
              benchmarks.feed`.
    workers   Ray Data tasks, which can also run on nodes without a GPU, read and decode; pixels are
              sent through the object store.
"""

import math
import pickle
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ray_jobs.config.prepare_spec import Split
from ray_jobs.config.spec import DataSpec, RunSpec
from ray_jobs.data.batch import WEIGHT
from ray_jobs.data.cache import Cache, Group, cacheable_groups, open_cache
from ray_jobs.data.decoder import Batch, RowDecoder
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.prefetch import prefetch, prefetch_map
from ray_jobs.data.reader import ShardReader, StoredRows, groups_by_shard
from ray_jobs.data.sampler import RowRange, TrainingSampler, evaluation_rows, stored_ranges
from ray_jobs.storage.folder import Folder

Decode = Literal["workers", "trainer"]
_GroupKey = tuple[int, int]
"""Shard and row group."""

_BLOCK_BYTES = 8 << 20
_EVALUATION_CHUNK_ROWS = 512
_TASKS_PER_EXECUTION = 2000
"""Maximum, because Ray Data plans all tasks of an execution before it starts the first one."""
_MAX_TASKS = 8
_READ_THREADS = 8
"""Number of shards that are read concurrently, to hide the latency of a remote store."""
_ROWS_PER_CALL = {"jpeg": 8, "raw": 64}
"""Rows per call of a decoding thread, by image encoding: copying raw pixels is so cheap that it
needs larger calls."""


@dataclass(frozen=True)
class ReadChunk:
    """Rows that are read at once and their batches: S steps of B rows."""

    ranges: Sequence[RowRange]
    batches_SB: np.ndarray
    """Indices into the rows of `ranges`."""
    num_padding: int = 0
    """Number of rows with weight 0 that only fill the last batch."""


@dataclass(frozen=True)
class FeedOptions:
    """Options of a feed; they do not change the order of rows.

    Args:
        with_image: Whether the model uses images or image features.
        data: The `data` section.
        decode: Where images are decoded.
        threads: Number of decoding threads if the trainer decodes.
        cache: Cache of decoded row groups if the trainer decodes.
    """

    with_image: bool = True
    data: DataSpec = field(default_factory=DataSpec)
    decode: Decode = "trainer"
    threads: int = 1
    cache: Cache | None = None


def feed_options(spec: RunSpec, manifest: Manifest, feed: Mapping[str, Any]) -> FeedOptions:
    """Return the feed options of a training worker, with its cache open.

    Args:
        spec: The run's settings.
        manifest: The manifest of the prepared data.
        feed: What all workers share: `decode`, `cache` and `index`; other keys are ignored.
    """
    return FeedOptions(
        data=spec.data,
        decode=feed["decode"],
        threads=max(math.ceil(spec.train.cpus_per_worker), 1),
        cache=open_cache(feed["cache"], manifest, spec.data.image_size, feed["index"]),
    )


class _Feed:
    """Reads and decodes one split for one worker."""

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
        self.cacheable: frozenset[Group] = frozenset()
        if options.cache is not None:
            self.cacheable = cacheable_groups(options.data, manifest, self.decoder.row_bytes)
        shards = manifest.splits[split].shards
        self.reader = ShardReader(folder, shards, self.decoder.columns)
        self.task = partial(_run_task, self.reader, self.decoder)

    def _stream(self, chunks: Iterator[ReadChunk]) -> Generator[Batch]:
        """Yield the batches of chunks, in order."""
        if self.options.decode == "workers":
            while tasks := list(islice(chunks, _TASKS_PER_EXECUTION)):
                yield from self._by_tasks(tasks)
        else:
            yield from self._by_threads(chunks)

    # -- in threads of this process ---------------------------------------------------------------

    def _by_threads(self, chunks: Iterator[ReadChunk]) -> Iterator[Batch]:
        import cv2

        # Images are decoded in parallel, so one OpenCV thread per image is fastest.
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
        """Yield chunks with their rows; images are encoded, or decoded if they are cached."""
        previous: dict[_GroupKey, pa.Table] = {}
        for chunk in chunks:
            wanted = {(rows.shard, rows.group) for rows in chunk.ranges}
            # Consecutive windows share row groups.
            tables = {key: previous[key] for key in wanted & previous.keys()}
            tables |= self._read_groups(sorted(wanted - tables.keys()), readers, decoders)
            previous = tables
            yield chunk, StoredRows.of(chunk.ranges, tables)

    def _read_groups(
        self, keys: Sequence[_GroupKey], readers: ThreadPoolExecutor, decoders: ThreadPoolExecutor
    ) -> dict[_GroupKey, pa.Table]:
        cache, tables = self.options.cache, dict[_GroupKey, pa.Table]()
        if cache is not None:
            names: list[Group] = [(self.split, *key) for key in keys]
            cached = cache.get([name for name in names if name in self.cacheable])
            tables = {(shard, group): table for (_, shard, group), table in cached.items()}
        missing = [key for key in keys if key not in tables]

        def decode_and_cache(item: tuple[_GroupKey, pa.Table]) -> tuple[_GroupKey, pa.Table]:
            key, table = item
            name: Group = (self.split, *key)
            if cache is not None and name in self.cacheable:
                table = self.decoder.decode_images(table)
                cache.put(name, table)
            return key, table

        by_shard = groups_by_shard(missing).items()
        read = prefetch_map(
            lambda item: self.reader.read_groups(*item), by_shard, readers, _READ_THREADS
        )
        items = zip(missing, chain.from_iterable(read), strict=True)
        return tables | dict(prefetch_map(decode_and_cache, items, decoders, self.options.threads))

    def _decode(
        self, read: Iterator[tuple[ReadChunk, StoredRows]], decoders: ThreadPoolExecutor
    ) -> Iterator[Batch]:
        """Yield batches while threads decode the next ones."""
        size = _ROWS_PER_CALL[self.decoder.manifest.image.encoding]
        depth = max(self.options.data.prefetch_batches, 1) * -(-self.batch_size // size)

        def calls() -> Iterator[tuple[Batch, StoredRows, np.ndarray, int, bool]]:
            for chunk, stored in read:
                for batch, rows in _batches_without_images(chunk, stored, self.decoder):
                    for first in range(0, len(rows), size):
                        part = rows[first : first + size]
                        yield batch, stored, part, first, first + len(part) == len(rows)

        def fill(call: tuple[Batch, StoredRows, np.ndarray, int, bool]) -> Batch | None:
            batch, stored, rows, first, last = call
            self.decoder.fill_images(batch, stored, rows, first)
            return batch if last else None

        for batch in prefetch_map(fill, calls(), decoders, depth):
            # Results come in order, so all calls of a batch are done when its last one is.
            if batch is not None:
                yield batch

    # -- in Ray Data tasks ------------------------------------------------------------------------

    def _by_tasks(self, chunks: Sequence[ReadChunk]) -> Iterator[Batch]:
        """Yield the batches of chunks from one Ray Data execution with a task per chunk.

        An execution spans epochs: it starts only once, and it prefetches rows of the next epoch
        during validation.
        """
        import ray.data
        from ray.data import ExecutionResources

        count, cpus = len(chunks), ray.cluster_resources().get("CPU", 1)
        tasks_per_worker = math.floor(cpus / self.num_workers) - 1
        # Each chunk is one row of the dataset, with its own block and task. If the mapped function
        # contained the chunks, every task would receive all of them.
        items = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
        dataset = ray.data.from_items(items, override_num_blocks=count).map_batches(
            self.task,
            batch_size=None,
            # Workers wait for each other in each step. A task that waits for its worker must not
            # hold a CPU that another worker's task needs; `concurrency` limits the tasks instead.
            num_cpus=0,
            concurrency=max(1, min(_MAX_TASKS, tasks_per_worker, count)),
        )
        context = dataset.context
        context.execution_options.preserve_order = True
        if (limit := self.options.data.object_store_memory) is not None:
            context.execution_options.resource_limits = ExecutionResources(
                object_store_memory=limit / self.num_workers
            )
        # By default, Ray Data collects 128 MiB of pixels before it returns the first row.
        context.target_max_block_size = _BLOCK_BYTES
        context.enable_progress_bars = False
        batches: Any = dataset.iter_batches(
            batch_size=self.batch_size,
            batch_format="numpy",
            prefetch_batches=self.options.data.prefetch_batches,
        )
        yield from batches


class TrainingFeed(_Feed):
    """The training batches of one worker."""

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        sampler: TrainingSampler,
        rank: int,
        num_workers: int,
        options: FeedOptions,
    ) -> None:
        batch_size = sampler.global_batch_size // num_workers
        super().__init__(folder, manifest, "train", batch_size, num_workers, options)
        self.sampler = sampler
        self.streams = sampler.streams_of(rank, num_workers)

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """Yield this worker's batches of the global steps `start` to `stop` (exclusive)."""
        return self._stream(self.chunks(start, stop))

    def chunks(self, start: int, stop: int) -> Iterator[ReadChunk]:
        """Yield the chunks of these steps; each has all rows of its window."""
        for window in self.sampler.windows(start, stop):
            ranges = [
                r for stream in self.streams for r in self.sampler.stream_rows(window, stream)
            ]
            stream_rows = window.num_steps * self.sampler.rows_per_stream_step
            by_stream = [
                i * stream_rows + self.sampler.shuffle(window, stream)
                for i, stream in enumerate(self.streams)
            ]
            steps = np.stack(by_stream, axis=1).reshape(window.num_steps, self.batch_size)
            yield ReadChunk(ranges, steps[window.steps_to_take(start, stop)])


class EvaluationFeed(_Feed):
    """One worker's rows of a split in stored order.

    The last batch of a pass is padded with rows of weight 0.
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
        """Indices of the worker's rows in the split."""
        self.num_batches = -(-len(self.rows) // batch_size)
        """Number of batches of one pass."""
        chunk_rows = max(1, _EVALUATION_CHUNK_ROWS // batch_size) * batch_size
        self.chunks = [
            _padded_chunk(stored_ranges(info, self.rows[start : start + chunk_rows]), batch_size)
            for start in range(0, len(self.rows), chunk_rows)
        ]
        """Chunks of one pass."""

    def batches(self, passes: int = 1) -> Generator[Batch]:
        """Yield batches with each of the worker's rows once per pass; padding has weight 0."""
        return self._stream(chunk for _ in range(passes) for chunk in self.chunks)


def _batches_without_images(
    chunk: ReadChunk, stored: StoredRows, decoder: RowDecoder
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield each batch of a chunk with uninitialized images, and the indices of its rows."""
    last = len(chunk.batches_SB) - 1
    for step, rows in enumerate(chunk.batches_SB):
        batch = decoder.make_batch(stored, rows)
        if step == last and chunk.num_padding:
            batch[WEIGHT][-chunk.num_padding :] = 0.0
        yield batch, rows


def _run_task(reader: ShardReader, decoder: RowDecoder, items: Any) -> Iterator[Batch]:
    """Yield the batches of the chunks in the block of a Ray Data task."""
    for item in items["chunk"]:
        chunk: ReadChunk = pickle.loads(item)
        stored = reader.read(chunk.ranges)
        for batch, rows in _batches_without_images(chunk, stored, decoder):
            decoder.fill_images(batch, stored, rows)
            yield batch


def _padded_chunk(ranges: Sequence[RowRange], batch_size: int) -> ReadChunk:
    """Return a chunk of rows in order; repeat the last row to fill the last batch."""
    num_rows = sum(r.num_rows for r in ranges)
    num_batches = -(-num_rows // batch_size)
    rows = np.minimum(np.arange(num_batches * batch_size), num_rows - 1)
    return ReadChunk(ranges, rows.reshape(num_batches, batch_size), len(rows) - num_rows)


def choose_decode(spec: DataSpec, use_gpu: bool) -> Decode:
    """Return where to decode on this cluster; resolve `data.decode: auto`.

    Nodes without GPUs have idle CPUs, and GPU nodes have few CPUs per GPU.
    """
    if spec.decode != "auto":
        return spec.decode
    if not use_gpu or spec.cache not in ("auto", "none"):
        return "trainer"
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has_cpu_nodes = any("GPU" not in node and node.get("CPU", 0) for node in nodes)
    return "workers" if has_cpu_nodes else "trainer"
