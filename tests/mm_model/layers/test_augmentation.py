import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from mm_model import per_row_random
from mm_model.layers.augmentation import (
    RandAugment,
    RandomColour,
    RandomGeometry,
    augmentation_layers,
)
from mm_model.spec import NO_AUGMENTATION, AugmentationSpec
from tests.mm_model.examples import half_precision, pictures

EVERYTHING = AugmentationSpec(flip="horizontal_and_vertical", rand_augment=0.5)


def draws_of(seed: int, num_rows: int, count: int) -> np.ndarray:
    """The random numbers of the first call of a layer with this seed."""
    draw = per_row_random.uniform((num_rows, count), keras.random.SeedGenerator(seed), -1.0, 1.0)
    return np.asarray(draw, np.float64)


def moved(image: np.ndarray, forward: np.ndarray) -> np.ndarray:
    """SciPy's result of moving pixels at (x, y) from the centre to forward @ (x, y, 1).

    SciPy maps positions (y, x) of the result to positions of the image.
    """
    height, width = image.shape[:2]
    back = np.linalg.inv(forward)
    swap = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    centre = np.eye(3)
    centre[:2, 2] = (height - 1) / 2, (width - 1) / 2
    matrix = centre @ swap @ back @ swap @ np.linalg.inv(centre)
    channels = [
        ndimage.affine_transform(image[..., c].astype(np.float64), matrix, order=1, mode="reflect")
        for c in range(3)
    ]
    return np.stack(channels, axis=-1)


def affine(angle: float = 0.0, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """Turn counterclockwise as displayed, because y points down, then shift."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin, x], [-sin, cos, y], [0, 0, 1]])


def test_random_geometry_agrees_with_scipy():
    images = pictures()
    # The largest shifts need pixels from beyond the first reflection at an edge.
    layer = RandomGeometry("horizontal_and_vertical", 0.2, 0.3, 0.95, seed=4)
    got = np.asarray(layer(images, training=True))
    flipped = set()
    for i, (fx, fy, angle, zoom, tx, ty) in enumerate(draws_of(4, 8, 6)):
        flips = np.diag([-1.0 if fx < 0 else 1.0, -1.0 if fy < 0 else 1.0, 1.0])
        flipped.add((fx < 0, fy < 0))
        smaller = np.diag([1 / (1 + 0.3 * zoom), 1 / (1 + 0.3 * zoom), 1.0])
        turned = affine(angle * 0.2 * 2 * np.pi)
        forward = affine(x=tx * 0.95 * 24, y=ty * 0.95 * 20) @ smaller @ turned @ flips
        np.testing.assert_allclose(got[i], moved(images[i], forward), atol=0.02)
    assert len(flipped) > 2


@pytest.mark.parametrize(
    ("flip", "axes"),
    [
        ("horizontal", [(2,), ()]),
        ("vertical", [(1,), ()]),
        ("horizontal_and_vertical", [(1, 2), (1,), (2,), ()]),
    ],
)
def test_images_are_flipped_exactly_and_along_all_axes_equally_often(flip, axes):
    images = np.repeat(pictures(1), 2000, axis=0)
    got = np.asarray(RandomGeometry(flip, seed=1)(images, training=True))
    matches = np.stack([(got == np.flip(images, a)).all(axis=(1, 2, 3)) for a in axes])
    assert (matches.sum(axis=0) == 1).all()
    np.testing.assert_allclose(matches.mean(axis=1), 1 / len(axes), atol=0.04)


def test_random_colour_agrees_with_tensorflow():
    images = pictures()
    got = np.asarray(RandomColour(0.9, 0.6, seed=5)(images, training=True))
    for i, (contrast, brightness) in enumerate(draws_of(5, 8, 2)):
        changed = tf.image.adjust_contrast(images[i], 1 + 0.9 * contrast)
        changed = tf.image.adjust_brightness(changed, 0.6 * 255 * brightness)
        np.testing.assert_allclose(got[i], np.clip(changed, 0, 255), atol=0.02)
    assert (got == 0).any()
    assert (got == 255).any()


def test_zero_settings_change_nothing():
    images = pictures()
    assert augmentation_layers(NO_AUGMENTATION) == []
    for layer in (RandomGeometry(), RandomColour(), RandAugment(0.5, ["identity"])):
        np.testing.assert_array_equal(layer(images, training=True), images)


def pillow(name: str, image: Image.Image, magnitude: float, sign: float) -> Image.Image:
    factor = 1 + sign * 0.9 * magnitude
    return {
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "colour": lambda: ImageEnhance.Color(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * magnitude)),
        "solarize": lambda: ImageOps.solarize(image, int(256 * (1 - magnitude))),
    }[name]()


@pytest.mark.parametrize("magnitude", [0.25, 0.75])
@pytest.mark.parametrize("name", [*RandAugment.ENHANCING, "autocontrast", "posterize", "solarize"])
def test_a_colour_operation_agrees_with_pillow(name, magnitude):
    images = pictures()
    layer = RandAugment(magnitude, [name], num_operations=1, seed=6)
    got = np.asarray(layer(images, training=True))
    signs = np.where(draws_of(6, 8, 2)[:, 1] < 0, -1, 1)
    assert len(set(signs)) == 2
    for image, changed, sign in zip(images, got, signs, strict=True):
        expected = pillow(name, Image.fromarray(image.astype(np.uint8)), magnitude, sign)
        # Pillow also rounds intermediate results.
        np.testing.assert_allclose(changed, np.asarray(expected), atol=2)
    assert np.abs(got - images).mean() > 0.05


@pytest.mark.parametrize("name", RandAugment.GEOMETRIC)
def test_a_geometric_operation_agrees_with_scipy(name):
    images = pictures()
    got = np.asarray(RandAugment(0.5, [name], num_operations=1, seed=7)(images, training=True))
    signs = np.where(draws_of(7, 8, 2)[:, 1] < 0, -1, 1)
    assert len(set(signs)) == 2
    for image, changed, sign in zip(images, got, signs, strict=True):
        forward = {
            "rotate": affine(sign * np.pi / 12),
            "shear_x": np.array([[1, -sign * 0.15, 0], [0, 1, 0], [0, 0, 1]]),
            "shear_y": np.array([[1, 0, 0], [-sign * 0.15, 1, 0], [0, 0, 1]]),
            "translate_x": affine(x=-sign * 0.225 * 24),
            "translate_y": affine(y=-sign * 0.225 * 20),
        }[name]
        np.testing.assert_allclose(changed, moved(image, forward), atol=0.02)


def test_two_operations_per_image_are_drawn_uniformly_and_geometric_ones_are_applied_first():
    names = ("identity", "solarize", "translate_x")
    images = np.repeat(pictures(1), 900, axis=0)
    got = np.asarray(RandAugment(0.5, names, seed=8)(images, training=True))
    draw = draws_of(8, 900, 4)
    drawn, shifts = np.floor((draw[:, ::2] + 1) * 1.5).astype(int), draw[:, 1::2]
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    np.testing.assert_allclose(counts / 900, np.full(9, 1 / 9), atol=0.03)
    # Two shifts are resampled once, but would be resampled twice here.
    for i in np.flatnonzero((drawn == 2).sum(axis=1) < 2)[:30]:
        expected = images[i].astype(np.float64)
        for sign in shifts[i][drawn[i] == 2]:
            expected = moved(expected, affine(x=(1 if sign < 0 else -1) * 0.225 * 24))
        for _ in range((drawn[i] == 1).sum()):
            expected = np.where(expected >= 128, 255 - expected, expected)
        np.testing.assert_allclose(got[i], expected, atol=0.02)


def test_augmentation_compiles_with_xla_and_for_any_number_of_rows(monkeypatch):
    def drawn(shape, seed, minval=0.0, maxval=1.0, dtype="float32"):
        # XLA draws different random numbers than TensorFlow.
        return np.random.default_rng(shape[1]).uniform(minval, maxval, (8, shape[1])).astype(dtype)

    monkeypatch.setattr(per_row_random, "uniform", drawn)
    images = pictures()
    layers = augmentation_layers(EVERYTHING)

    def augment(x):
        for layer in layers:
            x = layer(x, training=True)
        return x

    expected = np.asarray(augment(images))
    anything = tf.TensorSpec((None, 20, 24, 3), tf.float32)
    for function in (
        tf.function(augment, jit_compile=True),
        tf.function(augment, input_signature=[anything]),
    ):
        got = np.asarray(function(images))
        # A pixel near the threshold of an operation may fall on its other side.
        assert (np.abs(got - expected) < 0.1).mean() > 0.999


def test_augmentation_is_in_full_precision_and_in_training_only():
    images = pictures()
    for layer in augmentation_layers(EVERYTHING):
        np.testing.assert_array_equal(layer(images, training=False), images)
    full = RandomGeometry(rotation=0.1, seed=1)(images, training=True)
    with half_precision():
        half = RandomGeometry(rotation=0.1, seed=1)(images, training=True)
    np.testing.assert_array_equal(half, full)
