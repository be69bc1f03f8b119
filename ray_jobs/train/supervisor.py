"""Attempts at a training until one comes to its end: what fails, and whether it is tried again.

Each attempt is one run of Ray Train that goes on from the newest checkpoint, with as many workers
as there is room for. Ray itself tries nothing again: it cannot tell a lost node from a row that is
damaged, and it counts a killed controller as neither.

    failure     a worker that died, hung or lost another: up to `train.max_failures`
    preemption  a node that its provider took away: up to `train.max_preemptions`
    start       no room for the workers: half an hour, then the user should know
    error       in data, settings or program: never, since it would come again
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ray_jobs.cluster.capacity import (
    allowed_worker_counts,
    can_grow,
    worker_resources,
    workers_to_start,
)
from ray_jobs.cluster.connection import first_line, reason
from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.config.spec import TrainSpec
from ray_jobs.train.coordinator import any_step_finished, begin_attempt, reported_failures
from ray_jobs.train.telemetry.console import Event

if TYPE_CHECKING:
    from ray.exceptions import RayActorError
    from ray.train import UserCallback

_STARTS = 30
"""Tries to start the workers in a row, a minute each: enough for an autoscaler."""
_LOOK_S = 0.5
_ROOM_EVERY_S = 10.0
_STOPPED = "stopped; the same command again goes on with the run"


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended before the training did."""

    kind: Literal["failure", "preemption", "error", "start", "room", "stop"]
    """As above; `room` is for more workers, and a `stop` is what it was asked to do."""
    text: str
    cause: Exception | None = None


@dataclass(frozen=True)
class _Ended:
    """How an attempt ended: what it raised, and whether it was to make room for a larger one."""

    error: Exception | None
    grows: bool


def run_attempts(
    train: TrainSpec, attempt: Callable[[int], None], finished: Callable[[], bool], coordinator: Any
) -> None:
    """Run attempts until the training has come to its end.

    Args:
        train: workers, and what may fail how often.
        attempt: one of them, with so many workers; raises what Ray raises.
        finished: whether the training has come to its end.
        coordinator: that its workers post to.

    Raises:
        JobError: if none comes to it; the text is that of the first worker that failed.
        Interrupted: if the user stopped it.
    """
    budget = _Budget(train)
    with _interrupts_noted() as interrupted:
        while True:
            num_workers = workers_to_start(train, budget.most_workers, interrupted)
            begin_attempt(coordinator)
            if interrupted.is_set():
                raise Interrupted(_STOPPED)
            ended = _attempted(
                lambda n=num_workers: attempt(n), train, num_workers, coordinator, interrupted
            )
            failure = _why_unfinished(ended, finished, coordinator, num_workers)
            if failure is None:
                return
            if interrupted.is_set():
                if failure.kind in ("room", "start", "stop"):
                    raise Interrupted(_STOPPED)
                raise JobError(failure.text) from failure.cause
            coordinator.post.remote(budget.spend(failure, num_workers))


class _Budget:
    """What has failed so far, and how many workers are tried next."""

    def __init__(self, train: TrainSpec) -> None:
        self.train = train
        self.most_workers = train.workers_range[1]
        self._counts = {"failure": 0, "preemption": 0}
        self._starts = 0

    def spend(self, failure: Failure, num_workers: int) -> Event:
        """Return what to tell the user of a failure after which the training is tried again.

        Raises:
            JobError: if it is not.
        """
        if failure.kind in ("error", "stop"):
            raise JobError(failure.text) from failure.cause
        if failure.kind == "start":
            self._starts += 1
            if self._starts == _STARTS:
                text = f"{failure.text}, for the {_STARTS}th time"
                raise JobError(text) from failure.cause
            fewer = [n for n in allowed_worker_counts(self.train) if n < num_workers]
            self.most_workers = max(fewer, default=num_workers)
            text = f"{failure.text}; trying again with {self.most_workers}"
            return {"kind": "note", "text": text}
        self.most_workers, self._starts = self.train.workers_range[1], 0
        if failure.kind == "room":
            return {"kind": "note", "text": failure.text}
        setting, before = f"max_{failure.kind}s", self._counts[failure.kind]
        most = getattr(self.train, setting)
        if 0 <= most <= before:
            raise JobError(
                f"{failure.text}\n(train.{setting}={most} of them are survived; the same command "
                "again goes on from the newest checkpoint)"
            ) from failure.cause
        self._counts[failure.kind] += 1
        return {"kind": "failure", "text": failure.text, "attempt": before + 1, "most": most}


def _attempted(
    attempt: Callable[[], None],
    train: TrainSpec,
    num_workers: int,
    coordinator: Any,
    interrupted: threading.Event,
) -> _Ended:
    """Run one attempt in a thread, so that this one can be interrupted."""
    raised: list[Exception] = []
    done = threading.Event()

    def work() -> None:
        try:
            attempt()
        except Exception as error:
            raised.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="attempt", daemon=True).start()
    looked, told, grows = time.monotonic(), False, False
    while not done.wait(_LOOK_S):
        if interrupted.is_set() and not told:
            told = True
            print("\nsaving a checkpoint; once more ends at once", file=sys.stderr)
            coordinator.ask_to_stop.remote()
        if not (told or grows) and time.monotonic() - looked > _ROOM_EVERY_S:
            looked = time.monotonic()
            # Until its workers are there, their own room counts as free, too.
            if grows := can_grow(train, num_workers) and any_step_finished(coordinator):
                coordinator.ask_to_stop.remote()
    return _Ended(raised[0] if raised else None, grows)


@contextmanager
def _interrupts_noted() -> Iterator[threading.Event]:
    """Note a Ctrl-C, and SIGTERM, which `ray job stop` sends; a second one interrupts as usual."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Signals go to the main thread, which is somebody else's.
        yield noted
        return

    def note(signum: int, frame: Any) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- why an attempt failed ------------------------------------------------------------------------


def _why_unfinished(
    ended: _Ended, finished: Callable[[], bool], coordinator: Any, num_workers: int
) -> Failure | None:
    """Return why the training is to go on after an attempt; None if it has come to its end."""
    try:
        if finished():
            return None
    except OSError as error:
        # What ended the attempt, if anything did, says more.
        if ended.error is None:
            return Failure("failure", f"the run folder could not be read: {error}")
    if ended.error is not None:
        failure = _failure(ended.error, reported_failures(coordinator), num_workers)
        if failure is None:
            raise ended.error
        # Without its frames, which hold handles that would keep Ray's actors alive.
        return replace(failure, cause=ended.error.with_traceback(None))
    if ended.grows:
        return Failure("room", f"there is room for more workers than {num_workers}")
    return Failure("stop", "the workers ended, and the training did not; this is a bug")


def _failure(raised: Exception, told: Sequence[Event], num_workers: int) -> Failure | None:
    """Return what ended an attempt; None if it was nothing of Ray's.

    Of its workers' failures the first that is no other's echo: an error of its own, then a hang,
    then a death of which Ray knows, and at last what others noticed of one that said nothing.
    """
    from ray.exceptions import RayError, RayTaskError
    from ray.train.v2._internal.exceptions import (
        WorkerGroupStartupFailedError,
        WorkerGroupStartupTimeoutError,
    )
    from ray.train.v2.api.exceptions import (
        ControllerError,
        PreemptionError,
        TrainingFailedError,
        WorkerGroupError,
    )

    if isinstance(raised, PreemptionError):
        return Failure("preemption", "a node was taken away")
    if isinstance(raised, WorkerGroupError):
        died = {rank: _death(error) for rank, error in raised.worker_failures.items()}
        lost = {rank: death for rank, death in died.items() if death is not None}
        if any(death.preempted for death in lost.values()):
            return Failure("preemption", "a node was taken away")
        for of_kind in ("own", "hang"):
            for first in (failure for failure in told if failure["of"] == of_kind):
                kind = "failure" if first["again"] else "error"
                return Failure(kind, f"worker {first['rank']} failed: {first['text']}")
        if lost:
            rank, death = min(lost.items())
            return Failure("failure", f"worker {rank} died: {first_line(death)}")
        if told:
            noticed = f"worker {told[0]['rank']} noticed: {told[0]['text'].splitlines()[0]}"
            silent = sorted(set(range(num_workers)) - {failure["rank"] for failure in told})
            if silent:
                which = " or ".join(map(str, silent))
                return Failure("failure", f"worker {which} died or hangs; {noticed}")
            return Failure("failure", noticed)
        rank, error = min(raised.worker_failures.items())
        return Failure("failure", f"worker {rank} failed: {reason(error)}")
    if isinstance(raised, ControllerError):
        why = raised.controller_failure
        if isinstance(why, WorkerGroupStartupTimeoutError):
            return Failure("start", f"there was no room for {num_workers} workers for a minute")
        if isinstance(why, WorkerGroupStartupFailedError):
            # A sentence of Ray's, and a traceback that ends in the reason.
            return Failure("failure", f"a worker died while it started: {_last_line(why)}")
        if isinstance(why, RayError) and not isinstance(why, RayTaskError):
            return Failure("failure", f"a worker or its node was lost: {first_line(why)}")
        return Failure("error", f"the workers could not be started: {raised}")
    if isinstance(raised, TrainingFailedError):
        return Failure("error", f"training failed: {raised}")
    if isinstance(raised, RayError):
        return Failure("failure", f"Ray lost the training's controller: {first_line(raised)}")
    return None


def _death(error: Exception) -> "RayActorError | None":
    """Return how a worker's process died, if it did; Ray wraps what its look at one raises."""
    from ray.exceptions import RayActorError

    inner = getattr(error, "health_check_failure", error)
    return inner if isinstance(inner, RayActorError) else None


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


# -- one attempt ----------------------------------------------------------------------------------


def fit_once(
    train: TrainSpec,
    num_workers: int,
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    storage_path: str,
    callbacks: Sequence["UserCallback"],
) -> None:
    """Run Ray Train once."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from ray_jobs.cluster.tf_backend import KerasTrainer

    # Not bound to a name: a frame that an exception keeps would keep the controller alive.
    KerasTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker=worker_resources(train),
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=storage_path,
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
            callbacks=list(callbacks),
        ),
    ).fit()
