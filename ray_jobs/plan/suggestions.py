"""Settings with which a run fits that does not as it is; each was tried by the same reckoning."""

from collections.abc import Callable, Iterator
from typing import Any

from mm_model.spec import Spec
from ray_jobs.config.spec import RunSpec
from ray_jobs.plan.estimate import Estimator, Plan
from ray_jobs.plan.plan_spec import MachineSpec


class Suggestion(Spec):
    """Settings to change, by their paths, and what the run takes then."""

    changes: dict[str, Any]
    note: str
    plan: Plan

    @property
    def text(self) -> str:
        """The settings as flags, and what goes with them."""
        flags = " ".join(f"--{path} {value}" for path, value in self.changes.items())
        return f"{flags} ({self.note})"


def suggestions(
    spec: RunSpec, estimator: Estimator, rebuild: Callable[[RunSpec], Estimator]
) -> list[Suggestion]:
    """Return what would let a run fit, the least change first; nothing where not even one row fits.

    Args:
        spec: of the run that does not fit.
        estimator: of it.
        rebuild: returns the estimator of another spec, whose model is another.
    """
    found = [*_first(_in_parts(spec), spec, estimator)]
    precision = _smaller_precision(estimator.machine, spec)
    if precision is not None:
        change = {"train.precision": precision}
        half = spec.overlay(change)
        of_half = rebuild(half)
        options = [({}, "half the bytes of most activations"), *_in_parts(half)]
        found += _first(iter([options[0]]), half, of_half, change)
        if not found:
            found += _first(iter(options[1:]), half, of_half, change)
    found += _first(_smaller_batches(spec, estimator), spec, estimator)
    return found


def _first(
    options: Iterator[tuple[dict[str, Any], str]],
    spec: RunSpec,
    estimator: Estimator,
    before: dict[str, Any] | None = None,
) -> list[Suggestion]:
    """Return the first option that fits, in a list; an empty one where none does."""
    for changes, note in options:
        try:
            changed = spec.overlay(changes)
        except ValueError:  # Workers could not share it.
            continue
        plan = estimator.plan(changed)
        if plan.fits:
            return [Suggestion(changes={**(before or {}), **changes}, note=note, plan=plan)]
    return []


def _in_parts(spec: RunSpec) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield more and more parts of a replica's rows."""
    train = spec.train
    rows = train.global_batch_size // (train.workers_range[1] * train.replicas_per_worker)
    for parts in range(train.accumulate_steps + 1, rows + 1):
        if rows % parts == 0:
            note = f"batch norms then see {rows // parts} of {rows} rows at once"
            yield {"train.accumulate_steps": parts}, note


def _smaller_batches(spec: RunSpec, estimator: Estimator) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield smaller and smaller global batches, from about where they fit."""
    train = spec.train
    step = train.workers_range[1] * train.replicas_per_worker * train.accumulate_steps
    memory = estimator.plan(spec).fullest
    # What is not of rows stays.
    of_rows = memory.activations + memory.batches
    share = (memory.capacity - (memory.total - of_rows)) / of_rows
    most = min(int(share * train.global_batch_size) + step, train.global_batch_size - step)
    for size in range(most // step * step, 0, -step):
        yield {"train.global_batch_size": size}, "the largest that fits"


def _smaller_precision(machine: MachineSpec, spec: RunSpec) -> str | None:
    """Return the half precision that a machine is fast in, where the run does not have one yet."""
    if spec.train.precision != "float32":
        return None
    kinds = ("mixed_bfloat16", "mixed_float16")
    return next((kind for kind in kinds if kind in machine.tflops), None)
