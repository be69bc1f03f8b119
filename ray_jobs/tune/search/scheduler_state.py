"""A scheduler's state as bytes, which Ray Tune's own snapshots leave out.

Schedulers refer to trials, which a search that goes on makes anew: they are written by their names.
"""

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import ray.cloudpickle
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler


def dumps(scheduler: TrialScheduler, trials: Sequence[Trial]) -> bytes:
    """Return the state of a scheduler that has been told of some trials."""
    stream = io.BytesIO()
    names = {trial.trial_id for trial in trials}
    _Pickler(stream).dump((names, vars(scheduler)))
    return stream.getvalue()


def restore(scheduler: TrialScheduler, state: bytes, trials: Sequence[Trial]) -> None:
    """Give a new scheduler, which knows of some trials, an earlier one's state.

    Args:
        scheduler: that has been told of the trials.
        state: of the earlier one, from `dumps`.
        trials: the same, made anew; one that the state knows and that is no more stays away.
    """
    by_name = {trial.trial_id: trial for trial in trials}
    known, earlier = _Unpickler(io.BytesIO(state), by_name).load()
    for value in earlier.values():
        _forget_nobody(value)
    vars(scheduler).update(earlier)
    controller: Any = _NoController()
    for trial in trials:
        if trial.trial_id not in known:
            # Begun after the state was written, which took away what was known of it.
            scheduler.on_trial_add(controller, trial)


class _NoController:
    """What schedulers ask of Tune's controller when they are told of a trial."""

    search_alg = None


def _forget_nobody(value: Any) -> None:
    """Take out of what a scheduler holds the trials that are no more, which are None there."""
    if isinstance(value, dict):
        value.pop(None, None)
    elif isinstance(value, set):
        value.discard(None)
    elif isinstance(value, list):
        for part in value:
            _forget_nobody(part)
    elif hasattr(value, "_live_trials"):
        _forget_nobody(value._live_trials)


class _Pickler(ray.cloudpickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[str, str] | None:
        if isinstance(obj, Trial):
            return ("trial", obj.trial_id)
        # What a trial is being asked for at this moment, nobody will answer later.
        if type(obj).__name__ in ("_FutureTrainingResult", "ObjectRef"):
            return ("nothing", "")
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, trials: Mapping[str, Trial]) -> None:
        super().__init__(stream)
        self.trials = trials

    def persistent_load(self, pid: tuple[str, str]) -> Trial | None:
        kind, name = pid
        return self.trials.get(name) if kind == "trial" else None
