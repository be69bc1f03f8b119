import numpy as np
import pytest

from ray_jobs.tune.results.search_state import finite, typical_range
from ray_jobs.tune.results.searched_settings import searched_settings
from tests.ray_jobs.tune.rows import AUC, LOSS, ROW_S, search, trial


def test_trials_without_a_finite_score_have_no_rank():
    given = [1, 0.5, np.float32(2), np.int64(3), True, None, "1", np.nan, np.inf, -np.inf, 10**400]
    assert [finite(value) for value in given] == [1, 0.5, 2, 3, *[None] * 7]
    rows = [trial(0, 0.5), trial(1, float("nan")), trial(2, 0.3), trial(3, None), trial(4, -np.inf)]
    assert [t.name for t in search(*rows).scored()] == ["t002", "t000"]
    for row in rows:
        row.scores = dict.fromkeys([AUC] if row.scores else [], row.scores.get(LOSS, 0.0))
    found = search(*rows, metrics=(AUC,)).scored()
    assert [t.name for t in found] == ["t000", "t002"]


def test_the_pareto_front_holds_the_trials_that_no_other_trial_dominates():
    points = [(0.9, 5), (0.8, 1), (0.8, 2), (0.95, 9), (0.7, 1), (0.9, 5), (0.99, np.nan)]
    rows = [trial(i, {AUC: auc, ROW_S: s}) for i, (auc, s) in enumerate(points)]
    found = search(*rows, metrics=(AUC, ROW_S)).pareto_front()
    assert [t.name for t in found] == ["t003", "t000", "t005", "t001"]


def test_the_typical_range_excludes_outliers_on_the_worse_side_only():
    values = [0.30, 0.32, 0.35, 0.36, 0.40, 0.45, 90.0]
    assert typical_range(LOSS, values) == (0.30, 0.45)
    assert typical_range(AUC, [-v for v in values]) == (-0.45, -0.30)
    assert typical_range(LOSS, [*values[:-1], -50.0]) == (-50.0, 0.45)
    assert typical_range(LOSS, [0.5, 0.5, 0.5, 0.5, 0.9]) == (0.5, 0.9)


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([16, 32, 64, 128, 256], True),
        ([0.001, *(i / 80 for i in range(1, 40))], False),
        ([0.0, 1e-4, 1.0], False),
        ([1, 2, 3], False),
        ([0.5], False),
    ],
)
def test_numbers_over_decades_get_a_logarithmic_scale(values, log):
    (found,) = searched_settings([trial(i, 1.0, {"a": v}) for i, v in enumerate(values)])
    assert found.log == log
    assert found.whole == all(isinstance(value, int) for value in values)


def test_mixed_values_are_words():
    values = ["b", 10, True, None, [1, 2.5], 9, float("nan")]
    (found,) = searched_settings([trial(i, 1.0, {"a": v}) for i, v in enumerate(values)])
    assert found.words == ("9", "10", "[1, 2.5]", "b", "none", "not a number", "true")
