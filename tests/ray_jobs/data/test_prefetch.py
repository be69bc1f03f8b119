import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ray_jobs.data.prefetch import prefetch, prefetch_map


def feed_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "feed"]


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_items_come_in_order_and_once(depth):
    assert list(prefetch(range(20), depth)) == list(range(20))
    assert list(prefetch([], depth)) == []
    assert feed_threads() == []


def test_no_more_than_the_given_number_of_items_is_prefetched():
    produced, all_produced = [], threading.Event()

    def items() -> Iterator[int]:
        for i in range(10):
            produced.append(i)
            if len(produced) == 4:
                all_produced.set()
            yield i

    stream = prefetch(items(), 3)
    assert next(stream) == 0
    assert all_produced.wait(30)
    # Three items wait; the thread produces a fifth one only when one of them is consumed.
    assert produced == [0, 1, 2, 3]
    assert list(stream) == list(range(1, 10))


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_is_raised_in_its_turn(depth):
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("the third is bad")

    stream = prefetch(items(), depth)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(ValueError, match="the third is bad"):
        next(stream)
    assert feed_threads() == []


def test_closing_early_ends_the_thread_and_closes_the_source():
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    stream = prefetch(prefetch(items(), 2), 2)
    next(stream)
    assert len(feed_threads()) == 2
    stream.close()
    assert closed.is_set()
    assert feed_threads() == []


def test_results_of_threads_come_in_order_up_to_an_error():
    def halve(number: int) -> float:
        if number == 7:
            raise ValueError("7 is odd")
        return number / 2

    with ThreadPoolExecutor(3) as threads:
        assert list(prefetch_map(halve, range(6), threads, 2)) == [0, 0.5, 1, 1.5, 2, 2.5]
        assert list(prefetch_map(halve, [], threads, 2)) == []
        stream = prefetch_map(halve, range(100), threads, 2)
        assert [next(stream) for _ in range(7)] == [0, 0.5, 1, 1.5, 2, 2.5, 3]
        with pytest.raises(ValueError, match="7 is odd"):
            next(stream)
