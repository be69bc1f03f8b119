import keras
import numpy as np
import tensorflow as tf

from mm_model.layers.batch_norm import SynchronizedBatchNormalization


def test_synchronized_statistics_are_exact_if_the_mean_is_large():
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(1000, 1, (64, 3, 3, 4)), tf.float32)
    weights = tf.constant(rng.normal(size=x.shape), tf.float32)
    ours = SynchronizedBatchNormalization(momentum=0.0, synchronized=True)
    found = []
    for layer in (ours, keras.layers.BatchNormalization(momentum=0.0)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y * weights)
        found.append((y, tape.gradient(loss, x)))
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(ours.moving_mean, exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(ours.moving_variance, exact.var((0, 1, 2)), rtol=1e-5)
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
