"""Passes messages between the driver and the workers of a run, through an actor without a CPU.

Workers post events and failures; the driver reads them and requests stops. Training never depends
on the answers.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ray_jobs.train.telemetry.console import Event

_TIMEOUT_S = 10.0
_STOP_POLL_S = 0.1


@dataclass(frozen=True)
class WorkerFailure:
    """A worker's own report of why it failed."""

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
        """Clear the failures and requests of the previous attempt."""
        self.reported: list[WorkerFailure] = []
        self.stop = self.step_finished = False

    def post(self, event: Event) -> None:
        """Store an event until the driver takes it."""
        self.events.append(event)
        # Rank 0 reports its start-up after the first step.
        self.step_finished |= event["kind"] == "startup"

    def take(self) -> list[Event]:
        """Return and remove the stored events."""
        taken, self.events = self.events, []
        return taken

    def report_failure(self, failure: WorkerFailure) -> None:
        """Store a worker's failure, which says more than Ray's error."""
        self.reported.append(failure)

    def failures(self) -> list[WorkerFailure]:
        """Return the failures that workers reported in this attempt, in order."""
        return self.reported

    def request_stop(self) -> None:
        """Request a stop of the current attempt."""
        self.stop = True

    def stop_requested(self) -> bool:
        """Whether a stop of the current attempt was requested."""
        return self.stop

    def any_step_finished(self) -> bool:
        """Whether the current attempt has finished a step."""
        return self.step_finished


def make_coordinator() -> Any:
    """Return the handle of a new coordinator, which lives as long as the job."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node, because the job ends with that node anyway.
    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    actor: Any = ray.remote(_Coordinator)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()


def answer(call: Any, default: Any = None) -> Any:
    """Return the result of a call to the coordinator, or the default if it takes over 10 s.

    A busy coordinator completes the call later, but before any later call of this process.

    Args:
        call: The reference that `coordinator.METHOD.remote(…)` returned.
        default: Returned if the coordinator is busy or lost.
    """
    import ray
    from ray.exceptions import RayError

    with suppress(RayError):
        return ray.get(call, timeout=_TIMEOUT_S)
    return default


class StopRequest:
    """Polls a coordinator for a request to stop."""

    def __init__(self, coordinator: Any) -> None:
        self.coordinator, self._pending, self._stop = coordinator, None, False

    def __call__(self) -> bool:
        """Return whether a stop was requested; the last known answer if none arrives in 0.1 s."""
        import ray

        if self._pending is None:
            self._pending = self.coordinator.stop_requested.remote()
        if ray.wait([self._pending], timeout=_STOP_POLL_S)[0]:
            # If the coordinator is lost, this worker will soon end with the job, too.
            self._stop, self._pending = answer(self._pending, default=False), None
        return self._stop
