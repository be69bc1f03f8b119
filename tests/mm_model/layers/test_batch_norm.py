import keras
import numpy as np
import tensorflow as tf

from mm_model.layers.batch_norm import SynchronizedBatchNormalization


def test_synchronized_statistics_are_exact_if_the_mean_is_large():
    x = np.random.default_rng(0).normal(1000, 1, (64, 3, 3, 4)).astype(np.float32)
    ours, plain = (
        kind(momentum=0.0, **options)
        for kind, options in (
            (SynchronizedBatchNormalization, {"synchronized": True}),
            (keras.layers.BatchNormalization, {}),
        )
    )
    weights = tf.constant(np.random.default_rng(1).normal(size=x.shape).astype(np.float32))
    found = []
    for layer in (ours, plain):
        with tf.GradientTape() as tape:
            given = tf.constant(x)
            tape.watch(given)
            y = layer(given, training=True)
            loss = tf.reduce_sum(y * weights)
        found.append((np.asarray(y), np.asarray(tape.gradient(loss, given))))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(ours.moving_mean, exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(ours.moving_variance, exact.var((0, 1, 2)), rtol=1e-5)
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    keras_own = keras.layers.BatchNormalization(momentum=0.0, synchronized=True)
    keras_own(x, training=True)
    assert np.abs(keras_own.moving_variance - exact.var((0, 1, 2))).max() > 1e-3
