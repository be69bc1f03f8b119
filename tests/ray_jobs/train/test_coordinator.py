import asyncio

from ray_jobs.train.coordinator import StopRequest


def test_a_worker_learns_of_a_stop_and_that_it_is_over(coordinator):
    import ray

    asked = StopRequest(coordinator)
    assert asked() is False
    ray.get(coordinator.ask_to_stop.remote())
    while not asked():
        pass
    ray.get(coordinator.begin.remote())
    while asked():
        pass


def test_a_worker_does_not_wait_for_an_answer_that_is_late(ray_local):
    import ray

    @ray.remote(num_cpus=0)
    class Late:
        """Answers when it may."""

        def __init__(self) -> None:
            self.may = asyncio.Event()

        async def answer(self) -> None:
            self.may.set()

        async def asked_to_stop(self) -> bool:
            await self.may.wait()
            return True

    late = Late.remote()
    asked = StopRequest(late)
    assert [asked(), asked()] == [False, False]
    ray.get(late.answer.remote())
    while not asked():
        pass
    ray.kill(late)
    # A coordinator that is lost asks nobody to stop.
    while asked():
        pass
