"""Trains folds on the connected Ray cluster, as many at a time as fit.

A process trains one fold after the other, so that TensorFlow is imported only once. A fold whose
process is lost continues in a new process.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from ray_jobs.cluster.capacity import trial_slots, worker_resources
from ray_jobs.cluster.connection import first_line
from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.config.text import count_text
from ray_jobs.cross_validate.cv_results import ROWS
from ray_jobs.cross_validate.fold_worker import FoldWorker
from ray_jobs.train.job import run_folder
from ray_jobs.train.supervisor import noting_interrupts
from ray_jobs.train.worker import is_permanent

_POLL_S = 0.5


def run_folds(specs: Sequence[RunSpec], on_done: Callable[[int], None]) -> None:
    """Train folds until all are complete or have failed.

    Args:
        specs: The spec of each fold, whose run folder has its manifest.
        on_done: Receives the index of each fold that is complete.

    Raises:
        JobError: If folds failed; the message names each with its error.
        Interrupted: If the user stopped the job.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    pending, failed = deque[int](), dict[int, str]()
    for index, spec in enumerate(specs):
        if run_folder(spec).exists(ROWS):
            on_done(index)
        else:
            pending.append(index)
    train = specs[0].train
    bundles = [worker_resources(train)] * train.workers_range[0]
    num_slots = min(trial_slots(bundles[0], len(bundles)), len(pending)) if pending else 0
    slots = [_Slot(bundles) for _ in range(num_slots)]
    losses = Counter[int]()
    running: dict[Any, tuple[int, _Slot]] = {}
    with noting_interrupts() as interrupted:
        try:
            while pending or running:
                while pending and slots:
                    index, slot = pending.popleft(), slots.pop()
                    running[slot.worker.train.remote(specs[index])] = index, slot
                for done in ray.wait(list(running), timeout=_POLL_S)[0]:
                    index, slot = running.pop(done)
                    try:
                        ray.get(done)
                        on_done(index)
                    except (RayActorError, RayTaskError) as error:
                        cause = getattr(error, "cause", None) or error
                        losses[index] += 1
                        is_last = losses[index] > train.max_failures >= 0
                        if is_permanent(cause) or is_last:
                            failed[index] = f"{type(cause).__name__}: {first_line(cause)}"
                        else:
                            pending.append(index)
                        slot.restart()
                    slots.append(slot)
                if interrupted.is_set():
                    raise Interrupted("stopped; run the same command again to continue")
        finally:
            for slot in [*slots, *(slot for _, slot in running.values())]:
                slot.close()
    if failed:
        errors = "; ".join(f"{specs[i].run.name}: {text}" for i, text in sorted(failed.items()))
        raise JobError(
            f"{len(failed)} of {count_text(len(specs), 'fold')} failed: {errors}; after correcting "
            "the cause, run the same command again to train only these folds"
        )


class _Slot:
    """A placement group and the actor that trains folds in it.

    Args:
        bundles: Resources of each worker of a fold.
    """

    def __init__(self, bundles: Sequence[dict[str, float]]) -> None:
        from ray.util.placement_group import placement_group

        self.bundles = bundles
        self.placement = placement_group(list(bundles), strategy="PACK")
        self.worker = self._start()

    def restart(self) -> None:
        """Replace the actor, which may have ended, by a new one."""
        import ray

        ray.kill(self.worker)
        self.worker = self._start()

    def close(self) -> None:
        """End all processes of the slot."""
        import ray
        from ray.util.placement_group import remove_placement_group

        ray.kill(self.worker)
        remove_placement_group(self.placement)

    def _start(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        first = self.bundles[0]
        return (
            ray.remote(FoldWorker)
            .options(
                num_cpus=first.get("CPU", 0),
                num_gpus=first.get("GPU", 0),
                resources={n: amount for n, amount in first.items() if n not in ("CPU", "GPU")},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, 0),
            )
            .remote()
        )
