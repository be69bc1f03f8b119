import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from mm_model.layers.dropout import ModalityDropout, RowDropout
from mm_model.tunable import Tunable, current_value, l2_regularizer


def test_python_sees_the_initial_value_of_a_tunable_and_the_graph_its_current_one():
    tunable = Tunable(0.25)
    tunable.assign(0.5)
    assert tunable == 0.25
    assert float(current_value(tunable)) == 0.5
    assert current_value(0.25) == 0.25
    assert current_value(tunable, ops.zeros((), "bfloat16")).dtype == "bfloat16"


@pytest.mark.parametrize("kind", [RowDropout, ModalityDropout])
def test_one_graph_with_a_tunable_rate_equals_graphs_with_constant_rates(kind):
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    inputs = x if kind is RowDropout else [x, x]
    tunable, traces = Tunable(0.3), []
    layer = kind(tunable, seed=1)
    start = np.array(layer.seed_generator.state)

    @tf.function
    def outputs():
        traces.append(1)
        return layer(inputs, training=True)

    for rate in (0.1, 0.6):
        tunable.assign(rate)
        layer.seed_generator.state.assign(start)
        constant = kind(rate, seed=1)(inputs, training=True)
        np.testing.assert_allclose(outputs(), constant, rtol=1e-6)
    assert len(traces) == 1


def test_the_penalty_with_a_tunable_factor_equals_that_of_keras():
    x = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))
    tunable = Tunable(1.0)
    tunable.assign(0.003)
    expected = float(keras.regularizers.L2(0.003)(x))
    for factor in (tunable, 0.003):
        assert float(l2_regularizer(factor)(x)) == pytest.approx(expected, rel=1e-6)
    assert l2_regularizer(0.0) is None


def test_a_tunable_does_not_change_half_precision():
    layer = RowDropout(Tunable(0.3), seed=1, dtype="mixed_bfloat16")
    assert layer(np.ones((4, 2), np.float32), training=True).dtype == "bfloat16"
