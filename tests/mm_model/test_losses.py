import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import expit

import mm_model
from mm_model.losses import FocalLoss, loss_from_logits, make_loss
from mm_model.spec import LossSpec
from tests.mm_model.examples import UNTRAINED, rows

LOGITS = np.array([-9.0, -3.0, -0.5, 0.0, 0.25, 1.0, 4.0, 8.0])
SOFT = np.array([0.0, 1.0, 0.3, 0.5, 0.9, 0.0, 1.0, 0.1])


def focal(logit: np.ndarray, y: np.ndarray, gamma: float) -> np.ndarray:
    """The expectation over the label of equation 4 of Lin et al., in float64."""
    p = expit(logit)
    return y * (1 - p) ** gamma * -np.log(p) + (1 - y) * p**gamma * -np.log1p(-p)


def value_and_gradient(loss, y: np.ndarray, logit: np.ndarray) -> tuple[float, np.ndarray]:
    logit_B1 = tf.constant(logit[:, None], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(logit_B1)
        from_logits = loss.get_config()["from_logits"]
        given = logit_B1 if from_logits else keras.activations.sigmoid(logit_B1)
        value = loss(y[:, None], given)
    return float(value), np.asarray(tape.gradient(value, logit_B1))[:, 0]


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_the_focal_loss_and_its_gradient_agree_with_the_formula(gamma, smoothing, from_logits):
    spec = LossSpec(loss="focal", focal_gamma=gamma, label_smoothing=smoothing)
    value, gradient = value_and_gradient(make_loss(spec, from_logits), SOFT, LOGITS)
    y = SOFT * (1 - smoothing) + smoothing / 2
    assert value == pytest.approx(focal(LOGITS, y, gamma).mean(), rel=1e-6)
    step = 1e-5
    higher, lower = focal(LOGITS + step, y, gamma), focal(LOGITS - step, y, gamma)
    np.testing.assert_allclose(gradient, (higher - lower) / (2 * step * 8), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("from_logits", [True, False])
def test_focal_with_gamma_0_is_cross_entropy(from_logits, smoothing):
    none = LossSpec(loss="focal", focal_gamma=0, label_smoothing=smoothing)
    entropy = LossSpec(label_smoothing=smoothing)
    got = value_and_gradient(make_loss(none, from_logits), SOFT, LOGITS)
    expected = value_and_gradient(make_loss(entropy, from_logits), SOFT, LOGITS)
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["binary_crossentropy", "focal"])
def test_the_loss_of_a_mixed_label_is_the_mixed_loss_of_both(kind):
    loss = make_loss(LossSpec(loss=kind, label_smoothing=0.1), from_logits=True)
    for share in (0.0, 0.3, 0.5):
        zero, one, soft = (
            float(loss(np.full((8, 1), y), LOGITS[:, None])) for y in (0.0, 1.0, share)
        )
        assert soft == pytest.approx(share * one + (1 - share) * zero, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["binary_crossentropy", "focal"])
def test_confident_predictions_have_finite_gradients(kind, gamma):
    sure = np.array([-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])
    for y in (np.zeros(6), np.ones(6)):
        for from_logits in (True, False):
            loss = make_loss(LossSpec(loss=kind, focal_gamma=gamma), from_logits)
            value, gradient = value_and_gradient(loss, y, sure)
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()
    # A confident wrong prediction has the full gradient.
    np.testing.assert_allclose(gradient[:3], -1 / 6, rtol=1e-4)


def test_probabilities_without_logits_have_finite_gradients():
    p = tf.constant([[0.0], [1e-9], [0.4], [1.0]])
    with tf.GradientTape() as tape:
        tape.watch(p)
        value = FocalLoss(gamma=0.5)(np.ones((4, 1)), p)
    assert np.isfinite(np.asarray(tape.gradient(value, p))).all()
    expected = focal(np.log(0.4 / 0.6), np.ones(()), 0.5)
    got = float(FocalLoss(gamma=0.5)(np.ones((1, 1)), p[2:3]))
    assert got == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("weights", [None, np.linspace(0, 2, 16)])
def test_the_heads_have_the_loss_of_the_output(weights):
    image, numbers, y = rows()
    model = mm_model.create_model(
        (16, 16, 3), (3,), mm_model.fit_numeric_statistics(numbers), **UNTRAINED, l2=0
    )
    spec = LossSpec(loss="focal", focal_gamma=1.5, label_smoothing=0.1)
    model.compile(loss=make_loss(spec))
    p = model([image, numbers], training=True)
    logits = np.asarray(p._head_logits, np.float64)
    smooth = y * 0.9 + 0.05
    by_row = focal(logits.mean(axis=1), smooth, 1.5)
    by_row += sum(focal(logits[:, i], smooth, 1.5) for i in range(3))
    expected = float(np.mean(by_row * (1 if weights is None else weights)))
    got = float(model.compute_loss(y=y, y_pred=p, sample_weight=weights))
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_loss_or_its_name_is_converted_to_logits():
    for loss in ("binary_crossentropy", "bce", keras.losses.BinaryCrossentropy()):
        assert isinstance(loss_from_logits(loss), keras.losses.BinaryCrossentropy)
        assert loss_from_logits(loss).get_config()["from_logits"]
    converted = loss_from_logits(FocalLoss(3.0, label_smoothing=0.2))
    assert isinstance(converted, FocalLoss)
    assert (converted.gamma, converted.label_smoothing, converted.from_logits) == (3.0, 0.2, True)
    with pytest.raises(ValueError, match=r"loss='mse' cannot be computed from logits"):
        loss_from_logits("mse")
