"""Suggests the values of the next trial: the first points, then points from Optuna or the grid.

Calls Optuna directly, because Ray's `OptunaSearch` rejects a first trial whose values are outside
the space and has no grid with conditions.
"""

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import optuna
from ray.tune.search import Searcher

from ray_jobs.config.tune_spec import DistributionSpec, TuneSpec
from ray_jobs.train.telemetry.history_keys import MINIMIZED
from ray_jobs.tune.search.space import Space, Values


def make_searcher(space: Space, tune: TuneSpec, objectives: Sequence[str]) -> Searcher:
    """Return the searcher that `tune.searcher` names."""
    if tune.searcher == "grid":
        return GridSearcher(space)
    return StudySearcher(space, tune, objectives)


def result_key(metric: str) -> str:
    """Return the key in a trial's results for the value of a metric at its best epoch so far."""
    return f"best/{metric}"


def scores_of(result: Mapping[str, Any], objectives: Sequence[str]) -> dict[str, float]:
    """Return the values of the objectives that a trial's result contains, by metric."""
    scores = {metric: result.get(result_key(metric)) for metric in objectives}
    return {metric: float(value) for metric, value in scores.items() if value is not None}


class _SavedSearcher(Searcher):
    """Suggests queued points first, and saves its state.

    Args:
        points: The queued points.
    """

    STATE: ClassVar[tuple[str, ...]] = ("points", "suggested")
    """Names of the attributes to save."""

    def __init__(self, points: Sequence[Values]) -> None:
        super().__init__()
        self.points = list(points)
        self.suggested: dict[str, Values] = {}
        """All suggestions by trial."""

    def reconcile(self, trials: Mapping[str, Values]) -> None:
        """Adapt a restored state to the trials that exist, given with their values.

        A driver that is killed may have saved its searcher before or after its trials. A suggestion
        without a trial is queued again; a trial without a suggestion gets one.
        """
        lost = [name for name in self.suggested if name not in trials]
        self.points[:0] = [self._withdraw(name) for name in lost]
        for name, values in trials.items():
            if name not in self.suggested and self.suggest(name) != values:
                # The study has learned from other results by now.
                self._withdraw(name)
                self.points.insert(0, values)
                self.suggest(name)

    def _withdraw(self, name: str) -> Values:
        self.on_trial_complete(name, error=True)
        return self.suggested.pop(name)

    def save(self, checkpoint_path: str) -> None:
        """Write the state."""
        state = {name: getattr(self, name) for name in self.STATE}
        Path(checkpoint_path).write_bytes(pickle.dumps(state))

    def restore(self, checkpoint_path: str) -> None:
        """Read the state."""
        vars(self).update(pickle.loads(Path(checkpoint_path).read_bytes()))


class StudySearcher(_SavedSearcher):
    """Suggests the first points of a space, then points from an Optuna study.

    Args:
        space: The search space.
        tune: Provides the searcher and its seed.
        objectives: Metrics that the study learns from; a result contains them under `best/`.
    """

    STATE = (*_SavedSearcher.STATE, "asked", "last_scores", "study")

    def __init__(self, space: Space, tune: TuneSpec, objectives: Sequence[str]) -> None:
        super().__init__(space.first)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.objectives = space, objectives
        self.asked: dict[str, optuna.trial.Trial] = {}
        self.last_scores: dict[str, dict[str, float]] = {}
        self.study = optuna.create_study(
            sampler=_sampler(tune, len(objectives)),
            directions=["minimize" if o in MINIMIZED else "maximize" for o in objectives],
        )

    def suggest(self, trial_id: str) -> Values:
        """Return the values of a new trial."""
        point = self.points.pop(0) if self.points else None
        if point is not None and not self.space.contains(point):
            # The study rejects values outside the space, so it does not learn from this trial.
            self.suggested[trial_id] = point
            return point
        if point is not None:
            labels = {path: self._label(path, value) for path, value in point.items()}
            self.study.enqueue_trial(labels)
        trial = self.asked[trial_id] = self.study.ask()
        values = self.space.values(lambda path, values: _suggest(trial, path, values))
        self.suggested[trial_id] = values
        return values

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Store the scores, because a trial that ends while paused sends no last result."""
        self.last_scores[trial_id] = scores_of(result, self.objectives)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Pass the outcome of a trial to the study."""
        trial, last = self.asked.pop(trial_id, None), self.last_scores.pop(trial_id, {})
        if trial is None:
            return
        scores = last if result is None else scores_of(result, self.objectives)
        if error or len(scores) < len(self.objectives):
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(trial, [scores[metric] for metric in self.objectives])

    def _label(self, path: str, value: Any) -> Any:
        values = self.space.distributions[path]
        return _labels(values)[values.values().index(value)] if values.kind == "choice" else value


class GridSearcher(_SavedSearcher):
    """Suggests the first points of a space, then every other combination."""

    def __init__(self, space: Space) -> None:
        super().__init__([*space.first, *(p for p in space.grid() if p not in space.first)])

    def suggest(self, trial_id: str) -> Any:
        """Return the values of a new trial, or `FINISHED` after the last one."""
        if not self.points:
            return Searcher.FINISHED
        self.suggested[trial_id] = self.points.pop(0)
        return self.suggested[trial_id]

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the grid does not depend on results."""


def _sampler(tune: TuneSpec, num_metrics: int) -> optuna.samplers.BaseSampler:
    if tune.searcher == "random":
        return optuna.samplers.RandomSampler(seed=tune.seed)
    if tune.searcher == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=tune.seed, warn_independent_sampling=False)
    if tune.searcher == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=tune.seed)
    with warnings.catch_warnings():
        # Optuna still marks `multivariate`, `group` and `constant_liar` as experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=tune.seed,
            multivariate=True,
            group=True,
            # Treats running trials as bad ones, so that concurrent trials differ.
            constant_liar=num_metrics == 1,
        )


def _suggest(trial: optuna.trial.Trial, path: str, values: DistributionSpec) -> Any:
    if values.kind == "choice":
        labels = _labels(values)
        return values.values()[labels.index(trial.suggest_categorical(path, labels))]
    if values.kind in ("randint", "lograndint"):
        return trial.suggest_int(path, int(values.low), int(values.high) - 1, log=values.is_log)
    step = values.quniform[2] if values.quniform else None
    # Optuna warns unless the upper end is a multiple of the step.
    high = values.values()[-1] if step else values.high
    return trial.suggest_float(path, values.low, high, step=step, log=values.is_log)


def _labels(values: DistributionSpec) -> list[str]:
    """Return choices as strings, because Optuna does not accept lists."""
    return [repr(value) for value in values.values()]
