"""Expands what a sampler chooses to single rows."""

from collections.abc import Sequence

from ray_jobs.data.sampler import RowRange, TrainingSampler

Row = tuple[int, int, int]
"""Shard, row group of the shard, row of the row group."""


def all_rows(groups: Sequence[Sequence[int]]) -> list[Row]:
    """Return all rows in stored order, given the number of rows of each row group by shard."""
    return [
        (shard, group, row)
        for shard, sizes in enumerate(groups)
        for group, count in enumerate(sizes)
        for row in range(count)
    ]


def expanded(ranges: list[RowRange]) -> list[Row]:
    return [(r.shard, r.group, row) for r in ranges for row in range(r.start, r.stop)]


def steps_between(
    sampler: TrainingSampler, start: int, stop: int, rank: int = 0, num_workers: int = 1
) -> list[list[Row]]:
    """Return the rows of some global steps on one worker."""
    found = []
    for window in sampler.windows(start, stop):
        streams = [
            [expanded(sampler.stream_rows(window, stream)), sampler.shuffle(window, stream)]
            for stream in sampler.streams_of(rank, num_workers)
        ]
        found += [
            [rows[i] for rows, places in streams for i in places[step]]
            for step in range(window.num_steps)[window.steps_to_take(start, stop)]
        ]
    return found
