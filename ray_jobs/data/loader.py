"""Feeds one worker with batches from prepared shards.

Rows are read in chunks (see `chunks`), still encoded: either ahead of the worker by Ray Data
(`ray_reading`), or without it, in place. Only the indices of a chunk's rows are shuffled, and rows
are decoded batch by batch, so few pixels are in memory.

    trainer   Threads of the training process decode the next batches.
    workers   Ray Data tasks, which can also run on nodes without a GPU, decode as well; pixels are
              sent through the object store.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mm_model.backbones.tokenizer import TextReader
from ray_jobs.cluster.node_inventory import current_nodes, possible_nodes
from ray_jobs.config.prepare_spec import Split
from ray_jobs.config.spec import DataSpec, RunSpec
from ray_jobs.data.batch import WEIGHT
from ray_jobs.data.cache import Cache, Group, cacheable_groups, open_cache
from ray_jobs.data.chunks import (
    Chunk,
    Chunks,
    EvaluationChunks,
    GroupKey,
    Place,
    ReadPlan,
    TrainingChunks,
    keys_of,
)
from ray_jobs.data.decoder import Batch, RowDecoder
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.prefetch import prefetch, prefetch_map
from ray_jobs.data.ray_reading import (
    Decode,
    GroupStream,
    ReservedCpus,
    iterate_rows,
    places_dataset,
    read_dataset,
)
from ray_jobs.data.reader import ShardReader, StoredRows
from ray_jobs.data.sampler import TrainingSampler
from ray_jobs.data.text_input import text_reader
from ray_jobs.storage.folder import Folder

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

_ROWS_PER_CALL = {"jpeg": 8, "raw": 64}
"""Rows per call of a decoding thread, by image encoding: copying raw pixels is so cheap that it
needs larger calls."""
_ROWS_READ = 256
"""Maximum number of rows that a worker reads at the same time, unless a chunk has more."""
_MAX_READS = 8
"""Maximum number of chunks that a worker reads at the same time."""


@dataclass(frozen=True)
class ReadAhead:
    """The rows of one worker and split that Ray Data reads ahead.

    Args:
        items: What `iterate_rows` returns for the dataset of the rows.
        start: First step or pass in them.
        is_shared: Whether all workers use the same cache.
    """

    items: Iterator[Any]
    start: int
    is_shared: bool = True


@dataclass(frozen=True)
class FeedOptions:
    """Options of a feed; they do not change the order of rows.

    Args:
        with_image: Whether the model uses images or image features.
        text: Reader of the texts that the model uses, or None.
        data: The `data` section.
        decode: Where images are decoded.
        threads: Number of decoding threads if the trainer decodes.
        cache: Cache of decoded row groups if the trainer decodes.
        ahead: By split, the rows that Ray Data reads ahead; other rows are read in place.
    """

    with_image: bool = True
    text: TextReader | None = None
    data: DataSpec = field(default_factory=DataSpec)
    decode: Decode = "trainer"
    threads: int = 1
    cache: Cache | None = None
    ahead: Mapping[Split, ReadAhead] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: RunSpec, manifest: Manifest, decode: Decode) -> "FeedOptions":
        """Return the options of a training run without a cache."""
        return cls(
            with_image=spec.model.image.kind != "none",
            text=text_reader(spec, manifest),
            data=spec.data,
            decode=decode,
            threads=max(math.ceil(spec.train.cpus_per_worker), 1),
        )


def feed_options(spec: RunSpec, manifest: Manifest, feed: Mapping[str, Any]) -> FeedOptions:
    """Return the feed options of a training worker, with its cache open.

    Args:
        spec: The run's settings.
        manifest: The manifest of the prepared data.
        feed: What all workers share: `decode`, `cache` and `index`; other keys are ignored.
    """
    cache = open_cache(feed["cache"], manifest, spec.data.image_size, feed["index"])
    return replace(FeedOptions.of(spec, manifest, feed["decode"]), cache=cache)


class Feed:
    """The batches of one worker and split.

    Args:
        folder: Folder of the prepared data.
        manifest: The manifest of the prepared data.
        chunks: The chunks of the worker.
        num_workers: Number of workers.
        options: Options of the feed.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        chunks: Chunks,
        num_workers: int,
        options: FeedOptions,
    ) -> None:
        self.manifest, self.chunks, self.options = manifest, chunks, options
        self.num_workers = num_workers
        self.decoder = RowDecoder(
            manifest,
            with_image=options.with_image,
            size=options.data.image_size,
            text=options.text,
        )
        self.cacheable = frozenset() if options.cache is None else self._cacheable()
        # Folds have different rows of the same row groups.
        self._cache_name = chunks.split + manifest.splits[chunks.split].selection
        shards = manifest.splits[chunks.split].shards
        self.reader = ShardReader(folder, shards, self.decoder.columns)

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """Yield this worker's batches from step or pass `start` to `stop` (exclusive)."""
        if self.options.decode == "trainer" or start == stop:
            yield from self._by_threads(start, stop)
            return
        ahead = self.options.ahead.get(self.chunks.split)
        if ahead is None:
            plan = self.plan(start, stop)
            places = places_dataset(list(plan.places()), self.options.decode)
            ahead = ReadAhead(self.iterate(self.dataset(places, plan).iterator()), start)
        if start < ahead.start:
            yield from self._by_threads(start, ahead.start)
        skipped = self.chunks.num_batches(ahead.start, max(start, ahead.start))
        yield from islice(ahead.items, skipped, None)

    # -- in Ray Data tasks ------------------------------------------------------------------------

    def plan(
        self, start: int, stop: int, is_cached: bool = False, is_shared: bool = True
    ) -> ReadPlan:
        """Return what Ray Data reads ahead of this worker.

        Args:
            start: First step or pass.
            stop: Last step or pass (exclusive).
            is_cached: Whether the worker has a cache.
            is_shared: Whether all workers use the same cache.
        """
        cacheable = self._cacheable() if is_cached else frozenset()
        # Each worker validates the same rows in each epoch.
        return ReadPlan(
            self.chunks, start, stop, cacheable, is_shared or self.chunks.split != "train"
        )

    def dataset(
        self, places: "Dataset", plan: ReadPlan, reserved: ReservedCpus | None = None
    ) -> "Dataset":
        """Return the dataset with which Ray Data reads this worker's rows ahead.

        Args:
            places: Dataset of the places of the chunks.
            plan: What is read.
            reserved: CPUs for the tasks, or None.
        """
        return read_dataset(
            places,
            self.reader,
            plan,
            self.decoder if self.options.decode == "workers" else None,
            self.num_workers,
            self.options.data,
            self.num_reads,
            reserved,
        )

    @property
    def num_reads(self) -> int:
        """Number of chunks that are read at the same time.

        Requests to an object store take longer than the transfer of a small chunk, such as that of
        one of many workers.
        """
        data, chunk_rows = self.options.data, self.chunks.chunk_rows
        row_bytes = self.manifest.splits[self.chunks.split].row_bytes
        # As in `DataSpec.window_rows`, four chunks of the same size may be in memory.
        buffer_rows = data.buffer_bytes / (4 * row_bytes * self.num_workers)
        return max(1, min(_MAX_READS, min(_ROWS_READ, int(buffer_rows)) // chunk_rows))

    def iterate(self, rows: "DataIterator") -> Iterator[Any]:
        """Start to read the rows of this worker's dataset."""
        options = self.options
        return iterate_rows(
            rows, options.decode, self.chunks.batch_size, options.data.prefetch_batches
        )

    def _cacheable(self) -> frozenset[GroupKey]:
        groups = cacheable_groups(self.options.data, self.manifest, self.decoder.row_bytes)
        return frozenset((shard, g) for split, shard, g in groups if split == self.chunks.split)

    # -- in threads of this process ---------------------------------------------------------------

    def _by_threads(self, start: int, stop: int) -> Iterator[Batch]:
        import cv2

        # Images are decoded in parallel, so one OpenCV thread per image is fastest.
        cv2.setNumThreads(1)
        options = self.options
        with (
            ThreadPoolExecutor(options.threads, "feed-decode") as decoders,
            closing(prefetch(self._read(start, stop, decoders), 1)) as read,
        ):
            yield from self._decode(read, decoders)

    def _read(
        self, start: int, stop: int, decoders: ThreadPoolExecutor
    ) -> Iterator[tuple[Chunk, StoredRows]]:
        """Yield chunks with their rows; images are encoded, or decoded if they are cached."""
        previous: dict[GroupKey, pa.Table] = {}
        delivered = self._delivered(start)
        for place in self.chunks.places(start, stop):
            chunk = self.chunks.chunk(place, start, stop)
            wanted = keys_of(chunk.ranges)
            new = delivered(place)
            # Consecutive windows share row groups.
            tables = {key: previous[key] for key in (wanted & previous.keys()) - new.keys()}
            tables |= self._groups(sorted(wanted - tables.keys()), new, decoders)
            previous = tables
            yield chunk, StoredRows.of(chunk.ranges, tables)

    def _delivered(self, start: int) -> Callable[[Place], dict[GroupKey, pa.Table]]:
        """Return a function that returns the row groups that Ray Data has read for a chunk.

        Must be called with the place of each chunk from `start` on, in order.
        """
        ahead = self.options.ahead.get(self.chunks.split)
        if ahead is None or self.options.decode == "workers":
            return lambda place: {}
        stream = GroupStream(ahead.items, self.reader)
        plan = self.plan(ahead.start, 1 << 62, self.options.cache is not None, ahead.is_shared)
        planned = plan.places()
        upcoming = next(planned, None)

        def deliver(place: Place) -> dict[GroupKey, pa.Table]:
            nonlocal upcoming
            tables: dict[GroupKey, pa.Table] = {}
            while upcoming is not None and upcoming <= place:
                if keys := plan.missing(upcoming):
                    tables = stream.take(keys)
                if upcoming < place:
                    tables = {}
                upcoming = next(planned, None)
            return tables

        return deliver

    def _groups(
        self,
        keys: Sequence[GroupKey],
        new: Mapping[GroupKey, pa.Table],
        decoders: ThreadPoolExecutor,
    ) -> dict[GroupKey, pa.Table]:
        """Return row groups from `new`, else from the cache, else read in place."""
        cache, tables = self.options.cache, dict[GroupKey, pa.Table]()
        split = self._cache_name
        names: list[Group] = [(split, *k) for k in keys if k in self.cacheable and k not in new]
        if cache is not None and names:
            tables = {(shard, g): table for (_, shard, g), table in cache.get(names).items()}
        missing = [key for key in keys if key not in tables and key not in new]

        def decode_and_cache(item: tuple[GroupKey, pa.Table]) -> tuple[GroupKey, pa.Table]:
            key, table = item
            if cache is not None and key in self.cacheable:
                table = self.decoder.decode_images(table)
                cache.put((split, *key), table)
            return key, table

        items = (dict(new) | self.reader.read_keys(missing)).items()
        return tables | dict(prefetch_map(decode_and_cache, items, decoders, self.options.threads))

    def _decode(
        self, read: Iterator[tuple[Chunk, StoredRows]], decoders: ThreadPoolExecutor
    ) -> Iterator[Batch]:
        """Yield batches while threads decode the next ones."""
        size = _ROWS_PER_CALL[self.decoder.manifest.image.encoding]
        depth = max(self.options.data.prefetch_batches, 1) * -(-self.chunks.batch_size // size)

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


class TrainingFeed(Feed):
    """The training batches of one worker, by global step."""

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        sampler: TrainingSampler,
        rank: int,
        num_workers: int,
        options: FeedOptions,
    ) -> None:
        self.sampler = sampler
        chunks = TrainingChunks(sampler, rank, num_workers)
        super().__init__(folder, manifest, chunks, num_workers, options)


class EvaluationFeed(Feed):
    """One worker's rows of a split in stored order, by pass.

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
        info = manifest.splits[split]
        chunks = EvaluationChunks(split, info, batch_size, rank, num_workers, options.data)
        super().__init__(folder, manifest, chunks, num_workers, options)
        self.rows = chunks.rows
        """Indices of the worker's rows in the split."""
        self.num_batches = chunks.num_batches(0, 1)
        """Number of batches of one pass."""


def make_feeds(
    spec: RunSpec, manifest: Manifest, options: FeedOptions, rank: int, num_workers: int
) -> tuple[TrainingFeed, EvaluationFeed]:
    """Return the feeds of a training worker: training and validation."""
    data, worker = (Folder(spec.data.prepared), manifest), (rank, num_workers, options)
    size = spec.train.global_batch_size // num_workers
    return (
        TrainingFeed(*data, TrainingSampler.of_run(spec, manifest), *worker),
        EvaluationFeed(*data, "validation", size, *worker),
    )


def _batches_without_images(
    chunk: Chunk, stored: StoredRows, decoder: RowDecoder
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield each batch of a chunk with uninitialized images, and the indices of its rows."""
    for step, rows in enumerate(chunk.batches_SB):
        batch = decoder.make_batch(stored, rows)
        batch[WEIGHT][chunk.is_padding(step)] = 0.0
        yield batch, rows


def choose_decode(spec: DataSpec, use_gpu: bool) -> Decode:
    """Return where to decode on this cluster; resolve `data.decode: auto`.

    Nodes without GPUs have idle CPUs, and GPU nodes have few CPUs per GPU.
    """
    if spec.decode != "auto":
        return spec.decode
    if not use_gpu or spec.cache not in ("auto", "none"):
        return "trainer"
    nodes = [*current_nodes(), *possible_nodes()]
    has_cpu_nodes = any(not node.get("GPU") and node.get("CPU") for node in nodes)
    return "workers" if has_cpu_nodes else "trainer"
