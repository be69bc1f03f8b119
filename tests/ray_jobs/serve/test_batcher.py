import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from ray_jobs.serve.batcher import Batcher


def test_rows_that_arrive_while_the_model_is_busy_are_predicted_together():
    calls, is_free = [], threading.Event()

    def call(parts):
        calls.append(parts)
        is_free.wait()
        return [sum(part) for part in parts]

    async def send() -> list[int]:
        batcher = Batcher(call, ThreadPoolExecutor(1), max_rows=4)
        first = asyncio.create_task(batcher([1]))
        while not calls:
            await asyncio.sleep(0)
        others = [asyncio.create_task(batcher(rows)) for rows in ([2, 3], [4], [5, 6], [7])]
        gone = asyncio.create_task(batcher([8]))
        await asyncio.sleep(0)
        gone.cancel()
        is_free.set()
        found = await asyncio.gather(first, *others)
        # It goes on after it was idle.
        return [*found, await batcher([9])]

    assert asyncio.run(send()) == [1, 5, 4, 11, 7, 9]
    assert calls == [[[1]], [[2, 3], [4]], [[5, 6], [7]], [[9]]]


def test_an_error_reaches_every_request_of_its_call_and_no_other():
    def call(parts):
        if [0] in parts:
            raise ValueError("zero")
        return parts

    async def send() -> None:
        batcher = Batcher(call, ThreadPoolExecutor(1), max_rows=4)
        found = await asyncio.gather(batcher([0]), batcher([1]), return_exceptions=True)
        assert [str(error) for error in found] == ["zero", "zero"]
        assert await batcher([1]) == [1]

    asyncio.run(send())
