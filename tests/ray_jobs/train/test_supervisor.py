"""Which failures are retried, with real coordinators and the exceptions that Ray Train raises."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ray_jobs.cluster import capacity
from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.config.spec import TrainSpec
from ray_jobs.train import supervisor
from ray_jobs.train.coordinator import WorkerFailure
from ray_jobs.train.supervisor import run_attempts


@pytest.fixture(autouse=True)
def fast(monkeypatch) -> None:
    monkeypatch.setattr(supervisor, "_POLL_S", 0.01)
    monkeypatch.setattr(supervisor, "_CAPACITY_POLL_S", 0.0)
    monkeypatch.setattr(capacity, "_POLL_S", 0.05)


def failed(*ranks: int, error: Exception | None = None) -> Exception:
    """What Ray Train raises when workers fail."""
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError("…", {rank: error or RuntimeError("lost") for rank in ranks})


def lost_actor(preempted: bool = False) -> Exception:
    from ray.exceptions import RayActorError

    return RayActorError("abc", "the worker died of SIGKILL", preempted=preempted)


def died(preempted: bool = False) -> Exception:
    """A worker's death as found by Ray's health check."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError("A health check failed", lost_actor(preempted))


def no_room(num_workers: int) -> Exception:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    return ControllerError(WorkerGroupStartupTimeoutError(num_workers))


def held(num_cpus: int) -> Any:
    """An actor that holds CPUs like a run's workers."""
    import ray

    @ray.remote
    class Holder:
        pass

    holder = Holder.options(num_cpus=num_cpus).remote()
    ray.get(holder.__ray_ready__.remote())
    return holder


class Attempts:
    """Attempts that fail in the given ways, one per attempt, until the last one finishes."""

    def __init__(self, coordinator: Any, *failures: Callable[[], Exception] | Exception) -> None:
        self.coordinator, self.failures = coordinator, list(failures)
        self.num_workers: list[int] = []
        self.finished = False

    def run(self, **train: Any) -> None:
        run_attempts(TrainSpec(**train), self, lambda: self.finished, self.coordinator)

    def __call__(self, num_workers: int) -> None:
        self.num_workers.append(num_workers)
        if self.failures:
            failure = self.failures.pop(0)
            raise failure if isinstance(failure, Exception) else failure()
        self.finished = True

    def reported(
        self, *failures: WorkerFailure, error: Exception | None = None
    ) -> Callable[[], Exception]:
        """A failure that workers reported to the coordinator before Ray raised."""
        import ray

        def fail() -> Exception:
            for failure in failures:
                ray.get(self.coordinator.report_failure.remote(failure))
            return failed(*(failure.rank for failure in failures), error=error)

        return fail


def events(coordinator: Any) -> list[dict[str, Any]]:
    import ray

    return ray.get(coordinator.take.remote())


def test_failures_are_retried_and_shown(coordinator):
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
    from ray.train.v2.api.exceptions import ControllerError

    startup = WorkerGroupStartupFailedError("failed to initialize:\nTraceback\n  …\nthe reason\n")
    failures = {
        "worker 1 died: ": failed(1, error=died()),
        "Ray lost the controller of the run: ": lost_actor(),
        "a worker died during start-up: the reason": ControllerError(startup),
        "a worker or its node was lost: ": ControllerError(lost_actor()),
    }
    attempts = Attempts(coordinator, *failures.values())
    attempts.run(num_workers=2, max_failures=4)
    assert attempts.num_workers == [2] * 5
    posted = events(coordinator)
    assert [(event["kind"], event["attempt"], event["most"]) for event in posted] == [
        ("failure", n, 4) for n in (1, 2, 3, 4)
    ]
    for event, text in zip(posted, failures, strict=True):
        assert event["text"].startswith(text)


ERROR = WorkerFailure(1, "OSError: no space left")
LATER = WorkerFailure(0, "OSError: something else")
HANG = WorkerFailure(1, "no progress for 45 s after step 3", kind="hang")
SECONDARY = WorkerFailure(2, "UnavailableError: reset\nmore of it", kind="secondary")


@pytest.mark.parametrize(
    ("reported", "found", "message"),
    [
        ([SECONDARY, ERROR, LATER], died, "worker 1 failed: OSError: no space left"),
        ([HANG], died, "worker 1 failed: no progress for 45 s after step 3"),
        (
            [SECONDARY],
            RuntimeError,
            "worker 0 or 1 died or is hung; worker 2 reported: UnavailableError: reset",
        ),
    ],
)
def test_the_user_sees_the_root_cause(coordinator, reported, found, message):
    attempts = Attempts(coordinator)
    attempts.failures = [attempts.reported(*reported, error=found())]
    with pytest.raises(JobError, match=rf"^{message}\n\(train\.max_failures=0"):
        attempts.run(global_batch_size=30, num_workers=3, max_failures=0)


def test_a_permanent_error_is_not_retried_even_if_the_run_folder_is_unreadable(coordinator):
    def finished() -> bool:
        raise OSError("the network is down")

    attempts = Attempts(coordinator)
    text = "ValueError: row 'a' cannot be used"
    attempts.failures = [attempts.reported(WorkerFailure(1, text, permanent=True))]
    with pytest.raises(JobError) as error:
        run_attempts(TrainSpec(max_failures=3), attempts, finished, coordinator)
    assert str(error.value) == f"worker 1 failed: {text}"
    assert len(attempts.num_workers) == 1


def test_too_many_failures_end_the_job_with_the_last_one_and_the_setting(coordinator):
    attempts = Attempts(coordinator)
    attempts.failures = [attempts.reported(ERROR), failed(0, error=died())]
    with pytest.raises(JobError, match=r"worker 0 died: (.|\n)*train\.max_failures=1"):
        attempts.run(max_failures=1)
    assert len(attempts.num_workers) == 2


def test_preemptions_are_counted_separately(coordinator):
    from ray.train import PreemptionInfo
    from ray.train.v2.api.exceptions import PreemptionError

    gone = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"n": [0]}))
    attempts = Attempts(coordinator, gone, failed(0, error=died(preempted=True)))
    attempts.run(max_failures=0)
    assert len(attempts.num_workers) == 3
    attempts = Attempts(coordinator, gone, gone)
    with pytest.raises(JobError, match=r"a node was preempted(.|\n)*train\.max_preemptions=1"):
        attempts.run(max_preemptions=1)


def test_a_worker_that_is_lost_after_an_announcement_counts_as_preempted(coordinator):
    import ray

    attempts = Attempts(coordinator)

    def announced(*reported: WorkerFailure) -> Callable[[], Exception]:
        fail = attempts.reported(*reported)

        def announce_and_fail() -> Exception:
            ray.get(coordinator.post.remote({"kind": "preemption", "text": "…"}))
            return fail()

        return announce_and_fail

    attempts.failures = [announced(SECONDARY), announced(HANG), announced(SECONDARY, ERROR)]
    # An error of a worker's own is not a preemption, nor is a loss in a later attempt.
    with pytest.raises(JobError, match="worker 1 failed: OSError: no space left"):
        attempts.run(num_workers=4, max_failures=0)
    assert len(attempts.num_workers) == 3
    attempts.failures = [announced(SECONDARY), attempts.reported(SECONDARY)]
    with pytest.raises(JobError, match="died or is hung"):
        attempts.run(num_workers=4, max_failures=0)


def test_an_error_that_is_not_from_ray_is_raised_unchanged(coordinator):
    attempts = Attempts(coordinator, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        attempts.run()


def test_an_error_after_the_run_is_finished_is_ignored(coordinator):
    attempts = Attempts(coordinator)

    def fail() -> Exception:
        attempts.finished = True
        return failed(1, error=died())

    attempts.failures = [fail]
    attempts.run(max_failures=0)
    assert len(attempts.num_workers) == 1


def test_workers_that_end_too_early_are_not_restarted(coordinator):
    with pytest.raises(JobError, match="the workers ended before the run was finished"):
        run_attempts(TrainSpec(), lambda num_workers: None, lambda: False, coordinator)


def test_fewer_workers_are_tried_after_a_start_up_timeout(coordinator):
    attempts = Attempts(coordinator, no_room(4), no_room(2), no_room(1))
    attempts.run(num_workers=(1, 4), global_batch_size=32)
    assert attempts.num_workers == [4, 2, 1, 1]
    posted = events(coordinator)
    assert [event["kind"] for event in posted] == ["note"] * 3
    text = "the cluster had no capacity for 4 workers within a minute; trying 2 workers"
    assert posted[0]["text"] == text


def test_start_up_is_retried_thirty_times(coordinator):
    attempts = Attempts(coordinator, *[no_room(2)] * 30)
    text = "no capacity for 2 workers within a minute, 30 times in a row"
    with pytest.raises(JobError, match=text):
        attempts.run(num_workers=2)
    assert attempts.num_workers == [2] * 30


def test_a_run_grows_only_when_there_is_room(coordinator, monkeypatch):
    import ray

    def counted(name: str) -> threading.Semaphore:
        calls, function = threading.Semaphore(0), getattr(supervisor, name)
        monkeypatch.setattr(supervisor, name, lambda *args: (calls.release(), function(*args))[1])
        return calls

    asked, looked = counted("answer"), counted("can_grow")
    other = held(3)
    # Only the first attempt does not wait for these resources.
    release_timeout_s = capacity._RELEASE_TIMEOUT_S
    monkeypatch.setattr(capacity, "_RELEASE_TIMEOUT_S", 0.0)
    numbers: list[int] = []

    def attempt(num_workers: int) -> None:
        numbers.append(num_workers)
        monkeypatch.setattr(capacity, "_RELEASE_TIMEOUT_S", release_timeout_s)
        if len(numbers) == 1:
            # The resources of its own workers are still free. The first call begins the attempt.
            for _ in range(4):
                assert asked.acquire(timeout=30)
        worker = held(num_workers)
        assert not ray.get(coordinator.stop_requested.remote())
        ray.get(coordinator.post.remote({"kind": "startup"}))
        if len(numbers) == 1:
            # Only count calls after the workers hold their resources.
            while looked.acquire(blocking=False):
                pass
            for _ in range(3):
                assert looked.acquire(timeout=30)
            assert not ray.get(coordinator.stop_requested.remote())
            ray.kill(other)
            while not ray.get(coordinator.stop_requested.remote()):
                pass
        ray.kill(worker)

    run_attempts(TrainSpec(num_workers=(1, 4)), attempt, lambda: len(numbers) == 2, coordinator)
    assert numbers == [1, 4]
    notes = [event["text"] for event in events(coordinator) if event["kind"] != "startup"]
    assert notes == ["the cluster has capacity for more than 1 worker; restarting"]


def test_a_run_grows_again_after_a_start_up_timeout(coordinator):
    import ray

    numbers: list[int] = []

    def attempt(num_workers: int) -> None:
        numbers.append(num_workers)
        if len(numbers) == 1:
            raise no_room(num_workers)
        workers = held(num_workers)
        node = ray.get_runtime_context().get_node_id()
        ray.get(coordinator.hold.remote([(node, {"CPU": num_workers})], [], []))
        ray.get(coordinator.post.remote({"kind": "startup"}))
        while len(numbers) == 2 and not ray.get(coordinator.stop_requested.remote()):
            pass
        ray.kill(workers)

    run_attempts(TrainSpec(num_workers=(1, 4)), attempt, lambda: len(numbers) == 3, coordinator)
    assert numbers == [4, 2, 4]


def test_a_run_that_waits_for_cpus_to_read_its_data_says_so(coordinator):
    import ray

    posted: list[dict[str, Any]] = []

    def attempt(num_workers: int) -> None:
        ray.get(coordinator.hold.remote([], [{"CPU": 99.0}] * 2, []))
        while not posted:
            posted.extend(events(coordinator))

    run_attempts(TrainSpec(), attempt, lambda: bool(posted), coordinator)
    assert [event["text"] for event in posted] == ["waiting for 2 × 99 CPU to read the data"]
    assert ray.get(coordinator.held.remote()).waits_for == ()


def test_an_interrupt_between_two_attempts_starts_no_further_attempt(coordinator, monkeypatch):
    numbers: list[int] = []

    def workers_to_start(*arguments: Any) -> int:
        if numbers:
            os.kill(os.getpid(), signal.SIGINT)
        return 1

    def attempt(num_workers: int) -> None:
        numbers.append(num_workers)
        raise failed(0, error=died())

    monkeypatch.setattr(supervisor, "workers_to_start", workers_to_start)
    with pytest.raises(Interrupted, match="run the same command again to resume"):
        run_attempts(TrainSpec(max_failures=3), attempt, lambda: False, coordinator)
    assert numbers == [1]


@pytest.mark.parametrize(
    ("number", "failure", "expected", "text"),
    [
        (signal.SIGINT, None, Interrupted, "run the same command again to resume"),
        (signal.SIGTERM, None, Interrupted, "run the same command again to resume"),
        (signal.SIGINT, no_room, Interrupted, "run the same command again to resume"),
        (signal.SIGINT, died, JobError, "worker 0 died"),
    ],
)
def test_an_interrupt_stops_the_workers_and_a_failure_is_not_retried(
    coordinator, number, failure, expected, text, capsys
):
    import ray

    numbers: list[int] = []

    def attempt(num_workers: int) -> None:
        os.kill(os.getpid(), number)
        while not ray.get(coordinator.stop_requested.remote()):
            pass
        numbers.append(num_workers)
        if failure:
            raise no_room(num_workers) if failure is no_room else failed(0, error=died())

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(expected, match=text) as error:
        run_attempts(TrainSpec(), attempt, lambda: False, coordinator)
    assert type(error.value) is expected
    assert numbers == [1]
    assert "saving a checkpoint" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_run_folder_that_is_temporarily_unreadable_is_a_failure(coordinator):
    answers: list[Exception | bool] = [OSError("the network is down"), True]

    def finished() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    run_attempts(TrainSpec(), lambda num_workers: None, finished, coordinator)
    text = "could not read the run folder: the network is down"
    assert [event["text"] for event in events(coordinator)] == [text]


@pytest.mark.parametrize(
    ("num_workers", "cpus", "expected"),
    # The local cluster has five CPUs, one of them for Ray Data.
    [((1, 8), 1, 4), ((1, 2), 1, 2), ((1, 8), 2, 2), ((3, 3), 1, 3), ((4, 8), 2, 4)],
)
def test_all_workers_that_fit_are_started(coordinator, num_workers, cpus, expected):
    attempts = Attempts(coordinator)
    attempts.run(global_batch_size=24, num_workers=num_workers, cpus_per_worker=cpus)
    assert attempts.num_workers == [expected]
