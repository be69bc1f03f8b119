"""Suggests settings with which a run fits in memory, each checked by the estimator."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from mm_model.spec import Spec
from ray_jobs.config.spec import RunSpec
from ray_jobs.plan.estimate import Estimator, Plan
from ray_jobs.plan.plan_spec import MachineSpec

Option = tuple[dict[str, Any], str]
"""Settings to change by path, and a note on the consequences."""


class Suggestion(Spec):
    """Settings to change by path, and the plan of the changed run."""

    changes: dict[str, Any]
    note: str
    plan: Plan

    @property
    def text(self) -> str:
        """The settings as flags, with the note."""
        flags = " ".join(f"--{path} {value}" for path, value in self.changes.items())
        return f"{flags} ({self.note})"


def suggestions(estimator: Estimator, rebuild: Callable[[RunSpec], Estimator]) -> list[Suggestion]:
    """Return changes with which a run fits, the smallest first; empty if no change suffices.

    `rebuild` returns a new estimator for a spec that changes the model.
    """
    found = _first_that_fits(_more_parts(estimator.spec), estimator)
    precision = _half_precision(estimator.machine, estimator.spec)
    if precision is not None:
        change = {"train.precision": precision}
        half = rebuild(estimator.spec.overlay(change))
        only_half: list[Option] = [({}, "half the bytes of most activations")]
        fits = _first_that_fits(only_half, half, change)
        if not fits and not found:
            fits = _first_that_fits(_more_parts(half.spec), half, change)
        found += fits
    return found + _first_that_fits(_smaller_batches(estimator), estimator)


def _first_that_fits(
    options: Iterable[Option], estimator: Estimator, base: dict[str, Any] | None = None
) -> list[Suggestion]:
    """Return the first option that fits, if any; `base` are changes that were already made."""
    for changes, note in options:
        try:
            changed = estimator.spec.overlay(changes)
        except ValueError:  # The workers cannot share the global batch.
            continue
        plan = replace(estimator, spec=changed).plan()
        if plan.fits:
            return [Suggestion(changes={**(base or {}), **changes}, note=note, plan=plan)]
    return []


def _more_parts(spec: RunSpec) -> Iterator[Option]:
    """Yield increasing numbers of parts for a replica's rows."""
    train = spec.train
    rows = train.global_batch_size // (train.workers_range[1] * train.replicas_per_worker)
    for parts in range(train.accumulate_steps + 1, rows + 1):
        if rows % parts == 0:
            note = f"batch norms then see {rows // parts} of {rows} rows at once"
            yield {"train.accumulate_steps": parts}, note


def _smaller_batches(estimator: Estimator) -> Iterator[Option]:
    """Yield decreasing global batches, from about the size that fits."""
    train = estimator.spec.train
    step = train.workers_range[1] * train.replicas_per_worker * train.accumulate_steps
    memory = estimator.plan().peak_memory
    of_rows = memory.activations + memory.batches
    fraction = (memory.capacity - (memory.total - of_rows)) / of_rows
    most = min(int(fraction * train.global_batch_size) + step, train.global_batch_size - step)
    for size in range(most // step * step, 0, -step):
        yield {"train.global_batch_size": size}, "the largest that fits"


def _half_precision(machine: MachineSpec, spec: RunSpec) -> str | None:
    """Return a 16-bit precision that the machine accelerates; None if the run already has one."""
    if spec.train.precision != "float32":
        return None
    kinds = ("mixed_bfloat16", "mixed_float16")
    return next((kind for kind in kinds if kind in machine.tflops), None)
