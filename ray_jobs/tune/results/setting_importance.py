"""Computes how much of the spread of the scores each searched setting explains."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from ray_jobs.tune.results.optuna_study import make_study
from ray_jobs.tune.results.search_state import Search, finite, typical_range
from ray_jobs.tune.results.searched_settings import Setting, searched_settings, value_text

MIN_TRIALS = 4
"""Minimum number of scores from which importances can be estimated."""

_SEED = 0
_MAX_COUNT = 1000
_TREE_DEPTH = 8
"""Deeper trees give the same result and take a minute for a thousand trials."""


def importances(search: Search) -> dict[str, float]:
    """Return the fraction of the variance of the first objective that each setting explains.

    Uses fANOVA (Hutter et al. 2014, "An Efficient Approach for Assessing Hyperparameter
    Importance"): a seeded random forest predicts the scores, and the fraction of a setting is the
    variance of the prediction over its values, averaged over all values of the other settings. The
    effects of interactions belong to no setting. Fractions add up to 1; that of a setting with one
    value is 0.

    Ranges are those of the values in the trials. Numbers that span decades are replaced by their
    logarithms, because fANOVA averages evenly over the range. Scores far worse than the rest count
    as the worst typical score (`typical_range`); otherwise one diverged trial would account for
    all of the variance.

    If only some trials have a setting, the other trials take the values of these trials in turn,
    so the setting that decides whether it is active explains the difference. A separate value for
    "not active" would duplicate the column of the deciding setting and take half of its fraction.

    Returns:
        Fractions by setting path, in descending order; empty with fewer than `MIN_TRIALS` scores,
        if all scores are equal, or if no setting has two values.
    """
    first = search.objectives[0]
    # In order of suggestion, so that values taken in turn do not depend on the rank.
    scored = {trial.name: trial.score(first) for trial in search.trials}
    trials = [trial for trial in search.trials if scored[trial.name] is not None]
    scores = [score for score in scored.values() if score is not None]
    settings = searched_settings(trials)
    varied = [setting for setting in settings if not setting.single]
    if len(trials) < MIN_TRIALS or not varied:
        return {}
    low, high = typical_range(first, scores)
    if low == high:
        return {}
    columns = {s.path: _column([trial.values for trial in trials], s) for s in varied}
    targets = [(min(max(value, low), high) - low) / (high - low) for value in scores]
    fractions = _fanova(varied, columns, targets)
    if not any(fractions.values()):
        return {}
    fractions |= {setting.path: 0.0 for setting in settings if setting.single}
    return dict(sorted(fractions.items(), key=lambda item: -item[1]))


def _column(trials: Sequence[dict[str, Any]], setting: Setting) -> list[Any]:
    """Return a value for each trial; trials without one take those of the other trials in turn."""
    present = (values[setting.path] for values in trials if setting.path in values)
    substitutes = itertools.cycle([_encode(value, setting) for value in present])
    return [
        _encode(values[setting.path], setting) if setting.path in values else next(substitutes)
        for values in trials
    ]


def _encode(value: Any, setting: Setting) -> float | int | str:
    """Return a value as a word, as a count from the lowest value, or as a position from 0 to 1.

    The forest computes in float32 and multiplies ranges, so numbers are scaled.
    """
    if setting.words:
        return value_text(value)
    number = finite(value) or 0.0
    if _is_count(setting):
        return int(number - setting.low)
    low, high, number = (
        math.log(value) if setting.log else value for value in (setting.low, setting.high, number)
    )
    return (number - low) / (high - low)


def _is_count(setting: Setting) -> bool:
    return setting.whole and not setting.log and setting.high - setting.low < _MAX_COUNT


def _fanova(
    settings: Sequence[Setting], columns: dict[str, list[Any]], targets: Sequence[float]
) -> dict[str, float]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    distributions = {setting.path: _distribution(setting) for setting in settings}
    trials = [
        optuna.trial.create_trial(
            params={path: column[i] for path, column in columns.items()},
            distributions=distributions,
            value=target,
        )
        for i, target in enumerate(targets)
    ]
    evaluator = FanovaImportanceEvaluator(max_depth=_TREE_DEPTH, seed=_SEED)
    fractions = get_param_importances(make_study(trials, "minimize"), evaluator=evaluator)
    return {path: float(fraction) for path, fraction in fractions.items()}


def _distribution(setting: Setting) -> Any:
    from optuna import distributions as of

    if setting.words:
        return of.CategoricalDistribution(setting.words)
    if _is_count(setting):
        return of.IntDistribution(0, int(setting.high - setting.low))
    return of.FloatDistribution(0.0, 1.0)
