"""What driver and workers of a run tell each other: an actor without a CPU that both can reach.

Workers post what they do and why they fail; the driver reads it, and asks them to stop. Nobody
waits for it long, and no training depends on it.
"""

import time
from contextlib import suppress
from typing import Any

from ray_jobs.train.telemetry.console import Event

_ANSWER_S = 10.0
_AT_ONCE_S = 0.1


class _Coordinator:
    """Holds the events that were not read yet, the failures, and what workers are asked for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.failed: list[Event] = []
        self.stop = self.heard = False

    def post(self, event: Event) -> None:
        self.events.append(event)
        # Rank 0 tells of its start when its first step is done.
        self.heard |= event["kind"] == "startup"

    def take(self) -> list[Event]:
        taken, self.events = self.events, []
        return taken

    def fail(self, failure: Event) -> None:
        # Times of one clock: those of the workers may differ by more than their failures.
        self.failed.append({**failure, "time": time.monotonic()})

    def failures(self) -> list[Event]:
        return self.failed

    def ask_to_stop(self) -> None:
        self.stop = True

    def asked_to_stop(self) -> bool:
        return self.stop

    def any_step_finished(self) -> bool:
        return self.heard

    def begin(self) -> None:
        """Begin another attempt, of which nothing is known yet."""
        self.failed = []
        self.stop = self.heard = False


def make_coordinator() -> Any:
    """Return the handle of a new coordinator, which lives as long as the job."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node, which is the one that has to be there anyway.
    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    actor: Any = ray.remote(_Coordinator)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()


def begin_attempt(coordinator: Any) -> None:
    """Let a coordinator forget the attempt before."""
    import ray
    from ray.exceptions import RayError

    # A busy coordinator does it later, before anything that is asked of it then; a lost one tells
    # nothing any more, and the training does not depend on it.
    with suppress(RayError):
        ray.get(coordinator.begin.remote(), timeout=_ANSWER_S)


def any_step_finished(coordinator: Any) -> bool:
    """Return whether a step was done in this attempt."""
    import ray
    from ray.exceptions import RayError

    with suppress(RayError):
        return ray.get(coordinator.any_step_finished.remote(), timeout=_ANSWER_S)
    return False


def report_failure(coordinator: Any, failure: Event) -> None:
    """Tell the driver of a worker's failure.

    Args:
        coordinator: of the run.
        failure: `rank`; `text`; `again`, whether trying again is worth it; and `of`, which is
            `own`, a `hang`, or the `echo` of another worker's.
    """
    import ray
    from ray.exceptions import RayError

    # Else Ray tells the driver, too, if with fewer words.
    with suppress(RayError):
        ray.get(coordinator.fail.remote(failure), timeout=_ANSWER_S)


def reported_failures(coordinator: Any) -> list[Event]:
    """Return what workers told of their failures in this attempt, the first one first."""
    import ray
    from ray.exceptions import RayError

    with suppress(RayError):
        told = ray.get(coordinator.failures.remote(), timeout=_ANSWER_S)
        return sorted(told, key=lambda failure: failure["time"])
    return []


class StopRequest:
    """Tells a worker whether it was asked to stop, without waiting long for the answer."""

    def __init__(self, coordinator: Any) -> None:
        self.coordinator, self._answer, self._stop = coordinator, None, False

    def __call__(self) -> bool:
        """Return the answer, or if it does not come at once, the one before."""
        import ray
        from ray.exceptions import RayError

        if self._answer is None:
            self._answer = self.coordinator.asked_to_stop.remote()
        if ray.wait([self._answer], timeout=_AT_ONCE_S)[0]:
            try:
                self._stop = bool(ray.get(self._answer))
            except RayError:
                # The coordinator is gone with its job, and soon this worker with it.
                self._stop = False
            self._answer = None
        return self._stop
