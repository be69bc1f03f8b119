import keras
import numpy as np
import pytest
from keras import ops

from mm_model.layers.dropout import ModalityDropout, RowDropout
from mm_model.tunable import Tunable, current_value, l2_regularizer


def outputs(layer, inputs) -> list[np.ndarray]:
    import tensorflow as tf

    call = tf.function(lambda: layer(inputs, training=True))
    return [np.asarray(x) for x in tf.nest.flatten(call())]


def test_python_sees_the_initial_value_of_a_tunable_and_the_graph_its_current_one():
    tunable = Tunable(0.25)
    tunable.assign(0.5)
    assert tunable == 0.25
    assert float(current_value(tunable)) == 0.5
    assert current_value(0.25) == 0.25
    assert current_value(tunable, ops.zeros((), "bfloat16")).dtype == "bfloat16"


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_with_a_tunable_rate_equals_dropout_with_a_constant_rate(rate):
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    tunable = Tunable(0.3)
    with_tunable, constant = RowDropout(tunable, seed=1), RowDropout(rate, seed=1)
    tunable.assign(rate)
    np.testing.assert_allclose(outputs(with_tunable, x), outputs(constant, x), rtol=1e-6)


def test_one_graph_follows_the_value_of_a_tunable():
    import tensorflow as tf

    tunable, traces = Tunable(0.3), []
    layer = RowDropout(tunable, seed=1)

    @tf.function
    def dropped(x):
        traces.append(1)
        return tf.reduce_mean(tf.cast(layer(x, training=True) == 0, "float32"))

    x = tf.ones((1000, 10))
    shares = []
    for rate in (0.3, 0.05, 0.7):
        tunable.assign(rate)
        shares.append(float(dropped(x)))
    assert shares == pytest.approx([0.3, 0.05, 0.7], abs=0.02)
    assert len(traces) == 1


def test_modality_dropout_with_a_tunable_rate_equals_that_with_a_constant_rate():
    x = [np.ones((64, 3), np.float32), np.ones((64, 2), np.float32)]
    tunable = Tunable(0.1)
    with_tunable, constant = ModalityDropout(tunable, seed=1), ModalityDropout(0.6, seed=1)
    tunable.assign(0.6)
    for ours, theirs in zip(outputs(with_tunable, x), outputs(constant, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_penalty_with_a_tunable_factor_equals_that_of_keras():
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    tunable = Tunable(1.0)
    tunable.assign(0.003)
    expected = float(keras.regularizers.L2(0.003)(x))
    assert float(l2_regularizer(tunable)(ops.convert_to_tensor(x))) == pytest.approx(
        expected, rel=1e-6
    )
    assert l2_regularizer(0.0) is None
    assert type(l2_regularizer(0.003)) is keras.regularizers.L2


def test_a_tunable_does_not_change_half_precision():
    layer = RowDropout(Tunable(0.3), seed=1, dtype="mixed_bfloat16")
    assert layer(np.ones((4, 2), np.float32), training=True).dtype == "bfloat16"
