import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve

from ray_jobs.evaluate.uncertainty.calibration_check import (
    calibration_check,
    reliability_diagram,
    wilson_interval,
)
from tests.ray_jobs.evaluate.simulated import simulate


def test_right_probabilities_pass_in_19_of_20_datasets_and_wrong_ones_do_not():
    p_values = []
    for seed in range(100):
        rows = simulate(300, seed)
        p_values.append(calibration_check(rows.label_N, rows.probability_N)["p_value"])
    assert 0.90 <= np.mean(np.array(p_values) > 0.05) <= 0.99
    rows = simulate(300)
    too_sure = rows.probability_N**2 / (rows.probability_N**2 + (1 - rows.probability_N) ** 2)
    found = calibration_check(rows.label_N, np.where(too_sure > 0.5, 0.99, 0.01))
    assert found["p_value"] < 0.01
    assert found["ece"] > found["high"] > found["expected"]


def test_bins_are_those_of_scikit_learn_with_wilsons_intervals():
    rows = simulate(400)
    bins = reliability_diagram(rows.label_N, rows.probability_N)
    fraction, mean = calibration_curve(rows.label_N, rows.probability_N, n_bins=15)
    assert [b["positives"] for b in bins] == pytest.approx(fraction.tolist())
    assert [b["probability"] for b in bins] == pytest.approx(mean.tolist())
    for b in bins:
        positives = round(b["positives"] * b["num_rows"])
        expected = binomtest(positives, b["num_rows"]).proportion_ci(method="wilson")
        assert (b["low"], b["high"]) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert wilson_interval(0.0, 10)[0] == 0.0
    # Equal weights change nothing; of unequal ones, the small weights hardly count.
    assert reliability_diagram(rows.label_N, rows.probability_N, np.full(400, 3.0)) == [
        pytest.approx(b) for b in bins
    ]
    label, weight = np.array([0, 1, 1, 0, 0, 0]), np.array([1, 1, 1, 1, 1e-9, 1e-9])
    (uneven,) = reliability_diagram(label, np.full(6, 0.5), weight)
    assert (uneven["low"], uneven["high"]) == pytest.approx(wilson_interval(0.5, 4))
