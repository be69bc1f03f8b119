"""Restarts a training run until it is finished, a failure is permanent or the budget is exhausted.

Each attempt is one run of Ray Train that resumes from the newest checkpoint, with as many workers
as fit on the cluster. Ray's own retries are off: Ray cannot distinguish a lost node from a damaged
row, and counts a killed controller as neither.

    failure     a worker died, hung or lost another worker: up to `train.max_failures`
    preemption  the provider reclaimed a node: up to `train.max_preemptions`
    startup     no capacity for the workers: 30 times in a row, about half an hour
    permanent   an error in the data, the settings or the code: never retried
"""

import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ray_jobs.cluster import compat_ray
from ray_jobs.cluster.capacity import (
    allowed_worker_counts,
    can_grow,
    worker_resources,
    workers_that_fit,
    workers_to_start,
)
from ray_jobs.cluster.capacity_request import CapacityRequest
from ray_jobs.cluster.connection import first_line, owns_ray, root_cause
from ray_jobs.cluster.node_inventory import (
    current_nodes,
    describe_nodes,
    free_nodes,
    possible_nodes,
)
from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.config.spec import TrainSpec
from ray_jobs.config.text import count_text
from ray_jobs.train.coordinator import HeldResources, WorkerFailure, answer
from ray_jobs.train.telemetry.console import Event

if TYPE_CHECKING:
    from ray.train import UserCallback

    from ray_jobs.train.datasets import RunData

_MAX_STARTUPS = 30
"""Attempts in a row to start the workers, a minute each: enough for an autoscaler."""
_POLL_S = 0.5
_CAPACITY_POLL_S = 10.0
_PREEMPTED = "a node was preempted"
_STOPPED = "stopped; run the same command again to resume the run"


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended before the run was finished."""

    kind: Literal["failure", "preemption", "startup", "permanent", "growth", "stopped"]
    """As above; `growth`: stopped to add workers; `stopped`: the workers ended without an error."""
    text: str
    cause: Exception | None = None


def run_attempts(
    train: TrainSpec, attempt: Callable[[int], None], finished: Callable[[], bool], coordinator: Any
) -> None:
    """Run attempts until the run is finished.

    Args:
        train: The `train` section: numbers of workers and of allowed failures.
        attempt: Runs one attempt with a number of workers; raises what Ray raises.
        finished: Returns whether the run is finished.
        coordinator: The run's coordinator.

    Raises:
        JobError: If the run cannot be finished, with the error of the first failed worker.
        Interrupted: If the user stopped the run.
    """
    budget, wait_s = _Budget(train), _wait_for_nodes_s(train)
    max_workers = allowed_worker_counts(train)[-1]
    with noting_interrupts() as interrupted, CapacityRequest() as request:
        while True:
            request.update(_missing(train, 0))
            if wait_s and workers_that_fit(free_nodes(), train) < max_workers:
                text = f"waiting up to {wait_s:.0f} s for nodes for {max_workers} workers"
                coordinator.post.remote({"kind": "note", "text": text})
            num_workers = workers_to_start(train, budget.max_workers, interrupted, wait_s)
            wait_s = 0.0
            answer(coordinator.begin_attempt.remote())
            if interrupted.is_set():
                raise Interrupted(_STOPPED)
            request.update(_missing(train, num_workers))
            error, grows = _run_attempt(attempt, train, num_workers, coordinator, interrupted)
            failure = _failure(error, grows, finished, coordinator, num_workers)
            if failure is None:
                return
            if interrupted.is_set():
                if failure.kind in ("startup", "growth", "stopped"):
                    raise Interrupted(_STOPPED)
                raise JobError(failure.text) from failure.cause
            coordinator.post.remote(budget.spend(failure, num_workers))


def _wait_for_nodes_s(train: TrainSpec) -> float:
    """Return how long a run waits at its start for nodes that an autoscaler may add."""
    possible, is_range = possible_nodes(), len(allowed_worker_counts(train)) > 1
    can_grow_later = workers_that_fit(possible, train) > workers_that_fit(current_nodes(), train)
    is_fixed = owns_ray() or (possible and not can_grow_later)
    return train.wait_for_workers_s if is_range and not is_fixed else 0.0


def _missing(train: TrainSpec, num_workers: int) -> list[dict[str, float]]:
    """Return what a run with a range of workers lacks; Ray Train requests all other workers."""
    allowed = allowed_worker_counts(train)
    if len(allowed) == 1:
        return []
    # `workers_that_fit` leaves a CPU to reading tasks.
    return [worker_resources(train)] * (allowed[-1] - num_workers) + [{"CPU": 1.0}]


class _Budget:
    """Counts failures and chooses the maximum number of workers of the next attempt."""

    def __init__(self, train: TrainSpec) -> None:
        self.train, self.max_workers = train, train.workers_range[1]
        self._counts = Counter[str]()

    def spend(self, failure: Failure, num_workers: int) -> Event:
        """Count a failure and return the event that reports it.

        Raises:
            JobError: If the run must not be restarted.
        """
        if failure.kind in ("permanent", "stopped"):
            raise JobError(failure.text) from failure.cause
        if failure.kind == "startup":
            self._counts["startup"] += 1
            if self._counts["startup"] == _MAX_STARTUPS:
                text = f"{failure.text}, {_MAX_STARTUPS} times in a row"
                raise JobError(text) from failure.cause
            fewer = [n for n in allowed_worker_counts(self.train) if n < num_workers]
            self.max_workers = max(fewer, default=num_workers)
            text = f"{failure.text}; trying {count_text(self.max_workers, 'worker')}"
            return {"kind": "note", "text": text}
        self.max_workers, self._counts["startup"] = self.train.workers_range[1], 0
        if failure.kind == "growth":
            return {"kind": "note", "text": failure.text}
        setting, before = f"max_{failure.kind}s", self._counts[failure.kind]
        most = getattr(self.train, setting)
        if 0 <= most <= before:
            raise JobError(
                f"{failure.text}\n(train.{setting}={most} is exhausted; run the same command again "
                "to resume from the newest checkpoint)"
            ) from failure.cause
        self._counts[failure.kind] += 1
        return {"kind": "failure", "text": failure.text, "attempt": before + 1, "most": most}


def _run_attempt(
    attempt: Callable[[int], None],
    train: TrainSpec,
    num_workers: int,
    coordinator: Any,
    interrupted: threading.Event,
) -> tuple[Exception | None, bool]:
    """Run an attempt in a thread, so that the main thread can handle interrupts.

    Returns:
        The error of the attempt, and whether it was stopped to restart with more workers.
    """
    errors: list[Exception] = []

    def work() -> None:
        try:
            attempt(num_workers)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="attempt", daemon=True)
    thread.start()
    last_look, stopping, grows, waits = time.monotonic(), False, False, False
    try:
        while thread.join(_POLL_S) or thread.is_alive():
            if interrupted.is_set() and not stopping:
                stopping = True
                print("\nsaving a checkpoint; interrupt again to stop at once", file=sys.stderr)
                coordinator.request_stop.remote()
            if stopping or grows or time.monotonic() - last_look <= _CAPACITY_POLL_S:
                continue
            last_look = time.monotonic()
            held = answer(coordinator.held.remote(), HeldResources())
            if held.waits_for and not waits:
                waits = True
                text = f"waiting for {describe_nodes(held.waits_for)} to read the data"
                coordinator.post.remote({"kind": "note", "text": text})
            # Until the workers have started, their own resources count as free, too.
            if can_grow(train, num_workers, held.by_node) and answer(
                coordinator.any_step_finished.remote()
            ):
                grows = True
                coordinator.request_stop.remote()
    finally:
        answer(coordinator.release.remote())
    return next(iter(errors), None), grows


@contextmanager
def noting_interrupts(on_first: Callable[[], None] | None = None) -> Iterator[threading.Event]:
    """Record Ctrl-C and SIGTERM (`ray job stop`); a second signal raises KeyboardInterrupt.

    Args:
        on_first: Called in the main thread at the first signal.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread can set signal handlers.
        yield noted
        return

    def note(signum: int, frame: Any) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()
        if on_first is not None:
            on_first()

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- why an attempt failed ------------------------------------------------------------------------


def _failure(
    error: Exception | None,
    grows: bool,
    finished: Callable[[], bool],
    coordinator: Any,
    num_workers: int,
) -> Failure | None:
    """Return why an attempt did not finish the run, or None if it did."""
    try:
        if finished():
            return None
    except OSError as unreadable:
        # The error of the attempt, if any, is the cause.
        if error is None:
            return Failure("failure", f"could not read the run folder: {unreadable}")
    if error is not None:
        reported = answer(coordinator.failures.remote(), default=[])
        failure = _classify(error, reported, num_workers)
        is_lost = failure.kind == "failure" and all(worker.kind != "error" for worker in reported)
        if is_lost and answer(coordinator.preemption_announced.remote(), default=False):
            # The other workers can fail, or hang, before Ray notices that the node is gone.
            failure = Failure("preemption", f"{_PREEMPTED}; {failure.text}")
        # The frames of the error hold handles that would keep Ray's actors alive.
        return replace(failure, cause=error.with_traceback(None))
    if grows:
        workers = count_text(num_workers, "worker")
        return Failure("growth", f"the cluster has capacity for more than {workers}; restarting")
    text = "the workers ended before the run was finished, which is a bug; please report it"
    return Failure("stopped", text)


def _classify(error: Exception, reported: Sequence[WorkerFailure], num_workers: int) -> Failure:
    """Return the failure behind an error of Ray Train; raise an error that is not Ray's."""
    from ray.exceptions import RayError, RayTaskError
    from ray.train import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

    if isinstance(error, PreemptionError):
        return Failure("preemption", _PREEMPTED)
    if isinstance(error, WorkerGroupError):
        return _worker_failure(error.worker_failures, reported, num_workers)
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        if compat_ray.is_startup_timeout(cause):
            workers = count_text(num_workers, "worker")
            text = f"the cluster had no capacity for {workers} within a minute"
            return Failure("startup", text)
        if compat_ray.is_startup_failure(cause):
            # The text ends with a traceback, whose last line names the reason.
            reason = str(cause).strip().splitlines()[-1]
            return Failure("failure", f"a worker died during start-up: {reason}")
        if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):
            return Failure("failure", f"a worker or its node was lost: {first_line(cause)}")
        return Failure("permanent", f"the workers could not be started: {error}")
    if isinstance(error, TrainingFailedError):
        return Failure("permanent", f"training failed: {error}")
    if isinstance(error, RayError):
        return Failure("failure", f"Ray lost the controller of the run: {first_line(error)}")
    raise error


def _worker_failure(
    errors: dict[int, Exception], reported: Sequence[WorkerFailure], num_workers: int
) -> Failure:
    """Return the root cause of the failed workers, given their errors by rank.

    Returns the first of: a reported error, a reported hang, a death that Ray noticed, and an error
    that other workers had because of a worker that reported nothing.
    """
    from ray.exceptions import RayActorError

    causes = {rank: compat_ray.health_check_cause(error) for rank, error in errors.items()}
    deaths = {rank: cause for rank, cause in causes.items() if isinstance(cause, RayActorError)}
    if any(death.preempted for death in deaths.values()):
        return Failure("preemption", _PREEMPTED)
    for kind in ("error", "hang"):
        for first in (failure for failure in reported if failure.kind == kind):
            text = f"worker {first.rank} failed: {first.text}"
            return Failure("permanent" if first.permanent else "failure", text)
    if deaths:
        rank, death = min(deaths.items())
        return Failure("failure", f"worker {rank} died: {first_line(death)}")
    if reported:
        first = reported[0]
        text = f"worker {first.rank} reported: {first.text.splitlines()[0]}"
        if silent := sorted(set(range(num_workers)) - {failure.rank for failure in reported}):
            text = f"worker {' or '.join(map(str, silent))} died or is hung; {text}"
        return Failure("failure", text)
    rank, error = min(errors.items())
    return Failure("failure", f"worker {rank} failed: {root_cause(error)}")


# -- one attempt ----------------------------------------------------------------------------------


def fit_once(
    train: TrainSpec,
    num_workers: int,
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    storage_path: str,
    callbacks: Sequence["UserCallback"],
    data: "RunData",
) -> None:
    """Run Ray Train once."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from ray_jobs.cluster.tf_backend import KerasTrainer

    # Not bound to a name: an exception's frames would keep the controller alive.
    KerasTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker=worker_resources(train),
        ),
        datasets=data.datasets(),
        dataset_config=data,
        run_config=RunConfig(
            name="checkpoints",
            storage_path=storage_path,
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
            callbacks=list(callbacks),
        ),
    ).fit()
