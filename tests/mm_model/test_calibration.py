import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mm_model.calibration import fit_blend, fit_calibration, fit_logistic, log_loss, sigmoid


def test_without_prior_the_fit_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5000, 2))
    y = (rng.random(5000) < sigmoid(x @ [1.5, -0.5] + 0.3)).astype(int)
    weights, bias = fit_logistic(x, y, np.zeros(2), strength=0.0)
    reference = LogisticRegression(C=1e12, tol=1e-12).fit(x, y)
    # Platt's targets lie 1 / 2,500 inside 0 and 1, and move the fit by about as much.
    assert weights == pytest.approx(reference.coef_[0], abs=0.01)
    assert bias == pytest.approx(reference.intercept_[0], abs=0.01)


def test_calibration_undoes_a_wrong_scale_and_bias():
    rng = np.random.default_rng(1)
    true = rng.normal(size=20_000) * 1.5
    y = (rng.random(20_000) < sigmoid(true)).astype(int)
    scale, bias = fit_calibration(3 * true + 2, y)
    assert scale == pytest.approx(1 / 3, rel=0.05)
    assert bias == pytest.approx(-2 / 3, abs=0.05)
    assert log_loss(scale * (3 * true + 2) + bias, y) < log_loss(3 * true + 2, y)


def test_separable_rows_do_not_make_the_probability_certain():
    logit = np.array([-2.0] * 20 + [2.0] * 20)
    y = np.array([0] * 20 + [1] * 20)
    scale, _ = fit_calibration(logit, y)
    assert sigmoid(np.array([2 * scale]))[0] < 0.99


def test_a_logit_that_contradicts_the_labels_yields_the_base_rate():
    rng = np.random.default_rng(2)
    y = (rng.random(1000) < 0.25).astype(int)
    scale, bias = fit_calibration(-3.0 * (2 * y - 1) + rng.normal(size=1000), y)
    assert scale > 0
    assert sigmoid(np.array([bias]))[0] == pytest.approx(y.mean(), abs=0.01)


def test_the_blend_removes_the_weight_of_a_confident_head_that_knows_nothing():
    rng = np.random.default_rng(3)
    true = rng.normal(size=400)
    y = (rng.random(400) < sigmoid(2 * true)).astype(int)
    logits = np.stack([rng.normal(size=400) * 8, 2 * true, 2 * true + rng.normal(size=400)], axis=1)
    weights = fit_blend(logits, y)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0)
    assert weights[0] < 0.05
    assert log_loss(logits @ weights, y) < log_loss(logits.mean(axis=1), y)


def test_sigmoid_and_log_loss_do_not_overflow():
    x = np.array([-1e4, -5.0, 0.0, 5.0, 1e4])
    with np.errstate(all="raise", under="ignore"):
        assert sigmoid(x) == pytest.approx([0, 1 / (1 + np.exp(5)), 0.5, 1 / (1 + np.exp(-5)), 1])
        assert np.isfinite(log_loss(x, np.array([0, 1, 1, 0, 1])))


@pytest.mark.parametrize("weight", [np.array([1, 2, 3, 1]), np.array([1, 1, 1, 1])])
def test_a_row_of_weight_two_is_fitted_like_two_rows(weight):
    rng = np.random.default_rng(5)
    logits, y, weight = rng.normal(size=(200, 2)), rng.integers(0, 2, 200), np.resize(weight, 200)
    repeated = (np.repeat(logits, weight, axis=0), np.repeat(y, weight))
    first, second = logits[:, 0], repeated[0][:, 0]
    found = fit_blend(logits, y, weight_N=weight)
    assert found == pytest.approx(fit_blend(*repeated), abs=1e-9)
    for sign in (1, -9 * (2 * y - 1)):
        # The second logit contradicts the labels.
        one, other = sign * np.abs(first), np.repeat(sign * np.abs(first), weight)
        expected = fit_calibration(other, repeated[1])
        assert fit_calibration(one, y, weight) == pytest.approx(expected, abs=1e-9)
    assert log_loss(first, y, weight) == pytest.approx(log_loss(second, repeated[1]))
