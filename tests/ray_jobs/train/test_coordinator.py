import asyncio

from ray_jobs.train.coordinator import HeldResources, StopRequest


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


def test_reading_tasks_hold_cpus_until_they_are_released(coordinator):
    import ray

    node = ray.get_runtime_context().get_node_id()
    workers = [(node, {"CPU": 1.0}), (node, {"CPU": 1.0})]
    assert ray.get(coordinator.hold.remote(workers, [], [])) is None
    assert ray.get(coordinator.held.remote()) == HeldResources({node: {"CPU": 2.0}})
    placement = ray.get(coordinator.hold.remote(workers, [{"CPU": 0.5}, {"CPU": 0.5}], []))
    assert placement.wait(30)
    # Ray Train configures each dataset in a call of its own.
    assert ray.get(coordinator.hold.remote(workers, [{"CPU": 0.25}], [])).id == placement.id
    assert ray.get(coordinator.held.remote()) == HeldResources({node: {"CPU": 3.0}})
    ray.get(coordinator.release.remote())
    assert ray.get(coordinator.held.remote()) == HeldResources()
    assert ray.util.placement_group_table(placement)["state"] == "REMOVED"


def test_cpus_that_do_not_fit_are_reported(coordinator):
    import ray

    too_many = ray.cluster_resources()["CPU"] + 1
    ray.get(coordinator.hold.remote([], [{"CPU": too_many}], []))
    assert ray.get(coordinator.held.remote()) == HeldResources({}, ({"CPU": too_many},))
    ray.get(coordinator.release.remote())


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
