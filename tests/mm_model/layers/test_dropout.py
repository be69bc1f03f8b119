import keras
import numpy as np
import pytest
from keras import ops

from mm_model.layers.dropout import ModalityDropout, RowDropout


@pytest.mark.parametrize("noise_shape", [None, (None, 1, 1, 1), (None, None, None, 1)])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_dropout_equals_that_of_keras_bit_for_bit(rate, noise_shape):
    x = np.random.default_rng(0).normal(size=(6, 4, 5, 3)).astype(np.float32)
    ours = RowDropout(rate, noise_shape=noise_shape, seed=11)
    theirs = keras.layers.Dropout(rate, noise_shape=noise_shape, seed=11)
    for _ in range(3):
        np.testing.assert_array_equal(ours(x, training=True), theirs(x, training=True))
    np.testing.assert_array_equal(ours(x), x)


def test_dropout_keeps_its_rate_and_scale_in_mixed_precision():
    layer = RowDropout(0.999, seed=1, dtype="mixed_bfloat16")
    x = np.ones((200_000, 1), np.float32)
    got = layer(x, training=True)
    assert keras.backend.standardize_dtype(got.dtype) == "bfloat16"
    kept = np.asarray(ops.cast(got, "float32"))
    # A bfloat16 random number has 8 bits, too few to distinguish 0.999 from 1.
    assert (kept > 0).mean() == pytest.approx(0.001, rel=0.3)
    assert kept.max() == pytest.approx(1000, rel=0.01)


def test_modality_dropout_hides_one_branch_at_its_rate_and_never_both():
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


def test_modality_dropout_hides_one_of_three_branches_equally_often():
    branches = [np.ones((20_000, 1), np.float32)] * 3
    layer = ModalityDropout(0.6, num_branches=3, seed=1)
    hidden = np.concatenate([np.asarray(x) for x in layer(branches, training=True)], axis=1) == 0
    assert hidden.sum(axis=1).max() == 1
    np.testing.assert_allclose(hidden.mean(axis=0), 0.2, atol=0.02)


def test_modality_dropout_never_hides_the_other_branch_of_rows_without_an_image():
    first, second = np.ones((20_000, 2), np.float32), np.ones((20_000, 3), np.float32)
    mask = np.resize([[0.0, 0.0], [0.0, 1.0]], (20_000, 2)).astype(np.float32)
    layer = ModalityDropout(0.4, seed=1)
    _, b = layer([first, second, mask], training=True)
    hidden = (np.asarray(b) == 0).all(axis=1)
    assert not hidden[::2].any()
    assert hidden[1::2].mean() == pytest.approx(0.2, abs=0.02)
