import keras
import numpy as np
import pytest
import tensorflow as tf

from mm_model.layers.blocks import (
    AffineLogit,
    FoldImages,
    ModalityDropout,
    SynchronizedBatchNormalization,
    UnfoldImages,
)


def test_a_missing_image_is_replaced_by_the_first_of_its_row_that_is_there():
    images = np.random.default_rng(0).random((4, 3, 2, 2, 3)).astype(np.float32)
    mask = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1]], np.float32)
    layer = FoldImages()
    got = np.asarray(layer([images, mask]))
    chosen = [[0, 1, 2], [1, 1, 2], [0, 0, 0], [2, 2, 2]]
    expected = [images[row, i] for row, indices in enumerate(chosen) for i in indices]
    np.testing.assert_array_equal(got, expected)
    assert got.shape == layer.compute_output_shape((images.shape, mask.shape))
    assert layer.compute_output_shape(((None, 3, 2, 2, 3), (None, 3))) == (None, 2, 2, 3)


def test_the_features_of_a_row_are_the_mean_and_the_tokens_of_its_images_that_are_there():
    rng = np.random.default_rng(0)
    pooled, tokens = rng.random((9, 4), np.float32), rng.random((9, 2, 5), np.float32)
    mask = np.array([[1, 1, 1], [0, 1, 0], [0, 0, 0]], np.float32)
    layer = UnfoldImages()
    got_pooled, got_tokens = (np.asarray(x) for x in layer([pooled, tokens, mask]))
    np.testing.assert_allclose(got_pooled[0], pooled[:3].mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(got_pooled[1], pooled[4])
    np.testing.assert_array_equal(got_pooled[2], np.zeros(4))
    np.testing.assert_array_equal(got_tokens[0], np.concatenate(tokens[:3]))
    nothing = np.zeros((2, 5))
    np.testing.assert_array_equal(got_tokens[1], np.concatenate([nothing, tokens[4], nothing]))
    np.testing.assert_array_equal(got_tokens[2], np.zeros((6, 5)))
    shapes = layer.compute_output_shape([pooled.shape, tokens.shape, mask.shape])
    assert shapes == (got_pooled.shape, got_tokens.shape)


def test_modality_dropout_hides_one_branch_of_its_share_of_rows_and_never_both():
    first, second = np.ones((20_000, 2), np.float32), np.full((20_000, 3), 2, np.float32)
    layer = ModalityDropout(0.4, seed=1)
    a, b = (np.asarray(x) for x in layer([first, second], training=True))
    hidden_a, hidden_b = (a == 0).all(axis=1), (b == 0).all(axis=1)
    assert hidden_a.mean() == pytest.approx(0.2, abs=0.02)
    assert hidden_b.mean() == pytest.approx(0.2, abs=0.02)
    assert not (hidden_a & hidden_b).any()
    a, b = (np.asarray(x) for x in layer([first, second], training=False))
    np.testing.assert_array_equal(a, first)
    np.testing.assert_array_equal(b, second)


def test_an_affine_logit_is_not_trained_and_keeps_what_it_was_set_to():
    layer = AffineLogit([0.5, 0.5])
    logits = np.array([[1.0, 3.0], [2.0, -2.0]], np.float32)
    np.testing.assert_allclose(np.asarray(layer(logits)), [[2.0], [0.0]])
    assert layer.trainable_variables == []
    layer.set([1.0, 0.0], bias=-1.0)
    np.testing.assert_allclose(np.asarray(layer(logits)), [[0.0], [1.0]])
    again = AffineLogit.from_config(layer.get_config())
    assert isinstance(again, keras.layers.Layer)
    np.testing.assert_allclose(np.asarray(again(logits)), [[2.0], [0.0]])


def test_synchronized_statistics_are_those_of_float64_where_the_mean_is_large():
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
