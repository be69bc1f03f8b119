"""Who stops trials early, pauses them, or lets bad ones go on from good ones: Ray's schedulers.

They count the epochs that a trial has trained, since Ray's own count of results may begin again
after a restart.
"""

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

from ray_jobs.config.spec import RunSpec
from ray_jobs.config.tune_spec import DistributionSpec
from ray_jobs.tune.results.search_state import Objective
from ray_jobs.tune.search.searcher import result_key

EPOCHS = "epochs"
"""Key of a trial's results: epochs trained."""


class _Median(MedianStoppingRule):
    """Ray's, which cannot bear a last result without a metric, such as that of a trial's error."""

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict) -> None:
        if EPOCHS in result:
            super().on_trial_complete(tune_controller, trial, result)


class HyperBand(HyperBandScheduler):
    """Ray's, which a search can go on with: trials that waited for others wait again."""

    waiting: frozenset[str] = frozenset()
    """Names of the trials that waited when the search was stopped, until they do again."""

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the next trial; at first let those wait that Tune has made ready to run."""
        waiting, self.waiting = self.waiting, frozenset()
        for trial in tune_controller.get_trials() if waiting else ():
            if trial.trial_id in waiting and trial.status == Trial.PENDING:
                tune_controller._set_trial_status(trial, Trial.PAUSED)
        return super().choose_trial_to_run(tune_controller)


def make_scheduler(spec: RunSpec, most_epochs: int, objective: Objective) -> TrialScheduler:
    """Return the scheduler that a spec asks for.

    Args:
        spec: with `tune.scheduler`.
        most_epochs: of any trial.
        objective: to schedule by.
    """
    settings = spec.tune
    grace = settings.grace_epochs or max(most_epochs // 9, 1)
    # What matters of a trial is its best epoch, whose weights are kept.
    best: dict[str, Any] = {"metric": result_key(objective.metric), "mode": objective.mode}
    # A trial that exploits another one takes its weights of now.
    now: dict[str, Any] = {"metric": objective.metric, "mode": objective.mode}
    perturb = perturbation_epochs(spec, most_epochs)
    if settings.scheduler == "asha":
        return ASHAScheduler(
            time_attr=EPOCHS,
            # One more than there are: a trial comes to its end by itself, and not by being killed.
            max_t=most_epochs + 1,
            grace_period=min(grace, most_epochs),
            reduction_factor=settings.reduction_factor,
            **best,
        )
    if settings.scheduler == "hyperband":
        return HyperBand(
            time_attr=EPOCHS,
            max_t=most_epochs,
            reduction_factor=settings.reduction_factor,
            **best,
        )
    if settings.scheduler == "median":
        return _Median(time_attr=EPOCHS, grace_period=grace, **best)
    if settings.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr=EPOCHS,
            perturbation_interval=perturb,
            hyperparam_mutations={p: _mutations(d) for p, d in settings.space.items()},
            custom_explore_fn=partial(within, settings.space),
            log_config=False,
            require_attrs=False,
            **now,
        )
    if settings.scheduler == "pb2":
        return PB2(
            time_attr=EPOCHS,
            perturbation_interval=perturb,
            hyperparam_bounds={p: [d.low, d.high] for p, d in settings.space.items()},
            log_config=False,
            require_attrs=False,
            **now,
        )
    return FIFOScheduler()


def perturbation_epochs(spec: RunSpec, most_epochs: int) -> int:
    """Return the epochs between two looks of `pbt` and `pb2`."""
    return spec.tune.perturbation_epochs or max(most_epochs // 10, 1)


def within(space: dict[str, DistributionSpec], config: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's values, those beyond the ends of their distribution put to these.

    PBT multiplies by 0.8 or 1.2 and looks at no bounds.
    """
    inside = dict(config)
    for path, values in space.items():
        if values.kind == "choice":
            continue
        high = values.high if values.is_continuous else values.values()[-1]
        inside[path] = min(max(inside[path], values.low), high)
    return inside


def _mutations(values: DistributionSpec) -> Any:
    """Return a distribution as PBT takes it: a list, to whose neighbours it moves, or a domain."""
    if not values.is_continuous:
        return list(values.values())
    kind = tune.loguniform if values.is_log else tune.uniform
    return kind(values.low, values.high)
