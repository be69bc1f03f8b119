"""Attempts at a training until one comes to its end: what fails, and whether it is tried again.

Each attempt is one run of Ray Train that goes on from the newest checkpoint, with as many workers
as there is room for. Ray itself tries nothing again: it cannot tell a lost node from a row that is
damaged, and it counts a killed controller as neither.

    failure     a worker that died, hung or lost another: up to `train.max_failures`
    preemption  a node that its provider took away: up to `train.max_preemptions`
    error       in data, settings or program: never, since it would come again
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ray_jobs.cli import Interrupted, JobError
from ray_jobs.cluster import first_line, reason
from ray_jobs.spec import TrainSpec

if TYPE_CHECKING:
    from ray.train import UserCallback

_STARTS = 30
"""Tries of Ray to start a group of workers, a minute each: enough for an autoscaler, and then the
user should know."""
_LOOK_S = 0.5
_ROOM_EVERY_S = 10.0


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended."""

    kind: Literal["failure", "preemption", "error"]
    text: str


class _MoreRoom(Exception):
    """The attempt was ended for one with more workers; its checkpoint is saved."""


def run_attempts(train: TrainSpec, attempt: Callable[[int], None], board: Any) -> None:
    """Run attempts until one comes to its end.

    Args:
        train: workers, and what may fail how often.
        attempt: one of them, with so many workers; raises what Ray raises.
        board: that its workers post to.

    Raises:
        JobError: if none does; the text is that of the first worker that failed.
        Interrupted: if the user stopped it.
    """
    import ray

    counts = {"failure": 0, "preemption": 0}
    while True:
        num_workers = _num_workers(train)
        ray.get(board.begin.remote())
        try:
            _attempted(lambda n=num_workers: attempt(n), train, num_workers, board)
            return
        except _MoreRoom:
            continue
        except Exception as error:
            if isinstance(error, Interrupted):
                raise
            failure = _failure(error, board)
        if failure.kind == "error":
            raise JobError(failure.text)
        setting = f"max_{failure.kind}s"
        most, before = getattr(train, setting), counts[failure.kind]
        if 0 <= most <= before:
            raise JobError(
                f"{failure.text}\n(train.{setting}={most} of them are survived; the same command "
                "again goes on from the newest checkpoint)"
            )
        counts[failure.kind] += 1
        event = {"kind": "failure", "text": failure.text, "attempt": before + 1, "most": most}
        board.post.remote(event)


def _attempted(attempt: Callable[[], None], train: TrainSpec, num_workers: int, board: Any) -> None:
    """Run one attempt in a thread, so that this one can be interrupted; raise what it raises."""
    raised: list[Exception] = []
    done = threading.Event()

    def work() -> None:
        try:
            attempt()
        except Exception as error:
            raised.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work, name="attempt", daemon=True)
    interrupted = grows = False
    with _terminated_as_interrupted():
        thread.start()
        looked = time.monotonic()
        # Not by joining the thread, which Python takes for ended when that is interrupted.
        while not done.is_set():
            try:
                done.wait(_LOOK_S)
                if not grows and time.monotonic() - looked > _ROOM_EVERY_S:
                    looked = time.monotonic()
                    if grows := _has_room_for_more(train, num_workers):
                        board.ask_to_stop.remote()
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                print("\nsaving a checkpoint; once more ends at once", file=sys.stderr)
                board.ask_to_stop.remote()
    if interrupted:
        raise Interrupted("stopped; the same command again goes on from the saved checkpoint")
    if raised:
        raise raised[0]
    if grows:
        raise _MoreRoom


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM, which `ray job stop` sends, for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        # Signals go to the main thread, which is somebody else's.
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- why an attempt failed ------------------------------------------------------------------------


def _failure(raised: BaseException, board: Any) -> Failure:
    """Return what ended an attempt: the first of its workers' failures that is no other's echo."""
    import ray
    from ray.exceptions import RayActorError, RayError
    from ray.train.v2.api.exceptions import (
        ControllerError,
        PreemptionError,
        TrainingFailedError,
        WorkerGroupError,
    )

    try:
        told = sorted(ray.get(board.failures.remote(), timeout=10), key=lambda f: f["time"])
    except RayError:
        told = []
    own = [failure for failure in told if not failure["echo"]]
    if isinstance(raised, PreemptionError):
        return Failure("preemption", "a node was taken away")
    if isinstance(raised, WorkerGroupError):
        lost = {r: e for r, e in raised.worker_failures.items() if isinstance(e, RayActorError)}
        if any(getattr(error, "preempted", False) for error in lost.values()):
            return Failure("preemption", "a node was taken away")
        if not own and lost:
            rank, error = min(lost.items())
            return Failure("failure", f"worker {rank} died: {first_line(error)}")
        if told:
            first = (own or told)[0]
            kind = "failure" if first["again"] else "error"
            return Failure(kind, f"worker {first['rank']} failed: {first['text']}")
        rank, error = min(raised.worker_failures.items())
        return Failure("failure", f"worker {rank} failed: {reason(error)}")
    if isinstance(raised, ControllerError):
        return Failure("error", f"the workers could not be started: {raised}")
    if isinstance(raised, TrainingFailedError):
        return Failure("error", f"training failed: {raised}")
    if isinstance(raised, RayError):
        return Failure("failure", f"Ray lost the training's controller: {first_line(raised)}")
    raise raised


# -- how many workers -----------------------------------------------------------------------------


def _num_workers(train: TrainSpec) -> int:
    """Return how many workers to start: of those allowed the most that there is room for."""
    low, high = train.workers_range
    allowed = [n for n in train.allowed_workers() if low <= n <= high]
    room = _room(train) if low < high else high
    # With room for none, the least: Ray waits for it, and so does an autoscaler's request.
    return max([n for n in allowed if n <= room], default=allowed[0])


def _has_room_for_more(train: TrainSpec, num_workers: int) -> bool:
    low, high = train.workers_range
    if low == high:
        return False
    import ray

    needed = worker_resources(train)
    free = ray.available_resources()
    more = min(int(free.get(name, 0) / amount) for name, amount in needed.items())
    room = min(_room(train), num_workers + more)
    return any(num_workers < n <= min(high, room) for n in train.allowed_workers())


def _room(train: TrainSpec) -> int:
    """Return how many workers the nodes that are there could hold, a CPU left to Ray Data."""
    import ray

    needed = worker_resources(train)
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    roomiest = max(nodes, key=lambda node: node.get("CPU", 0), default={})
    roomiest["CPU"] = roomiest.get("CPU", 0) - 1
    return sum(
        max(min(int(node.get(name, 0) / amount) for name, amount in needed.items()), 0)
        for node in nodes
    )


def worker_resources(train: TrainSpec) -> dict[str, float]:
    """Return the Ray resources of one worker."""
    gpus = {"GPU": float(train.gpus_per_worker)} if train.use_gpu else {}
    return {"CPU": train.cpus_per_worker, **gpus, **train.resources_per_worker}


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

    from ray_jobs.tf_backend import KerasTrainer

    # Not bound to a name: a frame that an exception keeps would keep the controller alive.
    KerasTrainer(
        loop,
        train_loop_config={**config, "began": time.time()},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker=worker_resources(train),
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=storage_path,
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=_STARTS
            ),
            callbacks=list(callbacks),
        ),
    ).fit()
