"""Who chooses the values of the next trial: the first points, then Optuna or the grid.

Optuna's study is asked and told directly, since Ray's own `OptunaSearch` takes no first trial whose
values lie outside the space, and knows no grid with conditions.
"""

import pickle
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from ray.tune.search import Searcher

from ray_jobs.config.tune_spec import DistributionSpec, TuneSpec
from ray_jobs.tune.results.search_state import Objective
from ray_jobs.tune.search.space import Space, Values


class StudySearcher(Searcher):
    """Suggests the first points of a space, then what an Optuna study says.

    Args:
        space: to choose from.
        tune: searcher and seed.
        objectives: that it learns from; a trial's result holds their metrics below `best`.
    """

    def __init__(self, space: Space, tune: TuneSpec, objectives: Sequence[Objective]) -> None:
        super().__init__()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.objectives = space, objectives
        self.first = list(space.first)
        self.asked: dict[str, optuna.trial.Trial] = {}
        self.last: dict[str, dict[str, float]] = {}
        self.study = optuna.create_study(
            sampler=_sampler(tune, len(objectives)),
            directions=["minimize" if o.mode == "min" else "maximize" for o in objectives],
        )

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict, **spec: Any
    ) -> bool:
        """Take Ray's word for nothing: metrics and space are known already."""
        return True

    def suggest(self, trial_id: str) -> Values:
        """Return the values of a new trial."""
        point = self.first.pop(0) if self.first else None
        if point is not None and not self.space.contains(point):
            # The study could not learn from it.
            return point
        if point is not None:
            named = {path: self._word(path, value) for path, value in point.items()}
            self.study.enqueue_trial(named)
        trial = self.asked[trial_id] = self.study.ask()
        return self.space.values(lambda path, values: _suggested(trial, path, values))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Remember how a trial stands: one that is ended while it is paused tells no more."""
        self.last[trial_id] = scores_of(result, self.objectives)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the study how a trial ended."""
        trial, last = self.asked.pop(trial_id, None), self.last.pop(trial_id, {})
        if trial is None:
            return
        scores = last if result is None else scores_of(result, self.objectives)
        if error or len(scores) < len(self.objectives):
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(trial, [scores[o.metric] for o in self.objectives])

    def save(self, checkpoint_path: str) -> None:
        """Write the state."""
        with open(checkpoint_path, "wb") as file:
            pickle.dump((self.first, self.asked, self.last, self.study), file)

    def restore(self, checkpoint_path: str) -> None:
        """Read the state back."""
        with open(checkpoint_path, "rb") as file:
            self.first, self.asked, self.last, self.study = pickle.load(file)

    def _word(self, path: str, value: Any) -> Any:
        values = self.space.distributions[path]
        return _words(values)[values.values().index(value)] if values.kind == "choice" else value


class GridSearcher(Searcher):
    """Suggests the first points of a space, then every combination that was not among them."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space, self.suggested = space, 0
        later = [values for values in space.grid() if values not in space.first]
        self.every = [*space.first, *later]

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict, **spec: Any
    ) -> bool:
        """Take Ray's word for nothing."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Return the values of a new trial, or that there is none left."""
        if self.suggested == len(self.every):
            return Searcher.FINISHED
        self.suggested += 1
        return self.every[self.suggested - 1]

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the grid is what it is."""

    def save(self, checkpoint_path: str) -> None:
        """Write how far it is."""
        with open(checkpoint_path, "wb") as file:
            pickle.dump(self.suggested, file)

    def restore(self, checkpoint_path: str) -> None:
        """Read how far it was."""
        with open(checkpoint_path, "rb") as file:
            self.suggested = pickle.load(file)


def make_searcher(space: Space, tune: TuneSpec, objectives: Sequence[Objective]) -> Searcher:
    """Return the searcher that a spec asks for."""
    if tune.searcher == "grid":
        return GridSearcher(space)
    return StudySearcher(space, tune, objectives)


def result_key(metric: str) -> str:
    """Return the key of a trial's results that holds a metric at its best epoch so far."""
    return f"best/{metric}"


def scores_of(result: Mapping[str, Any], objectives: Sequence[Objective]) -> dict[str, float]:
    """Return the objectives' values in a trial's result; those that it lacks are left out."""
    found = {o.metric: result.get(result_key(o.metric)) for o in objectives}
    return {metric: float(value) for metric, value in found.items() if value is not None}


def _sampler(tune: TuneSpec, num_metrics: int) -> optuna.samplers.BaseSampler:
    if tune.searcher == "random":
        return optuna.samplers.RandomSampler(seed=tune.seed)
    if tune.searcher == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=tune.seed, warn_independent_sampling=False)
    if tune.searcher == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=tune.seed)
    with warnings.catch_warnings():
        # Of its arguments some are called experimental, for years.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=tune.seed,
            multivariate=True,
            group=True,
            # Trials that run count as bad ones, so that those beside them try something else.
            constant_liar=num_metrics == 1,
        )


def _suggested(trial: optuna.trial.Trial, path: str, values: DistributionSpec) -> Any:
    if values.kind == "choice":
        words = _words(values)
        return values.values()[words.index(trial.suggest_categorical(path, words))]
    if values.kind in ("randint", "lograndint"):
        return trial.suggest_int(path, int(values.low), int(values.high) - 1, log=values.is_log)
    step = values.quniform[2] if values.quniform else None
    # The last multiple of the step, since Optuna warns where the end is none.
    high = values.values()[-1] if step else values.high
    return trial.suggest_float(path, values.low, high, step=step, log=values.is_log)


def _words(values: DistributionSpec) -> list[str]:
    """Return choices as texts: Optuna takes no lists."""
    return [repr(value) for value in values.values()]
