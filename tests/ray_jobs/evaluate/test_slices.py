import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import ttest_ind
from sklearn import metrics

from ray_jobs.evaluate.analysis import analyse
from tests.ray_jobs.evaluate.simulated import simulate, with_bad_cohort


def test_slices_cover_the_values_of_each_column_with_their_metrics():
    rows = simulate(numbers={"age": np.r_[np.arange(1950.0), np.full(50, np.nan)]})
    slices = analyse(rows, 0.5, [], None)["slices"]
    found = {(part["column"], part["value"]): part for part in slices}
    assert set(found) == {
        ("age", "0 to 487.2"), ("age", "487.2 to 974.5"), ("age", "974.5 to 1,462"),
        ("age", "1,462 to 1,949"), ("age", "missing"), ("site", "arm"), ("site", "leg"),
        ("site", "back"),
    }  # fmt: skip
    assert sum(part["num_rows"] for part in slices if part["column"] == "age") == 2000
    losses = [part["log_loss"] for part in slices]
    assert losses == sorted(losses, reverse=True)
    arm = np.array(rows.words["site"].to_pylist()) == "arm"
    part, label, probability = found["site", "arm"], rows.label_N[arm], rows.probability_N[arm]
    assert part["num_rows"] == arm.sum()
    assert part["roc_auc"] == pytest.approx(metrics.roc_auc_score(label, probability))
    assert part["accuracy"] == pytest.approx(metrics.accuracy_score(label, probability >= 0.5))
    assert part["log_loss"] == pytest.approx(metrics.log_loss(label, probability))
    loss = -np.log(np.where(rows.label_N == 1, rows.probability_N, 1 - rows.probability_N))
    test = ttest_ind(loss[arm], loss[~arm], equal_var=False)
    expected = test.confidence_interval(1 - 0.05 / len(slices))
    assert (part["low"], part["high"]) == pytest.approx((expected.low, expected.high), rel=0.01)


def test_rows_of_a_group_count_as_one_in_the_intervals():
    plain = simulate(num_rows=500)
    repeated = simulate(
        label_N=np.repeat(plain.label_N, 4),
        probability_N=np.repeat(plain.probability_N, 4),
        group_N=np.repeat(np.arange(500), 4),
        numbers={},
        words={"site": plain.words["site"].take(pa.array(np.repeat(np.arange(500), 4)))},
    )
    (once, *_) = analyse(simulate(500, numbers={}), 0.5, [], None)["slices"]
    (four, *_) = analyse(repeated, 0.5, [], None)["slices"]
    assert (four["value"], four["num_rows"]) == (once["value"], 4 * once["num_rows"])
    assert (four["low"], four["high"]) == pytest.approx((once["low"], once["high"]))


def test_a_cohort_in_which_the_model_fails_is_found_and_no_other():
    bad = analyse(with_bad_cohort(simulate()), 0.5, [], None)
    (cohort,) = bad["cohorts"]
    assert "age > 0." in cohort["value"]
    assert "site = arm" in cohort["value"]
    assert cohort["low"] > 0
    worse = {(part["column"], part["value"]) for part in bad["slices"] if part["is_worse"]}
    assert ("site", "arm") in worse
    good = analyse(simulate(), 0.5, [], None)
    assert good["cohorts"] == []
    assert not any(part["is_worse"] for part in good["slices"])


def test_few_rows_and_rows_without_columns_have_no_slices():
    assert analyse(simulate(num_rows=15), 0.5, [], None)["slices"] == []
    alone = analyse(simulate(numbers={}, words={}), 0.5, [], None)
    assert alone["slices"] == alone["cohorts"] == []
