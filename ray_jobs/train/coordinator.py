"""Passes messages between the driver and the workers of a run, through an actor without a CPU.

Workers post events and failures; the driver reads them and requests stops. Calls time out after
10 s; training never depends on them.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ray_jobs.train.telemetry.console import Event

_TIMEOUT_S = 10.0
_STOP_POLL_S = 0.1


@dataclass(frozen=True)
class WorkerFailure:
    """Why a worker failed, as it reports itself."""

    rank: int
    text: str
    kind: Literal["error", "hang", "secondary"] = "error"
    """`secondary` is an error that the failure of another worker caused."""
    permanent: bool = False
    """Whether a restart would fail in the same way."""


class _Coordinator:
    """Holds the unread events, the failures of the current attempt and the request to stop."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.begin_attempt()

    def begin_attempt(self) -> None:
        self.reported: list[WorkerFailure] = []
        self.stop = self.step_finished = False

    def post(self, event: Event) -> None:
        self.events.append(event)
        # Rank 0 reports its start-up after the first step.
        self.step_finished |= event["kind"] == "startup"

    def take(self) -> list[Event]:
        taken, self.events = self.events, []
        return taken

    def report_failure(self, failure: WorkerFailure) -> None:
        self.reported.append(failure)

    def failures(self) -> list[WorkerFailure]:
        return self.reported

    def request_stop(self) -> None:
        self.stop = True

    def stop_requested(self) -> bool:
        return self.stop

    def any_step_finished(self) -> bool:
        return self.step_finished


def make_coordinator() -> Any:
    """Return the handle of a new coordinator, which lives as long as the job."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node, since the job ends with that node anyway.
    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    actor: Any = ray.remote(_Coordinator)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()


def begin_attempt(coordinator: Any) -> None:
    """Clear the failures and requests of the previous attempt."""
    # A busy coordinator does it after the timeout, but before any later call.
    _answer(coordinator.begin_attempt.remote())


def any_step_finished(coordinator: Any) -> bool:
    """Return whether the current attempt has finished a step."""
    return _answer(coordinator.any_step_finished.remote(), default=False)


def report_failure(coordinator: Any, failure: WorkerFailure) -> None:
    """Report a worker's failure to the driver, in more detail than Ray does."""
    _answer(coordinator.report_failure.remote(failure))


def reported_failures(coordinator: Any) -> list[WorkerFailure]:
    """Return the failures that workers reported in this attempt, in order."""
    return _answer(coordinator.failures.remote(), default=[])


def _answer(reference: Any, default: Any = None) -> Any:
    """Return the result of a call, or the default if the coordinator is busy or lost."""
    import ray
    from ray.exceptions import RayError

    with suppress(RayError):
        return ray.get(reference, timeout=_TIMEOUT_S)
    return default


class StopRequest:
    """Polls a coordinator for a request to stop."""

    def __init__(self, coordinator: Any) -> None:
        self.coordinator, self._pending, self._stop = coordinator, None, False

    def __call__(self) -> bool:
        """Return whether a stop was requested, or the last known answer if none arrives quickly."""
        import ray

        if self._pending is None:
            self._pending = self.coordinator.stop_requested.remote()
        if ray.wait([self._pending], timeout=_STOP_POLL_S)[0]:
            # A lost coordinator requests nothing; this worker will soon end with the job, too.
            self._stop, self._pending = _answer(self._pending, default=False), None
        return self._stop
