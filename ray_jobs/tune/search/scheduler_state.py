"""Saves and restores the state of a scheduler, which Ray Tune's snapshots leave out.

Schedulers hold references to trials, which Tune creates anew when a search resumes. The saved state
therefore refers to trials by name.
"""

import io
import pickle
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import ray.cloudpickle
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from ray_jobs.cluster.compat_ray import is_pending_result, live_trials


def dump_scheduler(scheduler: TrialScheduler, trials: Sequence[Trial]) -> bytes:
    """Return the state of a scheduler to which these trials were added."""
    stream = io.BytesIO()
    names = {trial.trial_id for trial in trials}
    _Pickler(stream).dump((names, vars(scheduler)))
    return stream.getvalue()


def restore_scheduler(scheduler: TrialScheduler, state: bytes, trials: Sequence[Trial]) -> None:
    """Restore the state of an earlier scheduler.

    Args:
        scheduler: A new scheduler to which the trials were added.
        state: The result of `dump_scheduler`; trials that no longer exist are dropped.
        trials: The current trials of the search.
    """
    by_name = {trial.trial_id: trial for trial in trials}
    saved_names, attributes = _Unpickler(io.BytesIO(state), by_name).load()
    for value in attributes.values():
        _drop_none(value)
    vars(scheduler).update(attributes)
    # Schedulers use only this part of Tune's controller when a trial is added.
    controller: Any = SimpleNamespace(search_alg=None)
    for trial in trials:
        if trial.trial_id not in saved_names:
            # The trial started after the state was saved, so the update above removed it.
            scheduler.on_trial_add(controller, trial)


def _drop_none(value: Any) -> None:
    """Remove None, which replaces trials that no longer exist, from a scheduler's attribute."""
    if isinstance(value, dict):
        value.pop(None, None)
    elif isinstance(value, set):
        value.discard(None)
    elif isinstance(value, list):
        for part in value:
            _drop_none(part)
    elif (trials := live_trials(value)) is not None:
        _drop_none(trials)


class _Pickler(ray.cloudpickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[str, str] | None:
        if isinstance(obj, Trial):
            return ("trial", obj.trial_id)
        # The result of a pending request is lost with the driver.
        return ("nothing", "") if is_pending_result(obj) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, trials: Mapping[str, Trial]) -> None:
        super().__init__(stream)
        self.trials = trials

    def persistent_load(self, pid: tuple[str, str]) -> Trial | None:
        kind, name = pid
        return self.trials.get(name) if kind == "trial" else None
