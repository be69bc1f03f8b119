"""How much of the scores' spread each searched setting explains.

Enters: a search.  Leaves: shares by field path.  Optuna and scikit-learn are loaded on use.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray_jobs.tune.results.charts import Scale
from ray_jobs.tune.results.search_progress import (
    Setting,
    finite,
    ranking,
    score,
    settings,
    typical,
    value_text,
)
from ray_jobs.tune.results.search_state import Search

LEAST_TRIALS = 4
"""With fewer scores there is nothing to tell."""

_SEED = 0
_LARGEST_COUNT = 1000
_DEPTH = 8
"""Of the trees: deeper ones tell the same, and take a minute with a thousand trials."""


def importances(search: Search) -> dict[str, float]:
    """Return the share of each setting in the first objective's variance, the largest first.

    By fANOVA (Hutter et al. 2014, "An Efficient Approach for Assessing Hyperparameter Importance"):
    a random forest, seeded, predicts the scores, and a setting's share is the variance of the
    prediction over its values, averaged over all values of the others. What several settings do
    only together belongs to none of them. The shares add up to 1; a setting with one value has 0.

    Ranges are those of the values that were tried. Numbers that span decades are given by their
    logarithm, since the averages run over the range evenly. Scores far worse than the rest count
    as the worst typical one (`standing.typical`), as otherwise one diverged trial would be all the
    variance.

    A setting that only some trials have stays in: trials without it get the values of those that
    have it, in turn. So the setting that decides whether it is there is what explains the
    difference. A value of its own for "not there" would be the same column as the deciding setting,
    and take half of its share.

    Empty with fewer than `LEAST_TRIALS` scores, with scores that are all the same, and where no
    setting has two values.
    """
    first = search.objectives[0]
    # In order of suggestion, so that "in turn" does not follow the rank.
    ranked = {trial.name for trial in ranking(search)}
    trials = [trial for trial in search.trials if trial.name in ranked]
    found = settings(trials)
    varied = [setting for setting in found if not setting.single]
    scores = [score(trial, first) or 0.0 for trial in trials]
    if len(trials) < LEAST_TRIALS or not varied:
        return {}
    low, high = typical(scores, first.mode)
    if low == high:
        return {}
    columns = {s.path: _column([t.values.get(s.path, _ABSENT) for t in trials], s) for s in varied}
    targets = [(min(max(value, low), high) - low) / (high - low) for value in scores]
    shares = _fanova(varied, columns, targets)
    shares |= {setting.path: 0.0 for setting in found if setting.single}
    return dict(sorted(shares.items(), key=lambda share: -share[1])) if any(shares.values()) else {}


_ABSENT = object()


def _column(values: Sequence[Any], setting: Setting) -> list[Any]:
    """Return a value for each trial; those that lack one get the others', in turn."""
    there = [_encoded(value, setting) for value in values if value is not _ABSENT]
    lacking = 0
    column = []
    for value in values:
        if value is _ABSENT:
            column.append(there[lacking % len(there)])
            lacking += 1
        else:
            column.append(_encoded(value, setting))
    return column


def _encoded(value: Any, setting: Setting) -> float | int | str:
    """Return a word, a count from the lowest, or a place between 0 and 1.

    Places, as the forest computes in float32, and with volumes: products of all ranges.
    """
    if setting.words:
        return value_text(value)
    number = finite(value) or 0.0
    if _counts(setting):
        return int(number - setting.low)
    return Scale(setting.low, setting.high, setting.log).at(number)


def _counts(setting: Setting) -> bool:
    return setting.whole and not setting.log and setting.high - setting.low < _LARGEST_COUNT


def _fanova(
    varied: Sequence[Setting], columns: dict[str, list[Any]], targets: Sequence[float]
) -> dict[str, float]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    distributions = {setting.path: _distribution(setting) for setting in varied}
    with _quiet():
        study = optuna.create_study()
        for i, target in enumerate(targets):
            params = {path: column[i] for path, column in columns.items()}
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=distributions, value=target)
            )
        evaluator = FanovaImportanceEvaluator(max_depth=_DEPTH, seed=_SEED)
        shares = get_param_importances(study, evaluator=evaluator)
    return {path: float(share) for path, share in shares.items()}


def _distribution(setting: Setting) -> Any:
    from optuna import distributions as of

    if setting.words:
        return of.CategoricalDistribution(setting.words)
    if _counts(setting):
        return of.IntDistribution(0, int(setting.high - setting.low))
    return of.FloatDistribution(0.0, 1.0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Optuna says of each study, and put its level back."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
