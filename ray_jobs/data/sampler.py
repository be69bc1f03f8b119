"""Chooses the rows of each training step.

They depend only on the manifest, the seed, the global batch size, the window size and the step. The
row groups of an epoch are shuffled by (seed, epoch) and cut into L equal streams. A window consists
of the same few steps of every stream; each stream shuffles its rows of a window. A step uses B / L
rows of every stream, and a worker reads L / num_workers streams, so the number of workers never
changes the rows of a step. Rows that do not fill a complete step of an epoch start the next epoch.

A fixed number of streams corresponds to the "canonical nodes" of MosaicML Streaming. Imports only
NumPy and reads no data.

    B rows of a global batch   L streams   N rows of the split   e epoch   k global step
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ray_jobs.config.spec import DataSpec, RunSpec, num_streams
from ray_jobs.config.text import count_text
from ray_jobs.data.manifest import Manifest, SplitInfo


@dataclass(frozen=True)
class RowRange:
    """Rows `start` to `stop` (exclusive) of one row group of one shard."""

    shard: int
    group: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows in the range."""
        return self.stop - self.start


@dataclass(frozen=True)
class Window:
    """The same steps of every stream, which are read and shuffled together."""

    epoch: int
    index: int
    first_step: int
    """First step of the window, counted within the epoch."""
    num_steps: int
    epoch_step: int
    """First global step of the epoch."""

    def steps_to_take(self, start: int, stop: int) -> slice:
        """Return the steps of the window within the global steps `start` to `stop` (exclusive)."""
        first = self.epoch_step + self.first_step
        return slice(max(start - first, 0), max(stop - first, 0))


class TrainingSampler:
    """The order of the training rows.

    Args:
        row_groups: Number of rows of each row group, by shard.
        global_batch_size: Rows of a step over all workers.
        seed: Seed of the order.
        window_rows: Rows of all streams that are shuffled together; at least one step's rows are.

    Raises:
        ValueError: If the split has fewer rows than a step.
    """

    def __init__(
        self,
        row_groups: Sequence[Sequence[int]],
        global_batch_size: int,
        seed: int,
        window_rows: int,
    ) -> None:
        self.groups = [
            RowRange(shard, group, 0, rows)
            for shard, sizes in enumerate(row_groups)
            for group, rows in enumerate(sizes)
            if rows  # A fold may have no row of a row group.
        ]
        self.num_rows = sum(group.num_rows for group in self.groups)
        self.global_batch_size = global_batch_size
        self.num_streams = num_streams(global_batch_size)
        self.rows_per_stream_step = global_batch_size // self.num_streams
        self.seed = seed
        self.steps_per_window = max(window_rows // global_batch_size, 1)
        self._epoch_orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        if self.num_rows < global_batch_size:
            raise ValueError(
                f"train.global_batch_size={global_batch_size} exceeds the "
                f"{count_text(self.num_rows, 'row')} of the training split; lower it"
            )

    @classmethod
    def of(
        cls, split: SplitInfo, global_batch_size: int, seed: int, data: DataSpec
    ) -> "TrainingSampler":
        """Return the sampler of a split, with the window size of the `data` section."""
        row_groups = [shard.row_groups for shard in split.shards]
        return cls(row_groups, global_batch_size, seed, data.window_rows(split.row_bytes))

    @classmethod
    def of_run(cls, spec: RunSpec, manifest: Manifest) -> "TrainingSampler":
        """Return the sampler of a training run."""
        batch_size, seed = spec.train.global_batch_size, spec.run.seed
        return cls.of(manifest.splits["train"], batch_size, seed, spec.data)

    def steps_before(self, epoch: int) -> int:
        """Return the number of steps in all epochs before an epoch."""
        return epoch * self.num_rows // self.global_batch_size

    def num_steps(self, epoch: int) -> int:
        """Return the number of steps in an epoch, which varies by one."""
        return self.steps_before(epoch + 1) - self.steps_before(epoch)

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a global step."""
        epoch = step * self.global_batch_size // self.num_rows
        # Left-over rows start the next epoch, so its first step may begin in the previous epoch.
        return epoch + (self.steps_before(epoch + 1) <= step)

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """Yield the windows of the global steps `start` to `stop` (exclusive) in order.

        Windows do not depend on `start` and `stop`: a run that resumes within a window reads that
        window again, but nothing before it.
        """
        while start < stop:
            window = self.window(self.epoch_of(start), self.index_of(start))
            yield window
            start = window.epoch_step + window.first_step + window.num_steps

    def window(self, epoch: int, index: int) -> Window:
        """Return a window of an epoch."""
        first = index * self.steps_per_window
        num_steps = min(self.steps_per_window, self.num_steps(epoch) - first)
        return Window(epoch, index, first, num_steps, self.steps_before(epoch))

    def num_windows(self, epoch: int) -> int:
        """Return the number of windows in an epoch."""
        return -(-self.num_steps(epoch) // self.steps_per_window)

    def index_of(self, step: int) -> int:
        """Return the index of a global step's window within its epoch."""
        return (step - self.steps_before(self.epoch_of(step))) // self.steps_per_window

    def stream_rows(self, window: Window, stream: int) -> list[RowRange]:
        """Return the rows of a stream in a window before the shuffle."""
        stream_rows = self.num_steps(window.epoch) * self.rows_per_stream_step
        first = stream * stream_rows + window.first_step * self.rows_per_stream_step
        return self._slice(
            window.epoch, first, first + window.num_steps * self.rows_per_stream_step
        )

    def shuffle(self, window: Window, stream: int) -> np.ndarray:
        """Return the shuffled row indices of a stream in a window: (steps, rows per step)."""
        rng = np.random.default_rng((self.seed, 1, window.epoch, window.index, stream))
        rows = window.num_steps * self.rows_per_stream_step
        return rng.permutation(rows).reshape(window.num_steps, self.rows_per_stream_step)

    def streams_of(self, rank: int, num_workers: int) -> range:
        """Return the streams of a worker.

        Raises:
            ValueError: If the streams cannot be divided evenly among the workers.
        """
        if self.num_streams % num_workers:
            raise ValueError(
                f"train.num_workers={num_workers} does not divide the {self.num_streams} streams "
                f"of train.global_batch_size={self.global_batch_size}; use a divisor of "
                f"{self.num_streams}"
            )
        count = self.num_streams // num_workers
        return range(rank * count, (rank + 1) * count)

    def _slice(self, epoch: int, start: int, stop: int) -> list[RowRange]:
        """Return rows `start` to `stop` of an epoch: left-over rows, then its own row groups."""
        left_over = epoch * self.num_rows % self.global_batch_size
        ranges: list[RowRange] = []
        if start < left_over:
            # These are fewer rows than a step has, so all are from the end of the previous epoch.
            base = self.num_rows - left_over
            ranges += self._shuffled_rows(epoch - 1, base + start, base + min(stop, left_over))
        if stop > left_over:
            ranges += self._shuffled_rows(epoch, max(start - left_over, 0), stop - left_over)
        return ranges

    def _shuffled_rows(self, epoch: int, start: int, stop: int) -> list[RowRange]:
        """Return rows `start` to `stop` of the shuffled row groups of an epoch."""
        order, ends = self._epoch_order(epoch)
        ranges: list[RowRange] = []
        for position in range(int(np.searchsorted(ends, start, side="right")), len(order)):
            group = self.groups[order[position]]
            begin = int(ends[position]) - group.num_rows
            if begin >= stop:
                break
            first, last = max(start - begin, 0), min(stop - begin, group.num_rows)
            ranges.append(RowRange(group.shard, group.group, first, last))
        return ranges

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shuffled row groups of an epoch, and the row at which each of them ends."""
        if epoch not in self._epoch_orders:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.groups))
            sizes = np.asarray([group.num_rows for group in self.groups], np.int64)
            # The rows of an epoch also depend on the previous epoch's order.
            self._epoch_orders = {
                e: o for e, o in self._epoch_orders.items() if abs(e - epoch) == 1
            }
            self._epoch_orders[epoch] = (order, np.cumsum(sizes[order]))
        return self._epoch_orders[epoch]


def evaluation_rows(split: SplitInfo, rank: int, num_workers: int) -> range:
    """Return the rows of a split, in stored order, that a worker evaluates."""
    total = split.num_rows
    return range(rank * total // num_workers, (rank + 1) * total // num_workers)


def stored_ranges(split: SplitInfo, rows: range) -> list[RowRange]:
    """Return the ranges of consecutive rows of a split in stored order."""
    ranges: list[RowRange] = []
    begin = 0
    for shard, info in enumerate(split.shards):
        for group, num_rows in enumerate(info.row_groups):
            first, last = max(rows.start - begin, 0), min(rows.stop - begin, num_rows)
            if first < last:
                ranges.append(RowRange(shard, group, first, last))
            begin += num_rows
    return ranges
