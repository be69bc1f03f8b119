import numpy as np

from mm_model.layers.resampling import Affine, resample
from tests.mm_model.examples import pictures


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
