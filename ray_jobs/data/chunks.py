"""Divides the rows of a worker into chunks, and plans which row groups are read for each of them.

A chunk consists of the rows that are read at once: a window of the training order, or some rows of
an evaluation. Its place is its epoch and its index in the epoch. The place determines everything
else, so the process that reads rows and the one that uses them need not exchange more. Imports only
NumPy and reads no data.

    B rows of a worker's batch   S steps of a chunk
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ray_jobs.config.prepare_spec import Split
from ray_jobs.config.spec import DataSpec
from ray_jobs.data.manifest import SplitInfo
from ray_jobs.data.sampler import RowRange, TrainingSampler, Window, evaluation_rows, stored_ranges

GroupKey = tuple[int, int]
"""Shard and row group."""

_EVALUATION_CHUNK_ROWS = 2048


@dataclass(frozen=True, order=True)
class Place:
    """The place of a chunk in the order of reading."""

    epoch: int
    index: int


@dataclass(frozen=True)
class Chunk:
    """Rows that are read at once, and their batches."""

    ranges: Sequence[RowRange]
    batches_SB: np.ndarray
    """Indices into the rows of `ranges`."""
    num_padding: int = 0
    """Number of rows with weight 0 that only fill the last batch."""

    def is_padding(self, step: int) -> np.ndarray:
        """Return the mask of the rows of a batch that only fill it."""
        num_steps, batch_size = self.batches_SB.shape
        num_real = batch_size - (self.num_padding if step == num_steps - 1 else 0)
        return np.arange(batch_size) >= num_real


class Chunks(ABC):
    """The chunks of one worker and split."""

    split: Split
    batch_size: int
    chunk_rows: int
    """Rows of a chunk, except for the last one of an epoch."""
    all_groups: frozenset[GroupKey]
    """Row groups of the split."""

    @abstractmethod
    def places(self, start: int, stop: int) -> Iterator[Place]:
        """Yield the places of the chunks from `start` to `stop` (exclusive)."""

    @abstractmethod
    def num_batches(self, start: int, stop: int) -> int:
        """Return the number of batches from `start` to `stop` (exclusive)."""

    @abstractmethod
    def first_epoch(self, start: int) -> int:
        """Return the first epoch of which reading from `start` on reads all rows."""

    @abstractmethod
    def ranges(self, place: Place) -> Sequence[RowRange]:
        """Return the rows of a chunk before they are shuffled."""

    @abstractmethod
    def chunk(self, place: Place, start: int, stop: int) -> Chunk:
        """Return a chunk with its batches from `start` to `stop` (exclusive)."""

    @abstractmethod
    def before(self, place: Place) -> Place | None:
        """Return the place of the previous chunk, if there is one."""

    @abstractmethod
    def groups(self, epoch: int, of_all: bool) -> frozenset[GroupKey]:
        """Return the row groups that the worker, or all workers, read in an epoch."""


class TrainingChunks(Chunks):
    """Windows of the training order; `start` and `stop` are global steps.

    Args:
        sampler: The order of the training rows.
        rank: Index of the worker.
        num_workers: Number of workers.
    """

    split: Split = "train"

    def __init__(self, sampler: TrainingSampler, rank: int, num_workers: int) -> None:
        self.sampler = sampler
        self.batch_size = sampler.global_batch_size // num_workers
        self.chunk_rows = sampler.steps_per_window * self.batch_size
        self.all_groups = keys_of(sampler.groups)
        self.streams = sampler.streams_of(rank, num_workers)

    def places(self, start: int, stop: int) -> Iterator[Place]:
        """Yield the places of the windows of some steps; the first may begin before `start`."""
        for window in self.sampler.windows(start, stop):
            yield Place(window.epoch, window.index)

    def num_batches(self, start: int, stop: int) -> int:
        """Return the number of steps."""
        return stop - start

    def first_epoch(self, start: int) -> int:
        """Return the epoch of a step, or the next one if its first window is over."""
        return self.sampler.epoch_of(start) + (self.sampler.index_of(start) > 0)

    def ranges(self, place: Place) -> list[RowRange]:
        """Return the rows of a window, stream by stream."""
        window = self.sampler.window(place.epoch, place.index)
        return [r for stream in self.streams for r in self.sampler.stream_rows(window, stream)]

    def chunk(self, place: Place, start: int, stop: int) -> Chunk:
        """Return a window with its steps from `start` to `stop` (exclusive)."""
        window = self.sampler.window(place.epoch, place.index)
        stream_rows = window.num_steps * self.sampler.rows_per_stream_step
        by_stream = [
            i * stream_rows + self.sampler.shuffle(window, stream)
            for i, stream in enumerate(self.streams)
        ]
        steps = np.stack(by_stream, axis=1).reshape(window.num_steps, self.batch_size)
        return Chunk(self.ranges(place), steps[window.steps_to_take(start, stop)])

    def before(self, place: Place) -> Place | None:
        """Return the place of the previous window."""
        epoch = place.epoch
        if place.index:
            return Place(epoch, place.index - 1)
        return Place(epoch - 1, self.sampler.num_windows(epoch - 1) - 1) if epoch else None

    def groups(self, epoch: int, of_all: bool) -> frozenset[GroupKey]:
        """Return the row groups that the worker, or all workers, read in an epoch."""
        whole = Window(epoch, 0, 0, self.sampler.num_steps(epoch), 0)
        streams = range(self.sampler.num_streams) if of_all else self.streams
        return keys_of([r for s in streams for r in self.sampler.stream_rows(whole, s)])


class EvaluationChunks(Chunks):
    """A worker's rows of a split in stored order; `start` and `stop` are passes."""

    def __init__(
        self, split: Split, info: SplitInfo, batch_size: int, rank: int, num_workers: int,
        data: DataSpec,
    ) -> None:  # fmt: skip
        self.split: Split = split
        self.batch_size, self.info = batch_size, info
        self.all_groups = keys_of(stored_ranges(info, range(info.num_rows)))
        self.rows = evaluation_rows(info, rank, num_workers)
        """Indices of the worker's rows in the split."""
        num_rows = min(data.window_rows(info.row_bytes) // num_workers, _EVALUATION_CHUNK_ROWS)
        self.chunk_rows = max(1, num_rows // batch_size) * batch_size

    @property
    def num_chunks(self) -> int:
        """Number of chunks of a pass."""
        return -(-len(self.rows) // self.chunk_rows)

    def places(self, start: int, stop: int) -> Iterator[Place]:
        """Yield the places of all chunks of some passes."""
        for epoch in range(start, stop):
            yield from (Place(epoch, index) for index in range(self.num_chunks))

    def num_batches(self, start: int, stop: int) -> int:
        """Return the number of batches of some passes."""
        return (stop - start) * -(-len(self.rows) // self.batch_size)

    def first_epoch(self, start: int) -> int:
        """Return the first pass."""
        return start

    def ranges(self, place: Place) -> list[RowRange]:
        """Return the rows of a chunk."""
        first = place.index * self.chunk_rows
        return stored_ranges(self.info, self.rows[first : first + self.chunk_rows])

    def chunk(self, place: Place, start: int, stop: int) -> Chunk:
        """Return a chunk whose last batch is filled with repetitions of the last row."""
        ranges = self.ranges(place)
        num_rows = sum(r.num_rows for r in ranges)
        num_batches = -(-num_rows // self.batch_size)
        rows = np.minimum(np.arange(num_batches * self.batch_size), num_rows - 1)
        batches_SB = rows.reshape(num_batches, self.batch_size)
        return Chunk(ranges, batches_SB, rows.size - num_rows)

    def before(self, place: Place) -> Place | None:
        """Return the place of the previous chunk, which may be the last one of a pass."""
        epoch = place.epoch
        if place.index:
            return Place(epoch, place.index - 1)
        return Place(epoch - 1, self.num_chunks - 1) if epoch else None

    def groups(self, epoch: int, of_all: bool) -> frozenset[GroupKey]:
        """Return the row groups of the worker's rows, or all of the split."""
        return self.all_groups if of_all else keys_of(stored_ranges(self.info, self.rows))


def keys_of(ranges: Sequence[RowRange]) -> frozenset[GroupKey]:
    """Return the row groups of some rows."""
    return frozenset((r.shard, r.group) for r in ranges)


class ReadPlan:
    """Which row groups are read for each chunk, if they are read ahead of the worker.

    A row group that the previous chunk has is not read again, nor one that the cache keeps from an
    earlier epoch.

    Args:
        chunks: The chunks of the worker.
        start: First step or pass.
        stop: Last step or pass (exclusive).
        cacheable: Row groups that the cache keeps.
        is_shared: Whether all workers use the same cache.
    """

    def __init__(
        self,
        chunks: Chunks,
        start: int,
        stop: int,
        cacheable: frozenset[GroupKey] = frozenset(),
        is_shared: bool = True,
    ) -> None:
        self.chunks, self.start, self.stop = chunks, start, stop
        self.cacheable, self.is_shared = cacheable, is_shared
        self._first = next(self.places(), None)
        self._kept_in: dict[int, frozenset[GroupKey]] = {}

    def places(self) -> Iterator[Place]:
        """Yield the places of the chunks."""
        return self.chunks.places(self.start, self.stop)

    def unread_places(self) -> Iterator[Place]:
        """Yield the places of the chunks that are not completely in the cache."""
        for place in self.places():
            kept = self._kept(place.epoch)
            if not kept or (
                not kept >= self.chunks.all_groups and keys_of(self.chunks.ranges(place)) - kept
            ):
                yield place

    def missing(self, place: Place) -> list[GroupKey]:
        """Return the row groups to read for a chunk, in order."""
        wanted = keys_of(self.chunks.ranges(place)) - self._kept(place.epoch)
        before = None if place == self._first else self.chunks.before(place)
        if before is not None:
            wanted -= keys_of(self.chunks.ranges(before))
        return sorted(wanted)

    def _kept(self, epoch: int) -> frozenset[GroupKey]:
        """Return the row groups that the cache has from the complete epochs before an epoch."""
        if epoch not in self._kept_in:
            complete = range(self.chunks.first_epoch(self.start), epoch) if self.cacheable else ()
            read = [self.chunks.groups(each, self.is_shared) for each in complete]
            self._kept_in[epoch] = self.cacheable & frozenset().union(*read)
        return self._kept_in[epoch]
