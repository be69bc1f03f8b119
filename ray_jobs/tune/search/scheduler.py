"""Makes Ray's schedulers, which stop, pause or clone trials.

All of them count the epochs that a trial has trained, because Ray's own count of results can start
over after a restart.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.pb2 import PB2

from ray_jobs.cluster.compat_ray import pause_trial
from ray_jobs.config.spec import RunSpec
from ray_jobs.config.tune_spec import DistributionSpec
from ray_jobs.train.telemetry.history_keys import MINIMIZED
from ray_jobs.tune.search.searcher import result_key

EPOCHS = "epochs"
"""Key of a trial's results: the number of epochs trained."""


class _Median(MedianStoppingRule):
    """Extends Ray's rule to accept a last result without metrics, as that of a failed trial."""

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict) -> None:
        if EPOCHS in result:
            super().on_trial_complete(tune_controller, trial, result)


class HyperBand(HyperBandScheduler):
    """Extends Ray's HyperBand to pause trials again that were paused before a resume."""

    paused: frozenset[str] = frozenset()
    """Names of trials to pause again, because they were paused when the search stopped."""

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the next trial; first pause the trials that Tune marked as pending on resume."""
        paused, self.paused = self.paused, frozenset()
        for trial in tune_controller.get_trials() if paused else ():
            if trial.trial_id in paused and trial.status == Trial.PENDING:
                pause_trial(tune_controller, trial)
        return super().choose_trial_to_run(tune_controller)


def make_scheduler(spec: RunSpec, max_epochs: int, objective: str) -> TrialScheduler:
    """Return the scheduler that `tune.scheduler` names.

    Args:
        spec: The spec of the search.
        max_epochs: Maximum number of epochs of any trial.
        objective: The metric to schedule by.
    """
    settings = spec.tune
    grace = settings.grace_epochs or max(max_epochs // 9, 1)
    # A trial is judged by its best epoch, whose weights it keeps.
    best: dict[str, Any] = {
        "time_attr": EPOCHS,
        "metric": result_key(objective),
        "mode": "min" if objective in MINIMIZED else "max",
    }
    # A clone copies the current weights of its donor, so trials are judged by their latest epoch.
    latest = {
        **best,
        "metric": objective,
        "perturbation_interval": perturbation_epochs(spec, max_epochs),
        "log_config": False,
        "require_attrs": False,
    }
    if settings.scheduler == "asha":
        return ASHAScheduler(
            # One more than a trial can reach: each trial ends by itself instead of being killed.
            max_t=max_epochs + 1,
            grace_period=min(grace, max_epochs),
            reduction_factor=settings.reduction_factor,
            **best,
        )
    if settings.scheduler == "hyperband":
        return HyperBand(max_t=max_epochs, reduction_factor=settings.reduction_factor, **best)
    if settings.scheduler == "median":
        return _Median(grace_period=grace, **best)
    if settings.scheduler == "pbt":
        return PopulationBasedTraining(
            hyperparam_mutations={p: _mutations(d) for p, d in settings.space.items()},
            custom_explore_fn=partial(clip_to_space, settings.space),
            **latest,
        )
    if settings.scheduler == "pb2":
        bounds: dict[str, Any] = {p: [d.low, d.high] for p, d in settings.space.items()}
        return PB2(hyperparam_bounds=bounds, **latest)
    return FIFOScheduler()


def perturbation_epochs(spec: RunSpec, max_epochs: int) -> int:
    """Return the number of epochs between two perturbations by `pbt` and `pb2`."""
    return spec.tune.perturbation_epochs or max(max_epochs // 10, 1)


def clip_to_space(
    space: Mapping[str, DistributionSpec], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a trial's values, each clipped to the range of its distribution.

    PBT multiplies values by 0.8 or 1.2 without regard to bounds.
    """
    clipped = dict(values)
    for path, distribution in space.items():
        if distribution.kind == "choice":
            continue
        high = distribution.high if distribution.is_continuous else distribution.values()[-1]
        clipped[path] = min(max(clipped[path], distribution.low), high)
    return clipped


def _mutations(values: DistributionSpec) -> Any:
    """Return a distribution for PBT: a list, in which PBT steps to a neighbour, or a domain."""
    if not values.is_continuous:
        return list(values.values())
    return (tune.loguniform if values.is_log else tune.uniform)(values.low, values.high)
