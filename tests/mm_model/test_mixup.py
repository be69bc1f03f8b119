import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from mm_model.losses import make_loss
from mm_model.mixup import beta_quantile, mix_rows
from mm_model.spec import LossSpec
from tests.mm_model.examples import rows_with_all_inputs

MIXUP, CUTMIX = LossSpec(mixup_alpha=0.4), LossSpec(cutmix_alpha=1.0)
BOTH = LossSpec(mixup_alpha=0.4, cutmix_alpha=1.0)


def batch(count: int = 6, seed: int = 0):
    """Inputs with some missing numbers and one image per row, labels, and different weights."""
    rng = np.random.default_rng(seed)
    numeric = rng.normal(size=(count, 4))
    numeric[rng.random(numeric.shape) < 0.3] = np.nan
    inputs = {
        "image": rng.integers(0, 256, (count, 10, 12, 3), dtype=np.uint8),
        "numeric": numeric.astype(np.float32),
        "category": rng.integers(0, 5, (count, 2)).astype(np.int32),
    }
    y = rng.integers(0, 2, (count, 1)).astype(np.float32)
    return inputs, y, rng.uniform(0.5, 2, (count, 1)).astype(np.float32)


def step(inputs, y, weight, spec: LossSpec, seed: int):
    result, y, weight = mix_rows(inputs, y, weight, spec, keras.random.SeedGenerator(seed))
    return {k: np.asarray(v) for k, v in result.items()}, np.asarray(y), np.asarray(weight)


def neighbour(own: np.ndarray) -> np.ndarray:
    return np.roll(own, 1, axis=0)


def mixed(own: np.ndarray, fraction: float) -> np.ndarray:
    return fraction * own + (1 - fraction) * neighbour(own)


def draws_of(seed: int) -> np.ndarray:
    """The random numbers of a step: of mixup, of CutMix, the box's centre x and y, the choice."""
    return np.asarray(keras.random.uniform((5,), seed=keras.random.SeedGenerator(seed)))


@pytest.mark.parametrize("seed", range(4))
def test_mixup_is_the_weighted_mean_of_a_row_and_its_neighbour(seed):
    inputs, y, weight = batch(seed=seed)
    pixels = inputs["image"].astype(np.float64)
    inputs["features"] = inputs["image"].reshape(6, 10, -1).astype(np.float32)
    got, got_y, got_weight = step(inputs, y, weight, MIXUP, seed)
    fraction = float(beta_quantile(draws_of(seed)[0], 0.4))
    np.testing.assert_allclose(got["image"], mixed(pixels, fraction), atol=1e-2)
    # Features are mixed like images, view by view.
    np.testing.assert_array_equal(got["features"], got["image"].reshape(6, 10, -1))
    own, other = inputs["numeric"], neighbour(inputs["numeric"])
    numbers = np.where(np.isnan(own), other, np.where(np.isnan(other), own, mixed(own, fraction)))
    np.testing.assert_allclose(got["numeric"], numbers, atol=1e-4)
    assert np.isnan(own).any()
    larger = inputs["category"] if fraction >= 0.5 else neighbour(inputs["category"])
    np.testing.assert_array_equal(got["category"], larger)
    np.testing.assert_allclose(got_weight, mixed(weight, fraction), rtol=1e-4)
    labels = mixed(weight * y, fraction) / mixed(weight, fraction)
    np.testing.assert_allclose(got_y, labels, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_pastes_a_box_of_the_drawn_area_and_shares_by_the_area_outside_it(seed):
    inputs, y, weight = batch(seed=seed)
    got, got_y, got_weight = step(inputs, y, np.ones_like(weight), CUTMIX, seed)
    _, drawn, x, y_centre, _ = draws_of(seed)  # Beta(1, 1) is uniform.
    sides = []
    for length, centre in ((10, y_centre), (12, x)):
        half = np.floor(length * np.sqrt(1 - drawn)) / 2
        pixel = np.arange(length)
        low, high = np.round(centre * length - half), np.round(centre * length + half)
        sides.append((pixel >= low) & (pixel < high))
    inside = np.outer(*sides)
    image = np.where(inside[:, :, None], neighbour(inputs["image"]), inputs["image"])
    np.testing.assert_array_equal(got["image"], image)
    fraction = 1 - inside.mean()
    np.testing.assert_allclose(got_y, mixed(y, fraction), atol=1e-6)
    np.testing.assert_allclose(got_weight, np.ones_like(weight), rtol=1e-6)
    larger = inputs["category"] if fraction >= 0.5 else neighbour(inputs["category"])
    np.testing.assert_array_equal(got["category"], larger)


@pytest.mark.parametrize("spec", [MIXUP, CUTMIX, BOTH])
def test_the_loss_of_mixed_rows_is_the_mixed_loss_of_both(spec):
    inputs, y, weight = batch()
    p = np.random.default_rng(1).uniform(0.05, 0.95, y.shape)
    for seed in range(4):
        _, got_y, got_weight = step(inputs, y, weight, spec, seed)
        # The mixed label of a row with label 1 after one with label 0, with equal weights.
        probe_y = np.array([[1.0], [0.0]] * 3, np.float32)
        _, mixed_y, _ = step(inputs, probe_y, np.ones_like(y), spec, seed)
        fraction = float(mixed_y[0, 0])
        for kind in ("binary_crossentropy", "focal"):
            loss = make_loss(LossSpec(loss=kind))
            own, other = loss(y, p, weight), loss(neighbour(y), p, neighbour(weight))
            expected = fraction * float(own) + (1 - fraction) * float(other)
            assert float(loss(got_y, p, got_weight)) == pytest.approx(expected, rel=1e-5)


def test_each_step_uses_mixup_or_cutmix_with_equal_probability():
    inputs, y, weight = batch()
    own = inputs["image"].astype(np.float32)
    boxes = []
    for seed in range(30):
        got = step(inputs, y, weight, BOTH, seed)[0]["image"]
        boxes.append(bool(((got == own) | (got == neighbour(own))).all()))
    assert boxes == [draws_of(seed)[4] < 0.5 for seed in range(30)]
    assert 8 < sum(boxes) < 22


def test_without_alphas_nothing_is_mixed():
    inputs, y, weight = batch()
    seed = keras.random.SeedGenerator(0)
    before = np.array(seed.state)
    got = mix_rows(inputs, y, weight, LossSpec(), seed)
    assert all(a is b for a, b in zip(got, (inputs, y, weight), strict=True))
    np.testing.assert_array_equal(seed.state, before)


@pytest.mark.parametrize(
    ("name", "spec"), [("image", MIXUP), ("image", CUTMIX), ("features", MIXUP)]
)
def test_a_missing_image_is_not_mixed_in(name, spec):
    inputs, y = rows_with_all_inputs()
    y, weight = y[:, None].astype(np.float32), np.ones((16, 1), np.float32)
    mask, pixels = inputs["image_mask"], inputs["image"].astype(np.float32)
    # Values of a missing image would be visible in any mixture.
    pixels[mask == 0] = 1e9
    given = pixels if name == "image" else pixels.reshape(16, 3, 2, -1)
    for seed in range(4):
        got, _, _ = step({name: given, "image_mask": mask}, y, weight, spec, seed)
        assert got[name].shape == given.shape
        assert got[name][got["image_mask"] > 0].max() <= 255
        own = (got["image_mask"] == mask).all()
        assert own or (got["image_mask"] == neighbour(mask)).all()


def test_rows_without_weight_have_no_effect_and_a_finite_label():
    inputs, y, weight = batch()
    weight[:3] = 0
    _, got_y, got_weight = step(inputs, y, weight, MIXUP, 1)
    assert np.isfinite(got_y).all()
    assert (got_weight[1:3] == 0).all()
    # A row mixed with one without weight keeps its own label.
    assert got_y[3, 0] == pytest.approx(y[3, 0])


def test_cutmix_without_images_is_rejected_but_mixup_is_not():
    inputs, y, weight = batch()
    inputs["features"] = inputs.pop("image").reshape(6, 10, -1)
    message = r"cutmix_alpha=1 needs images, but .*'features'\]; set it to 0"
    with pytest.raises(ValueError, match=message):
        step(inputs, y, weight, CUTMIX, 0)
    del inputs["features"]
    got, _, _ = step(inputs, y, weight, MIXUP, 0)
    assert set(got) == {"numeric", "category"}


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_quantiles_are_those_of_the_beta_distribution(alpha):
    shares = np.linspace(0, 1, 1001)
    expected = stats.beta(alpha, alpha).ppf(shares)
    np.testing.assert_allclose(beta_quantile(shares.astype(np.float32), alpha), expected, atol=1e-3)


def test_mixing_compiles_with_xla():
    inputs, y = rows_with_all_inputs()
    y, weight = y[:, None].astype(np.float32), np.ones((16, 1), np.float32)
    inputs = {**inputs, "numeric": inputs["numeric"].astype(np.float32)}
    seed = keras.random.SeedGenerator(0)

    @tf.function(jit_compile=True)
    def compiled(inputs, y, weight):
        return [mix_rows(inputs, y, weight, spec, seed) for spec in (MIXUP, CUTMIX, BOTH)]

    for got, got_y, got_weight in compiled(inputs, y, weight):
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in inputs.items()}
        assert np.isfinite(got_y).all()
        np.testing.assert_allclose(got_weight, weight, rtol=1e-6)
