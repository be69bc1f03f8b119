import asyncio

from ray_jobs.train.coordinator import StopRequest


def test_a_worker_sees_a_stop_request_until_the_next_attempt(coordinator):
    import ray

    stop_requested = StopRequest(coordinator)
    assert stop_requested() is False
    ray.get(coordinator.request_stop.remote())
    while not stop_requested():
        pass
    ray.get(coordinator.begin_attempt.remote())
    while stop_requested():
        pass


def test_a_worker_does_not_wait_for_a_late_answer(ray_local):
    import ray

    @ray.remote(num_cpus=0)
    class SlowCoordinator:
        """Answers only once it is released."""

        def __init__(self) -> None:
            self.released = asyncio.Event()

        async def release(self) -> None:
            self.released.set()

        async def stop_requested(self) -> bool:
            await self.released.wait()
            return True

    slow = SlowCoordinator.remote()
    stop_requested = StopRequest(slow)
    assert [stop_requested(), stop_requested()] == [False, False]
    ray.get(slow.release.remote())
    while not stop_requested():
        pass
    ray.kill(slow)
    # A lost coordinator requests no stop.
    while stop_requested():
        pass
