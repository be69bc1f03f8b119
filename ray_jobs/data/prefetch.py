"""Runs work ahead of its consumer in threads, up to a bounded number of items."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_END = object()


def prefetch(items: Iterable[T], depth: int) -> Generator[T]:
    """Yield items in order while a thread produces up to `depth` further items.

    An exception of the producer is raised in place of its item. The thread ends with this iterator,
    even if it is closed early; closing waits for the item in progress.
    """
    if depth < 1:
        yield from items
        return
    # Local variables: the thread must not reference the generator that waits for it.
    slots, results, stopped = threading.Semaphore(depth), SimpleQueue(), threading.Event()

    def work() -> None:
        iterator = iter(items)
        try:
            while slots.acquire() and not stopped.is_set():
                results.put((next(iterator, _END), None))
        except BaseException as error:
            results.put((_END, error))
        finally:
            if (close := getattr(iterator, "close", None)) is not None:
                close()

    thread = threading.Thread(target=work, name="feed", daemon=True)
    thread.start()
    try:
        while True:
            item, error = results.get()
            if error is not None:
                raise error
            if item is _END:
                return
            slots.release()
            yield item
    finally:
        stopped.set()
        slots.release()
        thread.join()


def prefetch_map(
    function: Callable[[T], R], items: Iterable[T], threads: Executor, depth: int
) -> Iterator[R]:
    """Yield `function(item)` in order while threads compute up to `depth` further results."""
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(threads.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
