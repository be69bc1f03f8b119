"""Fails when a Keras upgrade changes what `compat_keras` relies on."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from mm_model.compat_keras import batch_norm_statistics, update_locally
from mm_model.layers.batch_norm import SynchronizedBatchNormalization
from mm_model.optimizer import make_optimizer
from mm_model.spec import OptimizerSpec

SCALE = 8.0
OPTIMIZERS = ("adam", "adamw", "lamb", "sgd")


def optimizer_and_kernel(kind: str) -> tuple[Any, keras.Variable]:
    spec = OptimizerSpec.model_validate(
        {"optimizer": kind, "learning_rate": 0.1, "warmup_fraction": 0.5, "ema_momentum": 0.9}
    )
    return make_optimizer(spec, total_steps=8), keras.Variable([1.0, -2.0], name="kernel")


def apply(optimizer: Any, gradient: Any, kernel: keras.Variable) -> None:
    tf.function(lambda: optimizer.apply([tf.constant(gradient)], [kernel]), autograph=False)()


def states(optimizer: Any, kernel: keras.Variable) -> list[bytes]:
    return [np.asarray(v).tobytes() for v in [kernel, *optimizer.variables]]


def test_batch_norm_statistics_of_nested_models_have_the_order_of_the_variables():
    inner = keras.Sequential(
        [keras.layers.Input((4, 4, 3)), keras.layers.Conv2D(2, 1),
         SynchronizedBatchNormalization(synchronized=True), keras.layers.Flatten()]
    )  # fmt: skip
    image, number = keras.Input((4, 4, 3)), keras.Input((2,))
    normalized = keras.layers.BatchNormalization()(number)
    x = keras.layers.Concatenate()([inner(image), normalized])
    model = keras.Model([image, number], keras.layers.BatchNormalization()(x))
    found = batch_norm_statistics(model)
    assert [v.path for v in found] == [v.path for v in model.variables if "moving_" in v.path]
    assert len(found) == 6


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_local_update_has_the_bits_of_keras_and_skips_steps_like_its_loss_scale_optimizer(kind):
    inner, expected = optimizer_and_kernel(kind)
    scaling = keras.optimizers.LossScaleOptimizer(inner, initial_scale=SCALE)
    scaling.build([expected])
    optimizer, kernel = optimizer_and_kernel(kind)
    optimizer = update_locally(optimizer)
    optimizer.build([kernel])
    for slope in (np.inf, 0.5, np.nan, 2.0, np.inf, 1.0, 3.0, 4.0):
        gradient, before = np.float32([slope, -1.0]), states(optimizer, kernel)
        finite = bool(np.isfinite(slope))
        # Without this tensor, every step counts as finite.
        optimizer.gradients_finite = tf.constant(finite) if slope not in (3.0, 4.0) else None
        apply(optimizer, gradient, kernel)
        apply(scaling, gradient * np.asarray(scaling.dynamic_scale), expected)
        assert states(optimizer, kernel) == states(inner, expected)
        assert (states(optimizer, kernel) == before) == (not finite)
    assert int(optimizer.iterations) == 5


def test_rate_factors_scale_the_learning_rate_of_a_variable():
    kernels = []
    for factor in (1.0, 0.5):
        optimizer, kernel = optimizer_and_kernel("sgd")
        optimizer = update_locally(optimizer)
        optimizer.build([kernel])
        optimizer.rate_factors = {id(kernel): factor}
        for _ in range(2):
            apply(optimizer, [1.0, 1.0], kernel)
        kernels.append(np.asarray(kernel) - [1.0, -2.0])
    np.testing.assert_allclose(kernels[1], 0.5 * kernels[0], rtol=1e-5)
