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


def dumps(scheduler: TrialScheduler) -> bytes:
    """Return the state of a scheduler."""
    stream = io.BytesIO()
    _Pickler(stream).dump(vars(scheduler))
    return stream.getvalue()


def restore(scheduler: TrialScheduler, state: bytes, trials: Sequence[Trial]) -> None:
    """Give a new scheduler, which knows of some trials, an earlier one's state.

    Args:
        scheduler: that has been told of the trials.
        state: of the earlier one, from `dumps`.
        trials: the same, made anew; one that the state knows and that is no more stays away.
    """
    by_name = {trial.trial_id: trial for trial in trials}
    vars(scheduler).update(_Unpickler(io.BytesIO(state), by_name).load())


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
