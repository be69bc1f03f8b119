"""What is tried again and what not, by real boards and the exceptions that Ray Train raises."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ray_jobs.attempts import run_attempts
from ray_jobs.board import StopRequest, make_board
from ray_jobs.cli import Interrupted, JobError
from ray_jobs.spec import TrainSpec


@pytest.fixture
def board(ray_local) -> Any:
    import ray

    made = make_board()
    yield made
    ray.kill(made)


def failed(*ranks: int, error: Exception | None = None) -> Exception:
    """What Ray Train raises when workers fail."""
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError("…", {rank: error or RuntimeError("lost") for rank in ranks})


def died(preempted: bool = False) -> Exception:
    from ray.exceptions import RayActorError

    return RayActorError("abc", "the worker died of SIGKILL", preempted=preempted)


class Attempts:
    """Fails as it is told to, one failure an attempt, and then comes to its end."""

    def __init__(self, board: Any, *failures: Callable[[], Exception] | Exception) -> None:
        self.board, self.failures = board, list(failures)
        self.num_workers: list[int] = []

    def __call__(self, num_workers: int) -> None:
        self.num_workers.append(num_workers)
        if self.failures:
            failure = self.failures.pop(0)
            raise failure if isinstance(failure, Exception) else failure()

    def told(self, *failures: dict[str, Any]) -> Callable[[], Exception]:
        """A failure of which workers told the board before Ray did."""
        import ray

        def fail() -> Exception:
            for failure in failures:
                ray.get(self.board.fail.remote({"again": True, "echo": False, **failure}))
            return failed(*(failure["rank"] for failure in failures))

        return fail


def events(board: Any) -> list[dict[str, Any]]:
    import ray

    return ray.get(board.take.remote())


def test_a_failure_is_tried_again_and_said(board):
    attempts = Attempts(board, failed(1, error=died()), failed(0, error=died()))
    run_attempts(TrainSpec(num_workers=2, max_failures=2), attempts, board)
    assert attempts.num_workers == [2, 2, 2]
    shown = events(board)
    assert [(event["kind"], event["attempt"], event["most"]) for event in shown] == [
        ("failure", 1, 2),
        ("failure", 2, 2),
    ]
    assert shown[0]["text"].startswith("worker 1 died: ")


def test_more_failures_than_are_allowed_end_the_job_with_the_setting(board):
    attempts = Attempts(board, *[failed(0, error=died())] * 2)
    with pytest.raises(JobError, match=r"worker 0 died: (.|\n)*train\.max_failures=1"):
        run_attempts(TrainSpec(max_failures=1), attempts, board)
    assert len(attempts.num_workers) == 2


def test_the_first_failure_that_is_no_echo_is_what_the_user_sees(board):
    attempts = Attempts(board)
    echo = {"rank": 0, "text": "UnavailableError: connection reset", "echo": True}
    first = {"rank": 2, "text": "OSError: no space left"}
    later = {"rank": 1, "text": "OSError: something else"}
    attempts.failures = [attempts.told(echo, first, later)]
    with pytest.raises(JobError, match="worker 2 failed: OSError: no space left"):
        run_attempts(TrainSpec(max_failures=0), attempts, board)


def test_an_error_in_the_data_is_not_tried_again(board):
    attempts = Attempts(board)
    text = "ValueError: row 'a' cannot be used"
    attempts.failures = [attempts.told({"rank": 1, "text": text, "again": False})]
    with pytest.raises(JobError) as error:
        run_attempts(TrainSpec(max_failures=3), attempts, board)
    assert str(error.value) == f"worker 1 failed: {text}"
    assert len(attempts.num_workers) == 1


def test_failures_of_an_earlier_attempt_are_forgotten(board):
    attempts = Attempts(board)
    bad = {"rank": 1, "text": "OSError: once"}
    attempts.failures = [attempts.told(bad), failed(0, error=died())]
    with pytest.raises(JobError, match="worker 0 died"):
        run_attempts(TrainSpec(max_failures=1), attempts, board)


def test_preemptions_are_counted_apart(board):
    from ray.train import PreemptionInfo
    from ray.train.v2.api.exceptions import PreemptionError

    gone = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"n": [0]}))
    attempts = Attempts(board, gone, failed(0, error=died(preempted=True)))
    run_attempts(TrainSpec(max_failures=0), attempts, board)
    assert len(attempts.num_workers) == 3
    attempts = Attempts(board, gone, gone)
    with pytest.raises(JobError, match=r"a node was taken away(.|\n)*train\.max_preemptions=1"):
        run_attempts(TrainSpec(max_preemptions=1), attempts, board)


def test_a_lost_controller_is_a_failure_like_another(board):
    attempts = Attempts(board, died())
    run_attempts(TrainSpec(max_failures=1), attempts, board)
    assert len(attempts.num_workers) == 2


def test_what_is_no_failure_of_ray_is_raised_as_it_is(board):
    attempts = Attempts(board, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_attempts(TrainSpec(), attempts, board)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_asks_workers_to_stop_and_waits_for_their_checkpoint(board, number, capsys):
    import ray

    began, saved = threading.Event(), threading.Event()

    def attempt(num_workers: int) -> None:
        began.set()
        while not ray.get(board.asked_to_stop.remote()):
            pass
        saved.set()

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    threading.Thread(target=lambda: began.wait(30) and os.kill(os.getpid(), number)).start()
    with pytest.raises(Interrupted, match="the same command again goes on"):
        run_attempts(TrainSpec(), attempt, board)
    assert saved.is_set()
    assert "saving a checkpoint" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(
    ("num_workers", "cpus", "expected"),
    # The local cluster has five CPUs, of which one is Ray Data's.
    [((1, 8), 1, 4), ((1, 2), 1, 2), ((1, 8), 2, 2), ((3, 3), 1, 3), ((4, 8), 2, 4)],
)
def test_as_many_workers_are_started_as_there_is_room_for(board, num_workers, cpus, expected):
    train = TrainSpec(global_batch_size=24, num_workers=num_workers, cpus_per_worker=cpus)
    attempts = Attempts(board)
    run_attempts(train, attempts, board)
    assert attempts.num_workers == [expected]


def test_a_worker_learns_of_a_stop_without_waiting(board):
    import ray

    asked = StopRequest(board)
    assert asked() is False
    ray.get(board.ask_to_stop.remote())
    while not asked():
        pass
    ray.get(board.begin.remote())
    while asked():
        pass
