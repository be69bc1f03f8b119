"""Work done ahead of its consumer, in threads, with a bound on what is held."""

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
    """Yield items in order, while a thread makes up to `depth` of the next ones.

    An exception in the making is raised when its turn comes. The thread ends with this iterator,
    also when that is left half-way; closing waits for the item that is being made.
    """
    if depth < 1:
        yield from items
        return
    # Bound here, since the thread must not hold the generator that waits for it.
    slots, made, stopped = threading.Semaphore(depth), SimpleQueue(), threading.Event()

    def work() -> None:
        iterator = iter(items)
        try:
            while slots.acquire() and not stopped.is_set():
                made.put((next(iterator, _END), None))
        except BaseException as error:
            made.put((_END, error))
        finally:
            if (close := getattr(iterator, "close", None)) is not None:
                close()

    thread = threading.Thread(target=work, name="feed", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
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
    """Yield `function(item)` in the items' order, while threads work on the next `depth`."""
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
