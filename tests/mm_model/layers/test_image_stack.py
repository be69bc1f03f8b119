import keras
import numpy as np
import pytest
import tensorflow as tf

from mm_model.layers.image_stack import FoldImages, PickView, UnfoldImages
from tests.mm_model.examples import in_parts, views


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
    layer = UnfoldImages()
    got_pooled, got_tokens = (np.asarray(x) for x in layer([pooled, tokens, mask]))
    np.testing.assert_allclose(got_pooled[0], pooled[:3].mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(got_pooled[1], pooled[4])
    np.testing.assert_array_equal(got_pooled[2], np.zeros(4))
    np.testing.assert_array_equal(got_tokens[0], np.concatenate(tokens[:3]))
    nothing = np.zeros((2, 5))
    np.testing.assert_array_equal(got_tokens[1], np.concatenate([nothing, tokens[4], nothing]))
    np.testing.assert_array_equal(got_tokens[2], np.zeros((6, 5)))


def test_training_draws_the_augmented_views_uniformly_and_inference_takes_the_first():
    layer, features = PickView(seed=1), views(3000, 4)
    np.testing.assert_array_equal(layer(features), features[:, 0])
    got = np.asarray(layer(features, training=True))
    assert (got == got[:, :1]).all()
    np.testing.assert_array_equal(np.unique(got[:, 0]), [1, 2, 3])
    shares = np.bincount(got[:, 0].astype(int))[1:] / 3000
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)
    assert (np.asarray(layer(features, training=True)) != got).any()
    # With two views, training always takes the augmented one.
    assert (np.asarray(PickView()(views(50, 2), training=True)) == 1).all()


def test_each_row_gets_one_of_its_own_views():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 3, 5)).astype(np.float32)
    got = np.asarray(PickView(seed=2)(features, training=True))
    own = (features == got[:, None]).all(axis=2)
    assert (own.sum(axis=1) == 1).all()
    assert not own[:, 0].any()


def test_a_single_view_draws_no_random_number():
    layer, features = PickView(seed=1), views(4, 1)
    layer(features)
    before = np.array(layer.seed_generator.state)
    np.testing.assert_array_equal(layer(features, training=True), features[:, 0])
    np.testing.assert_array_equal(layer.seed_generator.state, before)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_view_of_a_row_does_not_depend_on_the_number_of_parts(count):
    features = views(16, 5)

    def picked():
        layer = PickView(seed=3)
        return lambda rows: layer(rows, training=True)

    whole = np.asarray(picked()(features))
    assert len(np.unique(whole)) > 2
    np.testing.assert_array_equal(in_parts(picked, features, count), whole)


def test_picking_a_view_compiles_with_xla():
    layer, features = PickView(seed=3), views(16, 5)
    compiled = tf.function(lambda x: layer(x, training=True), jit_compile=True)
    assert set(np.unique(compiled(features))) <= {1, 2, 3, 4}
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert again.get_config() == layer.get_config()
