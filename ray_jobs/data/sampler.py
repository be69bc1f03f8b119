"""Which rows each step takes: a function of manifest, seed, global batch size and step alone.

The row groups of an epoch are dealt in an order drawn from (seed, epoch) and cut into L equal
streams. A window is the same few steps in every stream; each stream shuffles its rows of a
window. A step takes B / L rows from every stream, and a worker serves L / num_workers streams: the
number of workers never changes the rows of a step.
Rows that no full step of an epoch takes open the next epoch.

The idea of dealing to a fixed number of streams is MosaicML Streaming's "canonical nodes".
NumPy only; nothing is read here.

    B rows of a global batch   L streams   N rows of the split   e epoch   k global step
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ray_jobs.config.spec import DataSpec
from ray_jobs.data.batch import num_streams
from ray_jobs.data.manifest import SplitInfo


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
    """The same steps of every stream: what one worker reads and shuffles at once."""

    epoch: int
    index: int
    first_step: int
    """Step in the epoch that the window begins with."""
    num_steps: int
    epoch_step: int
    """Global step that the epoch begins with."""

    def steps_to_take(self, start: int, stop: int) -> slice:
        """Return which of the window's steps lie in the global steps `start` to `stop`."""
        first = self.epoch_step + self.first_step
        return slice(max(start - first, 0), max(stop - first, 0))


class TrainingSampler:
    """The order of the training rows.

    Args:
        row_groups: rows of each row group, by shard.
        global_batch_size: rows of a step, over all workers.
        seed: of the order.
        window_rows: rows that are shuffled together, over all streams; at least one step's.

    Raises:
        ValueError: if there are fewer rows than one step takes.
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
        ]
        self.num_rows = sum(group.num_rows for group in self.groups)
        self.global_batch_size = global_batch_size
        self.num_streams = num_streams(global_batch_size)
        self.rows_per_stream_step = global_batch_size // self.num_streams
        self.seed = seed
        self.steps_per_window = max(window_rows // global_batch_size, 1)
        self._dealt_epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        if self.num_rows < global_batch_size:
            raise ValueError(
                f"train.global_batch_size={global_batch_size} is more than the {self.num_rows} "
                "rows of the training split; lower it"
            )

    @classmethod
    def of(
        cls, split: SplitInfo, global_batch_size: int, seed: int, data: DataSpec
    ) -> "TrainingSampler":
        """Return the order of a split in a manifest; windows as `data` bounds them."""
        row_groups = [shard.row_groups for shard in split.shards]
        return cls(row_groups, global_batch_size, seed, data.window_rows(split.row_bytes))

    def steps_before(self, epoch: int) -> int:
        """Return the number of steps in all epochs before this one."""
        return epoch * self.num_rows // self.global_batch_size

    def num_steps(self, epoch: int) -> int:
        """Return the number of steps in one epoch; it varies by one."""
        return self.steps_before(epoch + 1) - self.steps_before(epoch)

    def epoch_of(self, step: int) -> int:
        """Return the epoch that a global step is of."""
        epoch = step * self.global_batch_size // self.num_rows
        # Rows left over open the next epoch, so its first step may begin in the one before.
        return epoch + (self.steps_before(epoch + 1) <= step)

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """Yield the windows that the global steps `start` to `stop` (exclusive) lie in, in order.

        A window is the same whichever of its steps are asked for: going on in the middle of one
        reads it again, and nothing before.
        """
        step = start
        while step < stop:
            epoch = self.epoch_of(step)
            epoch_step = self.steps_before(epoch)
            index = (step - epoch_step) // self.steps_per_window
            first = index * self.steps_per_window
            num_steps = min(self.steps_per_window, self.num_steps(epoch) - first)
            yield Window(epoch, index, first, num_steps, epoch_step)
            step = epoch_step + first + num_steps

    def stream_rows(self, window: Window, stream: int) -> list[RowRange]:
        """Return the rows of one stream in one window, before the shuffle."""
        stream_rows = self.num_steps(window.epoch) * self.rows_per_stream_step
        first = stream * stream_rows + window.first_step * self.rows_per_stream_step
        return self._slice(
            window.epoch, first, first + window.num_steps * self.rows_per_stream_step
        )

    def shuffle(self, window: Window, stream: int) -> np.ndarray:
        """Return where each row of one stream in one window goes: (steps, rows of a step)."""
        rng = np.random.default_rng((self.seed, 1, window.epoch, window.index, stream))
        rows = window.num_steps * self.rows_per_stream_step
        return rng.permutation(rows).reshape(window.num_steps, self.rows_per_stream_step)

    def streams_of(self, rank: int, num_workers: int) -> range:
        """Return the streams that one worker serves.

        Raises:
            ValueError: if the workers cannot share the streams evenly.
        """
        if self.num_streams % num_workers:
            raise ValueError(
                f"{num_workers} workers cannot share the {self.num_streams} streams of "
                f"global_batch_size={self.global_batch_size} evenly; their number must divide "
                f"{self.num_streams}"
            )
        share = self.num_streams // num_workers
        return range(rank * share, (rank + 1) * share)

    def _slice(self, epoch: int, start: int, stop: int) -> list[RowRange]:
        """Return rows `start` to `stop` of an epoch: what was left over, then its row groups."""
        left_over = epoch * self.num_rows % self.global_batch_size
        found: list[RowRange] = []
        if start < left_over:
            # Never as many as a step's rows, so they all come from the end of the epoch before.
            base = self.num_rows - left_over
            found += self._dealt(epoch - 1, base + start, base + min(stop, left_over))
        if stop > left_over:
            found += self._dealt(epoch, max(start - left_over, 0), stop - left_over)
        return found

    def _dealt(self, epoch: int, start: int, stop: int) -> list[RowRange]:
        """Return rows `start` to `stop` of an epoch's row groups in the order they are dealt."""
        dealt, ends = self._deal(epoch)
        found: list[RowRange] = []
        for position in range(int(np.searchsorted(ends, start, side="right")), len(dealt)):
            group = self.groups[dealt[position]]
            begin = int(ends[position]) - group.num_rows
            if begin >= stop:
                break
            first, last = max(start - begin, 0), min(stop - begin, group.num_rows)
            found.append(RowRange(group.shard, group.group, first, last))
        return found

    def _deal(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the row groups of an epoch in the order they are dealt, and where each ends."""
        if epoch not in self._dealt_epochs:
            dealt = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.groups))
            sizes = np.asarray([group.num_rows for group in self.groups], np.int64)
            # An epoch needs itself and the one before; older ones would only pile up.
            self._dealt_epochs = {
                e: d for e, d in self._dealt_epochs.items() if abs(e - epoch) == 1
            }
            self._dealt_epochs[epoch] = (dealt, np.cumsum(sizes[dealt]))
        return self._dealt_epochs[epoch]


def evaluation_rows(split: SplitInfo, rank: int, num_workers: int) -> range:
    """Return which rows of a split, in stored order, one worker evaluates."""
    total = split.num_rows
    return range(rank * total // num_workers, (rank + 1) * total // num_workers)


def stored_ranges(split: SplitInfo, rows: range) -> list[RowRange]:
    """Return where some consecutive rows of a split, in stored order, are stored."""
    return list(_cut(split, rows.start, rows.stop))


def _cut(split: SplitInfo, start: int, stop: int) -> Iterator[RowRange]:
    begin = 0
    for shard, info in enumerate(split.shards):
        for group, rows in enumerate(info.row_groups):
            first, last = max(start - begin, 0), min(stop - begin, rows)
            if first < last:
                yield RowRange(shard, group, first, last)
            begin += rows
