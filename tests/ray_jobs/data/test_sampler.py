from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from ray_jobs.config.spec import MAX_STREAMS, DataSpec, num_streams
from ray_jobs.data.manifest import Shard, SplitInfo
from ray_jobs.data.sampler import RowRange, TrainingSampler, Window, evaluation_rows, stored_ranges

Row = tuple[int, int, int]
"""Shard, row group of the shard, row of the row group."""


def row_groups(num_rows: int, rows_per_group: int, rows_per_shard: int) -> list[list[int]]:
    shards = [min(rows_per_shard, num_rows - s) for s in range(0, num_rows, rows_per_shard)]
    return [[min(rows_per_group, n - g) for g in range(0, n, rows_per_group)] for n in shards]


def split_of(groups: list[list[int]]) -> SplitInfo:
    shards = [
        Shard(path=f"{i}.parquet", num_rows=sum(g), row_groups=tuple(g), num_bytes=0, sha256="")
        for i, g in enumerate(groups)
    ]
    return SplitInfo(num_rows=sum(map(sum, groups)), class_counts=(0, 0), shards=tuple(shards))


def all_rows(groups: list[list[int]]) -> list[Row]:
    return [(s, g, r) for s, sizes in enumerate(groups) for g, n in enumerate(sizes)
            for r in range(n)]  # fmt: skip


def expanded(ranges: list[RowRange]) -> list[Row]:
    return [(r.shard, r.group, row) for r in ranges for row in range(r.start, r.stop)]


def windows_of(sampler: TrainingSampler, epochs: range) -> list[Window]:
    return list(
        sampler.windows(sampler.steps_before(epochs.start), sampler.steps_before(epochs.stop))
    )


def steps(
    sampler: TrainingSampler, epochs: range, rank: int = 0, num_workers: int = 1
) -> list[list[Row]]:
    """Return the rows of each step on one worker."""
    first, last = sampler.steps_before(epochs.start), sampler.steps_before(epochs.stop)
    return steps_between(sampler, first, last, rank, num_workers)


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
def test_the_sampler_equals_a_reference_implementation(
    num_rows, per_group, per_shard, batch, window
):
    groups = row_groups(num_rows, per_group, per_shard)
    sampler = TrainingSampler(groups, batch, seed=3, window_rows=window)
    for epoch, expected in enumerate(reference_steps(groups, batch, 3, window, num_epochs=12)):
        assert sampler.num_steps(epoch) == len(expected)
        assert steps(sampler, range(epoch, epoch + 1)) == expected


@cases
def test_over_20_epochs_all_steps_are_full_and_all_rows_come_equally_often(
    num_rows, per_group, per_shard, batch, window
):
    groups = row_groups(num_rows, per_group, per_shard)
    sampler = TrainingSampler(groups, batch, seed=0, window_rows=window)
    counts = Counter(dict.fromkeys(all_rows(groups), 0))
    taken = 0
    for epoch in range(20):
        rows = [row for step in steps(sampler, range(epoch, epoch + 1)) for row in step]
        assert len(rows) == sampler.num_steps(epoch) * batch
        counts.update(rows)
        taken += len(rows)
        assert len(counts) == num_rows
        # All rows of all epochs so far, except those that fill no complete step.
        assert taken == (epoch + 1) * num_rows // batch * batch
        assert max(counts.values()) <= epoch + 1
        assert min(counts.values()) >= epoch
    assert sampler.steps_before(20) * batch == taken


@cases
def test_left_over_rows_start_the_next_epoch(num_rows, per_group, per_shard, batch, window):
    groups = row_groups(num_rows, per_group, per_shard)
    sampler = TrainingSampler(groups, batch, seed=1, window_rows=window)
    waiting: Counter[Row] = Counter()
    for epoch in range(6):
        waiting.update(all_rows(groups))
        taken = Counter(row for step in steps(sampler, range(epoch, epoch + 1)) for row in step)
        assert not taken - waiting
        waiting -= taken
        assert waiting.total() == (epoch + 1) * num_rows % batch
        assert all(count == 1 for count in waiting.values())


@cases
def test_the_steps_do_not_depend_on_the_number_of_workers(
    num_rows, per_group, per_shard, batch, window
):
    groups = row_groups(num_rows, per_group, per_shard)
    sampler = TrainingSampler(groups, batch, seed=5, window_rows=window)
    alone = steps(sampler, range(3))
    for workers in (w for w in (2, 3, 4, 6) if num_streams(batch) % w == 0):
        shares = [steps(sampler, range(3), rank, workers) for rank in range(workers)]
        whole = [[r for part in parts for r in part] for parts in zip(*shares, strict=True)]
        assert whole == alone
        assert {len(step) for share in shares for step in share} == {batch // workers}


def test_a_new_sampler_continues_at_a_later_epoch_with_the_same_steps():
    groups = row_groups(101, 7, 30)
    in_one_go = steps(TrainingSampler(groups, 16, 0, 40), range(8))
    for first in range(8):
        sampler = TrainingSampler(groups, 16, 0, 40)
        assert steps(sampler, range(first, 8)) == in_one_go[sampler.steps_before(first) :]


def test_the_steps_of_an_epoch_do_not_depend_on_earlier_calls():
    groups = row_groups(101, 7, 30)
    sampler, expected = (
        TrainingSampler(groups, 16, 0, 40),
        list(reference_steps(groups, 16, 0, 40, 6)),
    )
    for epoch in (5, 0, 3, 3, 2, 4, 1, 0):
        assert steps(sampler, range(epoch, epoch + 1)) == expected[epoch]


def test_each_epoch_and_seed_has_its_own_order():
    groups = row_groups(96, 8, 96)
    orders = [
        tuple(map(tuple, steps(TrainingSampler(groups, 16, seed, 96), range(e, e + 1))))
        for seed in (0, 1, 2**40)
        for e in range(3)
    ]
    assert len(set(orders)) == len(orders)


def test_the_shuffle_mixes_the_row_groups_of_a_window():
    groups = row_groups(512, 64, 512)
    sampler = TrainingSampler(groups, 4, seed=0, window_rows=512)
    first = steps(sampler, range(1))
    # Each stream has two row groups; without a shuffle, 64 rows of one would come first.
    stream_groups = [step[0][1] for step in first[:64]]
    assert len(set(stream_groups)) == 2
    assert [step[0][2] for step in first[:64]] != sorted(step[0][2] for step in first[:64])


@pytest.mark.parametrize("window", [1, 16, 40, 101, 10**9])
def test_windows_divide_an_epoch_without_changing_its_rows(window):
    groups = row_groups(101, 7, 30)
    sampler = TrainingSampler(groups, 16, seed=0, window_rows=window)
    whole = TrainingSampler(groups, 16, seed=0, window_rows=10**9)
    for epoch in range(4):
        windows = windows_of(sampler, range(epoch, epoch + 1))
        assert [w.epoch for w in windows] == [epoch] * len(windows)
        assert [w.index for w in windows] == list(range(len(windows)))
        ends = [w.first_step + w.num_steps for w in windows]
        assert [w.first_step for w in windows] == [0, *ends[:-1]]
        assert ends[-1] == sampler.num_steps(epoch)
        assert max(w.num_steps for w in windows) <= max(window // 16, 1)
        here, there = (
            Counter(row for step in steps(o, range(epoch, epoch + 1)) for row in step)
            for o in (sampler, whole)
        )
        assert here == there


def test_windows_of_several_epochs_are_consecutive():
    sampler = TrainingSampler(row_groups(101, 7, 30), 16, seed=0, window_rows=40)
    apart = [w for e in range(2, 5) for w in windows_of(sampler, range(e, e + 1))]
    assert windows_of(sampler, range(2, 5)) == apart
    assert windows_of(sampler, range(2, 2)) == []


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


@cases
def test_every_global_step_is_in_its_epoch(num_rows, per_group, per_shard, batch, window):
    sampler = TrainingSampler(row_groups(num_rows, per_group, per_shard), batch, 0, window)
    for step in range(sampler.steps_before(9)):
        epoch = sampler.epoch_of(step)
        assert sampler.steps_before(epoch) <= step < sampler.steps_before(epoch + 1)


def test_the_number_of_steps_per_epoch_varies_by_one():
    sampler = TrainingSampler(row_groups(101, 7, 30), 16, seed=0, window_rows=40)
    counts = [sampler.num_steps(epoch) for epoch in range(16)]
    assert set(counts) == {6, 7}
    assert sum(counts) == 101
    assert [sampler.steps_before(e) for e in range(17)] == [sum(counts[:e]) for e in range(17)]


def test_every_step_takes_equally_many_rows_from_each_stream():
    groups = row_groups(200, 11, 70)
    sampler = TrainingSampler(groups, 96, seed=0, window_rows=96)
    assert (sampler.num_streams, sampler.rows_per_stream_step) == (48, 2)
    for window in windows_of(sampler, range(4)):
        for stream in range(sampler.num_streams):
            rows = expanded(sampler.stream_rows(window, stream))
            assert len(rows) == 2 * window.num_steps
            assert sorted(sampler.shuffle(window, stream).flat) == list(range(len(rows)))


def test_too_few_rows_for_a_step_raise_an_error_with_both_numbers():
    message = r"train.global_batch_size=16 exceeds the 15 rows of the training split; lower it"
    with pytest.raises(ValueError, match=message):
        TrainingSampler(row_groups(15, 4, 8), 16, seed=0, window_rows=16)


def test_workers_that_do_not_divide_the_streams_raise_an_error():
    sampler = TrainingSampler(row_groups(200, 11, 70), 96, seed=0, window_rows=96)
    message = (
        r"train.num_workers=32 does not divide the 48 streams of train.global_batch_size=96; use a "
        r"divisor of 48"
    )
    with pytest.raises(ValueError, match=message):
        sampler.streams_of(0, 32)


def test_the_sampler_of_a_split_uses_its_row_groups():
    groups = row_groups(101, 7, 30)
    sampler = TrainingSampler.of(split_of(groups), 16, 2, DataSpec(shuffle_window_rows=40))
    assert steps(sampler, range(3)) == steps(TrainingSampler(groups, 16, 2, 40), range(3))


def test_buffer_bytes_bounds_the_rows_of_a_window():
    groups = row_groups(1000, 10, 100)
    shards = [
        shard.model_copy(update={"num_bytes": 100 * 500}) for shard in split_of(groups).shards
    ]
    split = split_of(groups).model_copy(update={"shards": tuple(shards)})
    # Rows of 500 bytes; the buffer holds four windows.
    few = TrainingSampler.of(split, 10, 0, DataSpec(buffer_bytes=4 * 500 * 60))
    assert few.steps_per_window == 6
    assert TrainingSampler.of(split, 10, 0, DataSpec(buffer_bytes=1)).steps_per_window == 1
    many = DataSpec(buffer_bytes=1 << 30, shuffle_window_rows=200)
    assert TrainingSampler.of(split, 10, 0, many).steps_per_window == 20


@pytest.mark.parametrize(
    ("batch", "streams"), [(1, 1), (2, 2), (64, 64), (67, 1), (96, 48), (128, 64), (130, 26)]
)
def test_the_number_of_streams_is_the_greatest_divisor_up_to_64(batch, streams):
    assert num_streams(batch) == streams <= MAX_STREAMS


@pytest.mark.parametrize("workers", range(1, 6))
@pytest.mark.parametrize("num_rows", range(21))
def test_each_evaluation_row_goes_to_one_worker_in_stored_order(num_rows, workers):
    groups = row_groups(num_rows, 3, 8)
    split = split_of(groups)
    shares = [evaluation_rows(split, rank, workers) for rank in range(workers)]
    assert [row for share in shares for row in share] == list(range(num_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    stored = [row for share in shares for row in expanded(stored_ranges(split, share))]
    assert stored == all_rows(groups)


def test_stored_ranges_are_not_empty():
    split = split_of([[3, 3, 2], [3, 1]])
    assert stored_ranges(split, range(2, 9)) == [
        RowRange(0, 0, 2, 3), RowRange(0, 1, 0, 3), RowRange(0, 2, 0, 2), RowRange(1, 0, 0, 1),
    ]  # fmt: skip
    assert stored_ranges(split, range(4, 4)) == []


def test_a_long_run_keeps_the_order_of_only_a_few_epochs():
    sampler = TrainingSampler(row_groups(101, 7, 30), 16, seed=0, window_rows=40)
    for window in islice(sampler.windows(0, sampler.steps_before(50)), 300):
        sampler.stream_rows(window, 0)
        sampler.stream_rows(window, sampler.num_streams - 1)
        assert len(sampler._epoch_orders) <= 3
