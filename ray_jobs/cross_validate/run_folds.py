"""Trains folds on the connected Ray cluster, as many at a time as fit.

A process trains one fold after another, so that TensorFlow is imported only once. A fold whose
process is lost continues in a new process.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from ray_jobs.cluster.capacity import trials_that_fit, worker_resources
from ray_jobs.cluster.connection import first_line, owns_ray
from ray_jobs.cluster.node_inventory import (
    current_nodes,
    describe_nodes,
    describe_resources,
    possible_nodes,
)
from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.config.spec import RunSpec, TrainSpec
from ray_jobs.config.text import count_text
from ray_jobs.cross_validate.cv_results import ROWS
from ray_jobs.cross_validate.fold_worker import CHECKPOINTS, ERROR, FoldWorker
from ray_jobs.train.job import run_folder
from ray_jobs.train.supervisor import noting_interrupts
from ray_jobs.train.worker import is_permanent

_POLL_S = 0.5
_PATIENCE_S = 10.0
"""Seconds without resources after which a message is printed."""


def run_folds(specs: Sequence[RunSpec], on_done: Callable[[int], None]) -> None:
    """Train folds until all are complete or have failed.

    Args:
        specs: The spec of each fold, whose run folder has its manifest.
        on_done: Receives the index of each fold that is complete.

    Raises:
        JobError: If a fold does not fit on the cluster, or folds failed; the message names each
            with its error.
        Interrupted: If the user stopped the job.
    """
    pending, failed = deque[int](), dict[int, str]()

    def finish(index: int) -> None:
        run_folder(specs[index]).delete(CHECKPOINTS)
        on_done(index)

    for index, spec in enumerate(specs):
        if run_folder(spec).exists(ROWS):
            finish(index)
        else:
            pending.append(index)
    if not pending:
        return
    train = specs[0].train
    with noting_interrupts() as interrupted:
        slots = [_Slot(train) for _ in range(min(num_slots(train), len(pending)))]
        try:
            _run(specs, pending, slots, finish, failed, interrupted)
        finally:
            for slot in slots:
                slot.close()
    if failed:
        errors = "; ".join(f"{specs[i].run.name}: {text}" for i, text in sorted(failed.items()))
        raise JobError(
            f"{len(failed)} of {count_text(len(specs), 'fold')} failed: {errors}; after correcting "
            "the cause, run the same command again to train only these folds, or choose another "
            "--run.name if a setting must change"
        )


def num_slots(train: TrainSpec) -> int:
    """Return how many folds can run at the same time, now or after an autoscaler adds nodes.

    Raises:
        JobError: If not even one can.
    """
    bundle, num_workers = worker_resources(train), train.workers_range[0]
    nodes, possible = current_nodes(), possible_nodes()
    if slots := max(trials_that_fit(n, bundle, num_workers) for n in (nodes, possible)):
        return slots
    if not possible and not owns_ray():
        # An autoscaler with unknown limits may add nodes.
        return 1
    raise JobError(
        f"train.num_workers={num_workers}: a fold needs {num_workers} × "
        f"({describe_resources(bundle)}), each on one node, and the cluster has "
        f"{describe_nodes(possible or nodes)}; lower train.num_workers or train.cpus_per_worker, "
        "or add nodes"
    )


def _run(
    specs: Sequence[RunSpec],
    pending: deque[int],
    slots: Sequence["_Slot"],
    finish: Callable[[int], None],
    failed: dict[int, str],
    interrupted: Any,
) -> None:
    """Train pending folds in the slots; record the errors of those that fail."""
    import ray
    from ray.exceptions import RayError

    max_failures, losses = specs[0].train.max_failures, Counter[int]()
    free, running = list(slots), dict[Any, tuple[int, _Slot]]()
    started, is_waiting = time.monotonic(), False
    while pending or running:
        for slot in [slot for slot in free if slot.is_ready][: len(pending)]:
            free.remove(slot)
            index = pending.popleft()
            running[slot.worker.train.remote(specs[index])] = index, slot
        if not (running or is_waiting) and time.monotonic() - started > _PATIENCE_S:
            is_waiting = True
            print("  waiting for free resources", flush=True)
        for done in ray.wait(list(running), timeout=_POLL_S)[0] if running else ():
            index, slot = running.pop(done)
            free.append(slot)
            try:
                ray.get(done)
                finish(index)
            except RayError as error:
                cause = getattr(error, "cause", None) or error
                text = f"{type(cause).__name__}: {first_line(cause)}"
                # An error that ended the workers of a fold is in its folder.
                folder = run_folder(specs[index])
                own = folder.read_bytes(ERROR).decode() if folder.exists(ERROR) else None
                losses[index] += not getattr(error, "preempted", False)
                if own or is_permanent(cause) or losses[index] > max_failures >= 0:
                    failed[index] = own or text
                else:
                    print(f"  fold {specs[index].run.name} is restarted: {text}", flush=True)
                    pending.append(index)
                if pending:
                    slot.restart()
        if not running:
            interrupted.wait(_POLL_S)
        if interrupted.is_set():
            raise Interrupted("stopped; run the same command again to continue")


class _Slot:
    """A placement group and the actor that trains folds in it."""

    def __init__(self, train: TrainSpec) -> None:
        from ray.util.placement_group import placement_group

        self.bundles = [worker_resources(train)] * train.workers_range[0]
        self.placement = placement_group(self.bundles, strategy="PACK")
        self.worker = self._start()

    @property
    def is_ready(self) -> bool:
        """Whether the actor has started, for which its resources must be free."""
        import ray

        return bool(ray.wait([self._started], timeout=0)[0])

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
        worker: Any = (
            ray.remote(FoldWorker)
            .options(
                num_cpus=first.get("CPU", 0),
                num_gpus=first.get("GPU", 0),
                resources={n: amount for n, amount in first.items() if n not in ("CPU", "GPU")},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, 0),
            )
            .remote()
        )
        self._started = worker.__ray_ready__.remote()
        return worker
