from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from ray_jobs.config.spec import DataSpec, num_streams
from ray_jobs.data.manifest import Shard, SplitInfo
from ray_jobs.data.sampler import TrainingSampler, evaluation_rows, stored_ranges
from tests.ray_jobs.data.steps import Row, all_rows, expanded, steps_between


def row_groups(num_rows: int, rows_per_group: int, rows_per_shard: int) -> list[list[int]]:
    shards = [min(rows_per_shard, num_rows - s) for s in range(0, num_rows, rows_per_shard)]
    return [[min(rows_per_group, n - g) for g in range(0, n, rows_per_group)] for n in shards]


def split_of(groups: list[list[int]], row_bytes: int = 0) -> SplitInfo:
    shards = [
        Shard(
            path=f"{i}.parquet",
            num_rows=sum(sizes),
            row_groups=tuple(sizes),
            num_bytes=sum(sizes) * row_bytes,
            sha256="",
        )
        for i, sizes in enumerate(groups)
    ]
    return SplitInfo(num_rows=sum(map(sum, groups)), class_counts=(0, 0), shards=tuple(shards))


def reference_steps(
    groups: list[list[int]], batch: int, seed: int, window_rows: int, num_epochs: int
) -> Iterator[list[list[Row]]]:
    """Yield the steps of each epoch, as the module's docstring describes them, with plain lists."""
    by_group = [
        [(s, g, r) for r in range(n)] for s, sizes in enumerate(groups) for g, n in enumerate(sizes)
    ]
    streams = max(n for n in range(1, 65) if batch % n == 0)
    share = batch // streams
    left_over: list[Row] = []
    for epoch in range(num_epochs):
        order = np.random.default_rng((seed, 0, epoch)).permutation(len(by_group))
        rows = left_over + [row for group in order for row in by_group[group]]
        num_steps = len(rows) // batch
        left_over = rows[num_steps * batch :]
        length = num_steps * share
        stream_rows = [rows[stream * length : (stream + 1) * length] for stream in range(streams)]
        found: list[list[Row]] = []
        per_window = max(window_rows // batch, 1)
        for index, first in enumerate(range(0, num_steps, per_window)):
            count = min(per_window, num_steps - first)
            taken: list[list[Row]] = [[] for _ in range(count)]
            for stream, all_of_stream in enumerate(stream_rows):
                here = all_of_stream[first * share : (first + count) * share]
                rng = np.random.default_rng((seed, 1, epoch, index, stream))
                places = rng.permutation(len(here))
                for i, place in enumerate(places):
                    taken[i // share].append(here[place])
            found += taken
        yield found


CASES = [
    # N, rows a group, rows a shard, B, window
    (101, 7, 30, 16, 40),
    (101, 7, 101, 30, 1000),
    (64, 64, 64, 64, 64),
    (65, 5, 20, 64, 64),
    (100, 9, 40, 8, 1),
    (40, 1, 1, 12, 24),
    (140, 13, 50, 67, 134),
    (200, 11, 70, 96, 500),
]
cases = pytest.mark.parametrize(("num_rows", "per_group", "per_shard", "batch", "window"), CASES)


@cases
def test_the_sampler_equals_a_reference_in_which_all_rows_come_equally_often(
    num_rows, per_group, per_shard, batch, window
):
    groups = row_groups(num_rows, per_group, per_shard)
    sampler = TrainingSampler(groups, batch, seed=3, window_rows=window)
    counts = Counter(dict.fromkeys(all_rows(groups), 0))
    for epoch, expected in enumerate(reference_steps(groups, batch, 3, window, num_epochs=20)):
        first, stop = sampler.steps_before(epoch), sampler.steps_before(epoch + 1)
        assert {sampler.epoch_of(step) for step in range(first, stop)} == {epoch}
        assert sampler.num_steps(epoch) == stop - first
        assert steps_between(sampler, first, stop) == expected
        assert {len(step) for step in expected} == {batch}
        # Rows that fill no complete step start the next epoch.
        counts.update(row for step in expected for row in step)
        assert counts.total() == stop * batch == (epoch + 1) * num_rows // batch * batch
        assert len(counts) == num_rows
        assert epoch <= min(counts.values()) <= max(counts.values()) <= epoch + 1
        # A long run keeps the order of only a few epochs.
        assert len(sampler._epoch_orders) <= 3


@cases
def test_the_steps_do_not_depend_on_the_number_of_workers(
    num_rows, per_group, per_shard, batch, window
):
    groups = row_groups(num_rows, per_group, per_shard)
    sampler = TrainingSampler(groups, batch, seed=5, window_rows=window)
    last = sampler.steps_before(3)
    alone = steps_between(sampler, 0, last)
    for workers in (w for w in (2, 3, 4, 6) if num_streams(batch) % w == 0):
        shares = [steps_between(sampler, 0, last, rank, workers) for rank in range(workers)]
        whole = [[r for part in parts for r in part] for parts in zip(*shares, strict=True)]
        assert whole == alone
        assert {len(step) for share in shares for step in share} == {batch // workers}


@cases
def test_resuming_at_any_step_gives_the_same_steps_and_rereads_at_most_one_window(
    num_rows, per_group, per_shard, batch, window
):
    sampler = TrainingSampler(row_groups(num_rows, per_group, per_shard), batch, 4, window)
    last = sampler.steps_before(5)
    in_one_go, all_windows = steps_between(sampler, 0, last), list(sampler.windows(0, last))
    for start in range(last):
        assert steps_between(sampler, start, last) == in_one_go[start:]
        windows = list(sampler.windows(start, last))
        assert windows == all_windows[-len(windows) :]
        read_again = start - windows[0].epoch_step - windows[0].first_step
        assert 0 <= read_again < windows[0].num_steps
    assert list(sampler.windows(last, last)) == []


def test_a_batch_that_cannot_be_filled_or_divided_raises_an_error_with_both_numbers():
    message = r"train.global_batch_size=16 exceeds the 15 rows of the training split; lower it"
    with pytest.raises(ValueError, match=message):
        TrainingSampler(row_groups(15, 4, 8), 16, seed=0, window_rows=16)
    sampler = TrainingSampler(row_groups(200, 11, 70), 96, seed=0, window_rows=96)
    message = (
        r"train.num_workers=32 does not divide the 48 streams of train.global_batch_size=96; use a "
        r"divisor of 48"
    )
    with pytest.raises(ValueError, match=message):
        sampler.streams_of(0, 32)


def test_buffer_bytes_and_shuffle_window_rows_bound_the_rows_of_a_window():
    groups = row_groups(1000, 10, 100)
    # Rows of 500 bytes; the buffer holds four windows.
    split = split_of(groups, row_bytes=500)
    few = TrainingSampler.of(split, 10, 2, DataSpec(buffer_bytes=4 * 500 * 60))
    assert few.steps_per_window == 6
    assert steps_between(few, 0, 200) == steps_between(TrainingSampler(groups, 10, 2, 60), 0, 200)
    assert TrainingSampler.of(split, 10, 0, DataSpec(buffer_bytes=1)).steps_per_window == 1
    many = DataSpec(buffer_bytes=1 << 30, shuffle_window_rows=200)
    assert TrainingSampler.of(split, 10, 0, many).steps_per_window == 20


def test_the_number_of_streams_is_the_greatest_divisor_up_to_64():
    streams = {1: 1, 2: 2, 64: 64, 67: 1, 96: 48, 128: 64, 130: 26}
    assert {batch: num_streams(batch) for batch in streams} == streams


@pytest.mark.parametrize("workers", range(1, 6))
def test_each_evaluation_row_goes_to_one_worker_in_stored_order(workers):
    for num_rows in range(21):
        groups = row_groups(num_rows, 3, 8)
        split = split_of(groups)
        shares = [evaluation_rows(split, rank, workers) for rank in range(workers)]
        assert [row for share in shares for row in share] == list(range(num_rows))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        ranges = [r for share in shares for r in stored_ranges(split, share)]
        assert expanded(ranges) == all_rows(groups)
        assert all(r.num_rows > 0 for r in ranges)
