import numpy as np
import pytest

from ray_jobs.tune.results.search_state import finite
from ray_jobs.tune.results.searched_settings import searched_settings
from ray_jobs.tune.results.svg_charts import typical_range
from tests.ray_jobs.tune.rows import AUC, LOSS, ROW_S, search, trial


def test_only_finite_numbers_are_scores():
    given = [1, 0.5, np.float32(2), np.int64(3), True, None, "1", np.nan, np.inf, -np.inf, 10**400]
    assert [finite(value) for value in given] == [1, 0.5, 2, 3, *[None] * 7]


def test_trials_without_a_finite_score_have_no_rank():
    rows = [trial(0, 0.5), trial(1, float("nan")), trial(2, 0.3), trial(3, None), trial(4, -np.inf)]
    assert [t.name for t in search(*rows).scored()] == ["t002", "t000"]
    for row in rows:
        row.scores = dict.fromkeys([AUC] if row.scores else [], row.scores.get(LOSS, 0.0))
    found = search(*rows, metrics=(AUC,)).scored()
    assert [t.name for t in found] == ["t000", "t002"]


def test_the_pareto_front_holds_the_trials_that_no_other_trial_dominates():
    points = [
        (0.9, 5.0),
        (0.8, 1.0),
        (0.8, 2.0),
        (0.95, 9.0),
        (0.7, 1.0),
        (0.9, 5.0),
        (0.99, np.nan),
    ]
    rows = [trial(i, {AUC: auc, ROW_S: s}) for i, (auc, s) in enumerate(points)]
    found = search(*rows, metrics=(AUC, ROW_S)).pareto_front()
    assert [t.name for t in found] == ["t003", "t000", "t005", "t001"]


def test_the_typical_range_excludes_outliers_on_the_worse_side_only():
    values = [0.30, 0.32, 0.35, 0.36, 0.40, 0.45, 90.0]
    assert typical_range(LOSS, values) == (0.30, 0.45)
    assert typical_range(AUC, [-v for v in values]) == (-0.45, -0.30)
    assert typical_range(LOSS, [*values[:-1], -50.0]) == (-50.0, 0.45)
    assert typical_range(LOSS, [0.5]) == (0.5, 0.5)
    assert typical_range(LOSS, [0.5, 0.5, 0.5, 0.5, 0.9]) == (0.5, 0.9)


def test_names_of_settings_are_as_short_as_they_can_be():
    values = {"model.head.units": 1, "model.numeric.units": 2, "train.learning_rate": 3, "units": 4}
    names = [setting.name for setting in searched_settings([trial(0, 1.0, values)])]
    assert names == ["head.units", "numeric.units", "learning_rate", "units"]


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([1e-5, 1e-4, 1e-2], True),
        ([16, 32, 64, 128, 256], True),
        ([0.001, *(i / 80 for i in range(1, 40))], False),
        ([0.0, 1e-4, 1.0], False),
        ([-1e-4, 1e-4, 1.0], False),
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


def test_idle_time_is_the_time_of_slots_without_a_trial():
    rows = [
        trial(0, 0.5, began_s=10.0, ended_s=110.0),
        trial(1, 0.4, began_s=20.0, ended_s=60.0),
        trial(2, None, state="running", began_s=70.0, seconds={"compute": 30.0, "start": 10.0}),
    ]
    found = search(*rows)
    found.slots = 2
    assert found.idle_s() == pytest.approx(2 * 100 - (100 + 40 + 40))
    found.slots = 1
    assert found.idle_s() == 0
    assert search().idle_s() == 0
