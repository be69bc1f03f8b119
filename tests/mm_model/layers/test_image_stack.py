import keras
import numpy as np
import pytest
import tensorflow as tf

from mm_model import per_row_random
from mm_model.layers.image_stack import FoldImages, PickView, UnfoldImages


def views(num_rows: int, num_views: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num_rows, num_views, 3)).astype(np.float32)


def test_a_missing_image_is_replaced_by_the_first_present_one_of_its_row():
    images = np.random.default_rng(0).random((4, 3, 2, 2, 3)).astype(np.float32)
    mask = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1]], np.float32)
    layer = FoldImages()
    got = np.asarray(layer([images, mask]))
    chosen = [[0, 1, 2], [1, 1, 2], [0, 0, 0], [2, 2, 2]]
    expected = [images[row, i] for row, indices in enumerate(chosen) for i in indices]
    np.testing.assert_array_equal(got, expected)
    symbolic = layer([keras.Input((3, 2, 2, 3)), keras.Input((3,))])
    assert symbolic.shape == (None, 2, 2, 3)


def test_the_features_of_a_row_are_the_mean_and_the_tokens_of_its_present_images():
    rng = np.random.default_rng(0)
    pooled, tokens = rng.random((9, 4), np.float32), rng.random((9, 2, 5), np.float32)
    mask = np.array([[1, 1, 1], [0, 1, 0], [0, 0, 0]], np.float32)
    got_pooled, got_tokens = (np.asarray(x) for x in UnfoldImages()([pooled, tokens, mask]))
    expected = [pooled[:3].mean(axis=0), pooled[4], np.zeros(4)]
    np.testing.assert_allclose(got_pooled, expected, rtol=1e-6)
    present = tokens.reshape(3, 3, 2, 5) * mask[:, :, None, None]
    np.testing.assert_array_equal(got_tokens, present.reshape(3, 6, 5))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_training_draws_the_augmented_views_uniformly_and_inference_takes_the_first(jit_compile):
    layer, features = PickView(seed=1), views(3000, 4)
    np.testing.assert_array_equal(layer(features), features[:, 0])
    pick = tf.function(lambda: layer(features, training=True), jit_compile=jit_compile)
    got = np.asarray(pick())
    is_view = (features == got[:, None]).all(axis=2)
    assert (is_view.sum(axis=1) == 1).all()
    np.testing.assert_allclose(is_view.mean(axis=0), [0, 1 / 3, 1 / 3, 1 / 3], atol=0.03)
    assert (np.asarray(pick()) != got).any()


def test_a_single_view_draws_no_random_number():
    layer, features = PickView(seed=1), views(4, 1)
    layer(features)
    before = np.array(layer.seed_generator.state)
    np.testing.assert_array_equal(layer(features, training=True), features[:, 0])
    np.testing.assert_array_equal(layer.seed_generator.state, before)


@pytest.mark.parametrize("count", [2, 4])
def test_the_view_of_a_row_does_not_depend_on_the_number_of_parts(count):
    features, parts = views(16, 5), []
    whole = np.asarray(PickView(seed=3)(features, training=True))
    assert not any((whole == features[:, view]).all() for view in range(5))
    for index, part in enumerate(np.split(features, count)):
        with per_row_random.batch_part(index, count):
            parts.append(np.asarray(PickView(seed=3)(part, training=True)))
    np.testing.assert_array_equal(np.concatenate(parts), whole)
