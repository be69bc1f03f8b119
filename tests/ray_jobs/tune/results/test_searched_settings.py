import numpy as np
import pytest

from ray_jobs.tune.results import searched_settings as search_progress
from tests.ray_jobs.tune.rows import AUC, LOSS, ROW_S, search, trial


def test_only_finite_numbers_are_scores():
    given = [1, 0.5, np.float32(2), np.int64(3), True, None, "1", np.nan, np.inf, -np.inf, 10**400]
    assert [search_progress.finite(value) for value in given] == [1, 0.5, 2, 3, *[None] * 7]


def test_trials_without_a_finite_score_have_no_rank():
    rows = [trial(0, 0.5), trial(1, float("nan")), trial(2, 0.3), trial(3, None), trial(4, -np.inf)]
    assert [t.name for t in search_progress.ranking(search(*rows))] == ["t002", "t000"]
    for row in rows:
        row.scores = dict.fromkeys([AUC] if row.scores else [], row.scores.get(LOSS, 0.0))
    found = search_progress.ranking(search(*rows, metrics=((AUC, "max"),)))
    assert [t.name for t in found] == ["t000", "t002"]


def test_the_front_holds_those_that_no_other_trial_beats():
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
    found = search_progress.front(search(*rows, metrics=((AUC, "max"), (ROW_S, "min"))))
    assert [t.name for t in found] == ["t003", "t000", "t005", "t001"]


def test_the_typical_range_leaves_out_what_is_far_worse_but_nothing_that_is_better():
    values = [0.30, 0.32, 0.35, 0.36, 0.40, 0.45, 90.0]
    assert search_progress.typical(values, "min") == (0.30, 0.45)
    assert search_progress.typical([-v for v in values], "max") == (-0.45, -0.30)
    assert search_progress.typical([*values[:-1], -50.0], "min") == (-50.0, 0.45)
    assert search_progress.typical([0.5], "min") == (0.5, 0.5)
    assert search_progress.typical([0.5, 0.5, 0.5, 0.5, 0.9], "min") == (0.5, 0.9)


def test_settings_are_called_by_as_many_parts_as_tell_them_apart():
    values = {"model.head.units": 1, "model.numeric.units": 2, "train.learning_rate": 3, "units": 4}
    names = [setting.name for setting in search_progress.settings([trial(0, 1.0, values)])]
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
def test_numbers_over_decades_are_read_by_powers(values, log):
    (found,) = search_progress.settings([trial(i, 1.0, {"a": v}) for i, v in enumerate(values)])
    assert found.log == log
    assert found.whole == all(isinstance(value, int) for value in values)


def test_values_that_are_not_all_numbers_are_words():
    values = ["b", 10, True, None, [1, 2.5], 9, float("nan")]
    (found,) = search_progress.settings([trial(i, 1.0, {"a": v}) for i, v in enumerate(values)])
    assert found.words == ("9", "10", "[1, 2.5]", "b", "none", "not a number", "true")


def test_search_time_is_what_the_slots_did_not_spend_in_trials():
    rows = [
        trial(0, 0.5, began_s=10.0, ended_s=110.0),
        trial(1, 0.4, began_s=20.0, ended_s=60.0),
        trial(2, None, state="running", began_s=70.0, seconds={"compute": 30.0, "start": 10.0}),
    ]
    found = search(*rows)
    found.slots = 2
    assert search_progress.search_s(found) == pytest.approx(2 * 100 - (100 + 40 + 40))
    found.slots = 1
    assert search_progress.search_s(found) == 0
    assert search_progress.search_s(search()) == 0
