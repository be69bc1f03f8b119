"""Groups the rows of concurrent requests into calls of the model.

`serve.batch` of Ray Serve 2.60 closes a batch when its waiting time is over, even while the model
is busy, so a busy server would predict the rows one request at a time.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any


class Batcher:
    """Collects rows while the model is busy; the next call takes as many of them as it can.

    Args:
        call: Returns a result for each of a list of requests' rows; runs in `executor`.
        executor: Has one thread, because the model is called once at a time.
        max_rows: Maximum rows of a call.
    """

    def __init__(
        self, call: Callable[[list[Any]], list[Any]], executor: Executor, max_rows: int
    ) -> None:
        self.call, self.executor, self.max_rows = call, executor, max_rows
        self._waiting: deque[tuple[Sequence[Any], asyncio.Future[Any]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, rows: Sequence[Any]) -> Any:
        """Return the result for some rows, at most `max_rows`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, future))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._take():
            try:
                parts = [rows for rows, _ in batch]
                results = await loop.run_in_executor(self.executor, self.call, parts)
            # Every request must get an answer, whatever the error.
            except Exception as error:
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        self._task = None

    def _take(self) -> list[tuple[Sequence[Any], asyncio.Future[Any]]]:
        """Remove the oldest rows from the queue, without those of clients that have hung up."""
        batch: list[tuple[Sequence[Any], asyncio.Future[Any]]] = []
        num_rows = 0
        while self._waiting:
            rows, future = self._waiting[0]
            if not future.cancelled():
                if batch and num_rows + len(rows) > self.max_rows:
                    break
                batch.append((rows, future))
                num_rows += len(rows)
            self._waiting.popleft()
        return batch
