import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import expit, log_expit

import mm_model
from mm_model.losses import FocalLoss, loss_from_logits, make_loss
from mm_model.spec import LossSpec
from tests.mm_model.examples import NO_RANDOMNESS, rows, with_random_heads

LOGITS = np.array([-9.0, -3.0, -0.5, 0.0, 0.25, 1.0, 4.0, 8.0])
SOFT = np.array([0.0, 1.0, 0.3, 0.5, 0.9, 0.0, 1.0, 0.1])
KINDS = [("binary_crossentropy", 0.0), ("focal", 0.0), ("focal", 0.5), ("focal", 5.0)]


def focal(logit: np.ndarray, y: np.ndarray, gamma: float) -> np.ndarray:
    """The expectation over the label of equation 4 of Lin et al., in float64."""
    positive = expit(-logit) ** gamma * -log_expit(logit)
    return y * positive + (1 - y) * expit(logit) ** gamma * -log_expit(-logit)


def value_and_gradient(loss, y: np.ndarray, logit: np.ndarray) -> tuple[float, np.ndarray]:
    logit_B1 = tf.constant(logit[:, None], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(logit_B1)
        from_logits = loss.get_config()["from_logits"]
        given = logit_B1 if from_logits else keras.activations.sigmoid(logit_B1)
        value = loss(y[:, None], given)
        # Labels of shape (N,) are accepted, too.
        np.testing.assert_array_equal(loss(y, given), value)
    return float(value), np.asarray(tape.gradient(value, logit_B1))[:, 0]


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("kind", "gamma"), KINDS)
def test_a_loss_and_its_gradient_agree_with_the_formula(kind, gamma, smoothing, from_logits):
    spec = LossSpec(loss=kind, focal_gamma=gamma, label_smoothing=smoothing)
    value, gradient = value_and_gradient(make_loss(spec, from_logits), SOFT, LOGITS)
    y = SOFT * (1 - smoothing) + smoothing / 2
    assert value == pytest.approx(focal(LOGITS, y, gamma).mean(), rel=1e-6)
    step = 1e-5
    higher, lower = focal(LOGITS + step, y, gamma), focal(LOGITS - step, y, gamma)
    np.testing.assert_allclose(gradient, (higher - lower) / (2 * step * 8), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize(("kind", "gamma"), KINDS)
def test_confident_predictions_have_finite_gradients(kind, gamma, from_logits):
    sure = np.array([-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])
    for y in (np.zeros(6), np.ones(6)):
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


@pytest.mark.parametrize(("kind", "gamma"), [("binary_crossentropy", 0.0), ("focal", 1.5)])
def test_training_adds_the_loss_of_each_head_and_the_penalty(kind, gamma):
    image, numbers, y = rows()
    statistics = mm_model.fit_numeric_statistics(numbers)
    fusion = {"auxiliary_weight": 0.5, "modality_dropout": 0}
    options = {**NO_RANDOMNESS, "fusion": fusion}
    model = with_random_heads(mm_model.create_model((16, 16, 3), (3,), statistics, **options))
    model.compile(loss=make_loss(LossSpec(loss=kind, focal_gamma=gamma, label_smoothing=0.1)))
    p = model([image, numbers], training=True)
    logits, weight = np.asarray(p._head_logits, np.float64), np.linspace(0, 2, len(y))

    def weighted(logit: np.ndarray) -> float:
        return float(np.mean(weight * focal(logit, 0.9 * y + 0.05, gamma)))

    heads = 0.5 * sum(weighted(logits[:, i]) for i in range(3))
    penalty = float(sum(np.asarray(loss) for loss in model.losses))
    assert penalty > 0
    for training, expected in ((True, heads), (False, 0.0)):
        got = model.compute_loss(y=y[:, None], y_pred=p, sample_weight=weight, training=training)
        total = weighted(logits.mean(axis=1)) + penalty + expected
        assert float(got) == pytest.approx(total, rel=1e-5)


def test_a_loss_or_its_name_is_converted_to_logits():
    for loss in ("binary_crossentropy", "bce", keras.losses.BinaryCrossentropy()):
        assert isinstance(loss_from_logits(loss), keras.losses.BinaryCrossentropy)
        assert loss_from_logits(loss).get_config()["from_logits"]
    converted = loss_from_logits(FocalLoss(3.0, label_smoothing=0.2))
    assert isinstance(converted, FocalLoss)
    assert (converted.gamma, converted.label_smoothing, converted.from_logits) == (3.0, 0.2, True)
    with pytest.raises(ValueError, match=r"loss='mse' cannot be computed from logits"):
        loss_from_logits("mse")
