"""Passes messages between the driver and the workers of a run, through an actor without a CPU.

Workers post events and failures; the driver reads them and requests stops. Training never depends
on the answers, except that it starts once `hold` has reserved CPUs for reading.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ray_jobs.train.telemetry.console import Event

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

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


@dataclass(frozen=True)
class HeldResources:
    """Resources of the current attempt."""

    by_node: dict[str, dict[str, float]] = field(default_factory=dict)
    """Resources by node ID."""
    waits_for: Sequence[Mapping[str, float]] = ()
    """Bundles for reading tasks that do not fit on the cluster yet."""


class _Coordinator:
    """Holds the unread events, and for the current attempt its failures, resources and requests."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.workers: Sequence[tuple[str, Mapping[str, float]]] = ()
        self.placement: PlacementGroup | None = None
        self.begin_attempt()

    def begin_attempt(self) -> None:
        """Clear the failures, requests and resources of the previous attempt."""
        self.release()
        self.reported: list[WorkerFailure] = []
        self.stop = self.step_finished = self.preemption = False

    def post(self, event: Event) -> None:
        """Store an event until the driver takes it."""
        self.events.append(event)
        # Rank 0 reports its start-up after the first step.
        self.step_finished |= event["kind"] == "startup"
        self.preemption |= event["kind"] == "preemption"

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

    def hold(
        self,
        workers: Sequence[tuple[str, Mapping[str, float]]],
        bundles: list[dict[str, float]],
        selectors: list[dict[str, str]],
    ) -> "PlacementGroup | None":
        """Note where the workers run, and reserve resources for reading tasks once per attempt.

        Args:
            workers: Node ID and resources of each worker.
            bundles: Bundles for reading tasks, or none.
            selectors: Label selectors of the bundles, or none.
        """
        from ray.util import placement_group

        self.workers = workers
        if bundles and self.placement is None:
            given: Any = selectors or None
            self.placement = placement_group(bundles, bundle_label_selector=given)
        return self.placement

    def held(self) -> HeldResources:
        """Return the resources of the current attempt."""
        from ray.util import placement_group_table

        placed, waits_for = list(self.workers), list[Mapping[str, float]]()
        if self.placement is not None:
            table: Any = placement_group_table(self.placement)
            for index, bundle in table["bundles"].items():
                if node := table["bundles_to_node_id"].get(index):
                    placed.append((node, bundle))
                else:
                    waits_for.append(bundle)
        by_node: dict[str, dict[str, float]] = {}
        for node, bundle in placed:
            sums = by_node.setdefault(node, {})
            for name, amount in bundle.items():
                sums[name] = sums.get(name, 0) + amount
        return HeldResources(by_node, tuple(waits_for))

    def release(self) -> None:
        """Release the resources for reading tasks of an ended attempt."""
        from ray.util import remove_placement_group

        placement, self.placement, self.workers = self.placement, None, ()
        if placement is not None:
            remove_placement_group(placement)

    def any_step_finished(self) -> bool:
        """Whether the current attempt has finished a step."""
        return self.step_finished

    def preemption_announced(self) -> bool:
        """Whether a preemption of a node was announced in the current attempt."""
        return self.preemption


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
