import numpy as np
from keras import ops

from mm_model.layers.resampling import Affine, resample
from tests.mm_model.examples import pictures


def test_resampling_agrees_with_the_kernel_of_tensorflow():
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (16, 20, 24, 3)).astype(np.float32)
    xx, xy, yx, yy = rng.uniform(-1.5, 1.5, (4, 16)).astype(np.float32)
    x1, y1 = rng.uniform(-60, 60, (2, 16)).astype(np.float32)
    got = resample(images, Affine(xx, xy, x1, yx, yy, y1))
    cx, cy = (24 - 1) / 2, (20 - 1) / 2
    zero = np.zeros(16, np.float32)
    first = [xx, xy, x1 + cx - xx * cx - xy * cy, yx, yy, y1 + cy - yx * cx - yy * cy]
    expected = ops.image.affine_transform(
        images, np.stack([*first, zero, zero], axis=1), fill_mode="reflect"
    )
    np.testing.assert_allclose(got, expected, atol=0.05)


def test_the_identity_flips_and_quarter_turns_move_pixels_exactly():
    images = pictures(2, 20, 20)
    np.testing.assert_array_equal(resample(images, Affine()), images)
    np.testing.assert_array_equal(resample(images, Affine(xx=-1.0)), images[:, :, ::-1])
    np.testing.assert_array_equal(resample(images, Affine(yy=-1.0)), images[:, ::-1])
    quarter = Affine(xx=0.0, xy=-1.0, yx=1.0, yy=0.0)
    np.testing.assert_array_equal(resample(images, quarter), np.rot90(images, axes=(1, 2)))
    shifted = resample(images, Affine(x1=-3.0))
    np.testing.assert_array_equal(shifted[:, :, 3:], images[:, :, :-3])
    # The edge is reflected: c b a | a b c.
    np.testing.assert_array_equal(shifted[:, :, :3], images[:, :, 2::-1])
