"""What is tried again and what not, by real boards and the exceptions that Ray Train raises."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.config.spec import TrainSpec
from ray_jobs.train.supervisor import run_attempts


def failed(*ranks: int, error: Exception | None = None) -> Exception:
    """What Ray Train raises when workers fail."""
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError("…", {rank: error or RuntimeError("lost") for rank in ranks})


def lost_actor(preempted: bool = False) -> Exception:
    from ray.exceptions import RayActorError

    return RayActorError("abc", "the worker died of SIGKILL", preempted=preempted)


def died(preempted: bool = False) -> Exception:
    """A worker's death as Ray's look at it finds it."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError("A health check failed", lost_actor(preempted))


def no_room(num_workers: int) -> Exception:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    return ControllerError(WorkerGroupStartupTimeoutError(num_workers))


def held(num_cpus: int) -> Any:
    """An actor that holds CPUs, as a run's workers do."""
    import ray

    @ray.remote
    class Holder:
        pass

    holder = Holder.options(num_cpus=num_cpus).remote()
    ray.get(holder.__ray_ready__.remote())
    return holder


class Attempts:
    """Fails as it is told to, one failure an attempt, and then comes to its end."""

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

    def told(self, *failures: dict[str, Any]) -> Callable[[], Exception]:
        """A failure of which workers told the coordinator before Ray did."""
        import ray

        def fail() -> Exception:
            for failure in failures:
                ray.get(self.coordinator.fail.remote({"again": True, "of": "own", **failure}))
            return failed(*(failure["rank"] for failure in failures))

        return fail


def events(coordinator: Any) -> list[dict[str, Any]]:
    import ray

    return ray.get(coordinator.take.remote())


def test_a_failure_is_tried_again_and_said(coordinator):
    attempts = Attempts(coordinator, failed(1, error=died()), failed(0, error=died()))
    attempts.run(num_workers=2, max_failures=2)
    assert attempts.num_workers == [2, 2, 2]
    shown = events(coordinator)
    assert [(event["kind"], event["attempt"], event["most"]) for event in shown] == [
        ("failure", 1, 2),
        ("failure", 2, 2),
    ]
    assert shown[0]["text"].startswith("worker 1 died: ")


def test_more_failures_than_are_allowed_end_the_job_with_the_setting(coordinator):
    attempts = Attempts(coordinator, *[failed(0, error=died())] * 2)
    with pytest.raises(JobError, match=r"worker 0 died: (.|\n)*train\.max_failures=1"):
        attempts.run(max_failures=1)
    assert len(attempts.num_workers) == 2


def test_the_first_failure_that_is_no_echo_is_what_the_user_sees(coordinator):
    attempts = Attempts(coordinator)
    echo = {"rank": 0, "text": "UnavailableError: connection reset", "of": "echo"}
    first = {"rank": 2, "text": "OSError: no space left"}
    later = {"rank": 1, "text": "OSError: something else"}
    attempts.failures = [attempts.told(echo, first, later)]
    with pytest.raises(JobError, match="worker 2 failed: OSError: no space left"):
        attempts.run(max_failures=0)


def test_a_hang_goes_before_the_death_of_the_worker_that_told_of_it(coordinator):
    import ray

    text = "nothing happened for 45 s after step 3 (train.hang_timeout_s): this worker or one"

    def fail() -> Exception:
        ray.get(coordinator.fail.remote({"rank": 1, "text": text, "again": True, "of": "hang"}))
        return failed(1, error=died())

    with pytest.raises(JobError, match=r"worker 1 failed: nothing happened for 45 s"):
        Attempts(coordinator, fail).run(max_failures=0)


def test_of_a_worker_that_said_nothing_the_others_tell(coordinator):
    attempts = Attempts(coordinator)
    echo = {"rank": 2, "text": "UnavailableError: connection reset\nmore of it", "of": "echo"}
    attempts.failures = [attempts.told(echo)]
    with pytest.raises(
        JobError,
        match=r"worker 0 or 1 died or hangs; worker 2 noticed: UnavailableError: connection reset"
        r"\n\(train\.max_failures=0",
    ):
        attempts.run(global_batch_size=30, num_workers=3, max_failures=0)


def test_an_error_in_the_data_is_not_tried_again(coordinator):
    attempts = Attempts(coordinator)
    text = "ValueError: row 'a' cannot be used"
    attempts.failures = [attempts.told({"rank": 1, "text": text, "again": False})]
    with pytest.raises(JobError) as error:
        attempts.run(max_failures=3)
    assert str(error.value) == f"worker 1 failed: {text}"
    assert len(attempts.num_workers) == 1


def test_failures_of_an_earlier_attempt_are_forgotten(coordinator):
    attempts = Attempts(coordinator)
    bad = {"rank": 1, "text": "OSError: once"}
    attempts.failures = [attempts.told(bad), failed(0, error=died())]
    with pytest.raises(JobError, match="worker 0 died"):
        attempts.run(max_failures=1)


def test_preemptions_are_counted_apart(coordinator):
    from ray.train import PreemptionInfo
    from ray.train.v2.api.exceptions import PreemptionError

    gone = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"n": [0]}))
    attempts = Attempts(coordinator, gone, failed(0, error=died(preempted=True)))
    attempts.run(max_failures=0)
    assert len(attempts.num_workers) == 3
    attempts = Attempts(coordinator, gone, gone)
    with pytest.raises(JobError, match=r"a node was taken away(.|\n)*train\.max_preemptions=1"):
        attempts.run(max_preemptions=1)


def test_a_lost_controller_is_a_failure_like_another(coordinator):
    attempts = Attempts(coordinator, lost_actor())
    attempts.run(max_failures=1)
    assert len(attempts.num_workers) == 2


def test_what_is_no_failure_of_ray_is_raised_as_it_is(coordinator):
    attempts = Attempts(coordinator, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        attempts.run()


def test_what_fails_after_a_run_has_come_to_its_end_is_no_failure(coordinator):
    attempts = Attempts(coordinator)

    def fail() -> Exception:
        attempts.finished = True
        return failed(1, error=died())

    attempts.failures = [fail]
    attempts.run(max_failures=0)
    assert len(attempts.num_workers) == 1


def test_workers_that_end_before_the_training_does_are_not_started_for_ever(coordinator):
    with pytest.raises(JobError, match="the workers ended, and the training did not"):
        run_attempts(TrainSpec(), lambda num_workers: None, lambda: False, coordinator)


def test_where_there_is_no_room_in_time_fewer_workers_are_tried(coordinator):
    attempts = Attempts(coordinator, no_room(4), no_room(2), no_room(1))
    attempts.run(num_workers=(1, 4), global_batch_size=32)
    assert attempts.num_workers == [4, 2, 1, 1]
    shown = events(coordinator)
    assert [event["kind"] for event in shown] == ["note"] * 3
    text = "there was no room for 4 workers for a minute; trying again with 2"
    assert shown[0]["text"] == text


def test_room_is_waited_for_long_but_not_for_ever(coordinator):
    attempts = Attempts(coordinator, *[no_room(2)] * 30)
    with pytest.raises(JobError, match="no room for 2 workers for a minute, for the 30th time"):
        attempts.run(num_workers=2)
    assert attempts.num_workers == [2] * 30


def test_a_worker_lost_in_its_start_is_a_failure_like_another(coordinator):
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
    from ray.train.v2.api.exceptions import ControllerError

    text = "One of the worker actors failed to initialize due to error:\nTraceback\n  …\nits end\n"
    lost = ControllerError(WorkerGroupStartupFailedError(text))
    attempts = Attempts(coordinator, lost, ControllerError(lost_actor()))
    attempts.run(max_failures=2)
    first, second = events(coordinator)
    assert first["text"] == "a worker died while it started: its end"
    assert second["text"].startswith("a worker or its node was lost: ")


def test_a_run_grows_when_there_is_room_and_not_before(coordinator, monkeypatch):
    import ray

    from ray_jobs.train import supervisor as module

    monkeypatch.setattr(module, "_ROOM_EVERY_S", 0.0)

    def counted(name: str) -> threading.Semaphore:
        calls, function = threading.Semaphore(0), getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (calls.release(), function(*args))[1])
        return calls

    listened, looked = counted("any_step_finished"), counted("can_grow")
    other = held(3)
    numbers: list[int] = []

    def attempt(num_workers: int) -> None:
        numbers.append(num_workers)
        if len(numbers) == 1:
            # The room of its own workers is still free, and not for more.
            for _ in range(3):
                assert listened.acquire(timeout=30)
        worker = held(num_workers)
        assert not ray.get(coordinator.asked_to_stop.remote())
        ray.get(coordinator.post.remote({"kind": "startup"}))
        if len(numbers) == 1:
            # Not of what was looked at before the workers had their room.
            while looked.acquire(blocking=False):
                pass
            for _ in range(3):
                assert looked.acquire(timeout=30)
            assert not ray.get(coordinator.asked_to_stop.remote())
            ray.kill(other)
            while not ray.get(coordinator.asked_to_stop.remote()):
                pass
        ray.kill(worker)

    run_attempts(TrainSpec(num_workers=(1, 4)), attempt, lambda: len(numbers) == 2, coordinator)
    assert numbers == [1, 4]
    notes = [event["text"] for event in events(coordinator) if event["kind"] != "startup"]
    assert notes == ["there is room for more workers than 1"]


def test_a_start_without_room_is_forgotten_once_there_is_some(coordinator, monkeypatch):
    import ray

    from ray_jobs.train import supervisor as module

    monkeypatch.setattr(module, "_ROOM_EVERY_S", 0.0)
    numbers: list[int] = []

    def attempt(num_workers: int) -> None:
        numbers.append(num_workers)
        if len(numbers) == 1:
            raise no_room(num_workers)
        workers = held(num_workers)
        ray.get(coordinator.post.remote({"kind": "startup"}))
        while len(numbers) == 2 and not ray.get(coordinator.asked_to_stop.remote()):
            pass
        ray.kill(workers)

    run_attempts(TrainSpec(num_workers=(1, 4)), attempt, lambda: len(numbers) == 3, coordinator)
    assert numbers == [4, 2, 4]


def test_an_interrupt_between_two_attempts_starts_no_other(coordinator, monkeypatch):
    from ray_jobs.train import supervisor as module

    numbers: list[int] = []

    def workers_to_start(*arguments: Any) -> int:
        if numbers:
            os.kill(os.getpid(), signal.SIGINT)
        return 1

    def attempt(num_workers: int) -> None:
        numbers.append(num_workers)
        raise failed(0, error=died())

    monkeypatch.setattr(module, "workers_to_start", workers_to_start)
    with pytest.raises(Interrupted, match="the same command again goes on"):
        run_attempts(TrainSpec(max_failures=3), attempt, lambda: False, coordinator)
    assert numbers == [1]


def test_an_interrupt_while_there_is_no_room_is_no_failure(coordinator):
    began = threading.Event()

    def attempt(num_workers: int) -> None:
        began.set()
        ended.wait(30)
        raise no_room(num_workers)

    ended = threading.Event()

    def interrupt() -> None:
        began.wait(30)
        os.kill(os.getpid(), signal.SIGINT)
        ended.set()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted, match="the same command again goes on"):
        run_attempts(TrainSpec(), attempt, lambda: False, coordinator)


def test_a_run_folder_that_cannot_be_read_for_a_moment_is_a_failure(coordinator):
    answers: list[Exception | bool] = [OSError("the network is down"), True]

    def finished() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    run_attempts(TrainSpec(), lambda num_workers: None, finished, coordinator)
    text = "the run folder could not be read: the network is down"
    assert [event["text"] for event in events(coordinator)] == [text]


def test_what_ended_an_attempt_says_more_than_a_folder_that_cannot_be_read(coordinator):
    def finished() -> bool:
        raise OSError("the network is down")

    attempts = Attempts(coordinator)
    attempts.failures = [attempts.told({"rank": 1, "text": "ValueError: row 'a'", "again": False})]
    with pytest.raises(JobError, match="worker 1 failed: ValueError: row 'a'"):
        run_attempts(TrainSpec(), attempts, finished, coordinator)
    assert len(attempts.num_workers) == 1


def test_a_failure_after_an_interrupt_is_shown_and_not_tried_again(coordinator):
    import ray

    began = threading.Event()
    numbers: list[int] = []

    def attempt(num_workers: int) -> None:
        numbers.append(num_workers)
        began.set()
        while not ray.get(coordinator.asked_to_stop.remote()):
            pass
        raise failed(0, error=died())

    threading.Thread(target=lambda: began.wait(30) and os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(JobError, match="worker 0 died") as error:
        run_attempts(TrainSpec(), attempt, lambda: False, coordinator)
    assert not isinstance(error.value, Interrupted)
    assert numbers == [1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_asks_workers_to_stop_and_waits_for_their_checkpoint(
    coordinator, number, capsys
):
    import ray

    began, saved = threading.Event(), threading.Event()

    def attempt(num_workers: int) -> None:
        began.set()
        while not ray.get(coordinator.asked_to_stop.remote()):
            pass
        saved.set()

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    threading.Thread(
        target=lambda: began.wait(30) and os.kill(os.getpid(), number), daemon=True
    ).start()
    with pytest.raises(Interrupted, match="the same command again goes on"):
        run_attempts(TrainSpec(), attempt, lambda: False, coordinator)
    assert saved.is_set()
    assert "saving a checkpoint" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(
    ("num_workers", "cpus", "expected"),
    # The local cluster has five CPUs, of which one is Ray Data's.
    [((1, 8), 1, 4), ((1, 2), 1, 2), ((1, 8), 2, 2), ((3, 3), 1, 3), ((4, 8), 2, 4)],
)
def test_as_many_workers_are_started_as_there_is_room_for(coordinator, num_workers, cpus, expected):
    attempts = Attempts(coordinator)
    attempts.run(global_batch_size=24, num_workers=num_workers, cpus_per_worker=cpus)
    assert attempts.num_workers == [expected]
