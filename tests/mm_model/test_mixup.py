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


def fraction_of(got: np.ndarray, own: np.ndarray) -> float:
    """Return the row's own fraction of the pixels that differ from the neighbour's."""
    other = np.roll(own, 1, axis=0)
    differs = np.abs(own.astype(float) - other) > 100
    return float(
        np.median(((got - other) / np.where(differs, own - other.astype(float), 1))[differs])
    )


@pytest.mark.parametrize("seed", range(6))
def test_mixup_is_the_weighted_mean_of_a_row_and_its_neighbour(seed):
    inputs, y, weight = batch(seed=seed)
    got, got_y, got_weight = step(inputs, y, weight, MIXUP, seed)
    fraction = fraction_of(got["image"], inputs["image"])
    pixels = inputs["image"].astype(np.float64)
    expected = fraction * pixels + (1 - fraction) * np.roll(pixels, 1, axis=0)
    np.testing.assert_allclose(got["image"], expected, atol=1e-2)
    own, other = inputs["numeric"].astype(float), np.roll(inputs["numeric"], 1, axis=0)
    numbers = fraction * own + (1 - fraction) * other
    numbers = np.where(np.isnan(own), other, np.where(np.isnan(other), own, numbers))
    np.testing.assert_allclose(got["numeric"], numbers, atol=1e-4)
    assert np.isnan(own).any()
    larger = inputs["category"] if fraction >= 0.5 else np.roll(inputs["category"], 1, axis=0)
    np.testing.assert_array_equal(got["category"], larger)
    weights = fraction * weight + (1 - fraction) * np.roll(weight, 1, axis=0)
    labels = fraction * weight * y + (1 - fraction) * np.roll(weight * y, 1, axis=0)
    np.testing.assert_allclose(got_weight, weights, rtol=1e-4)
    np.testing.assert_allclose(got_y, labels / weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_pastes_one_box_and_shares_by_the_area_outside_it(seed):
    inputs, y, weight = batch(seed=seed)
    got, got_y, got_weight = step(inputs, y, np.ones_like(weight), CUTMIX, seed)
    own, other = inputs["image"], np.roll(inputs["image"], 1, axis=0)
    inside = (got["image"] == other).all(axis=(0, 3))
    np.testing.assert_array_equal(got["image"], np.where(inside[:, :, None], other, own))
    high, wide = inside.any(axis=1), inside.any(axis=0)
    np.testing.assert_array_equal(inside, np.outer(high, wide))
    for side in (high, wide):
        assert np.abs(np.diff(side.astype(int))).sum() <= 2
    fraction = 1 - inside.mean()
    np.testing.assert_allclose(
        got_y, fraction * y + (1 - fraction) * np.roll(y, 1, axis=0), atol=1e-6
    )
    np.testing.assert_allclose(got_weight, np.ones_like(weight), rtol=1e-6)
    larger = inputs["category"] if fraction >= 0.5 else np.roll(inputs["category"], 1, axis=0)
    np.testing.assert_array_equal(got["category"], larger)


def test_boxes_that_no_edge_clips_have_the_area_of_the_paper():
    areas, cut = [], []
    image = np.zeros((2, 64, 64, 3), np.float32)
    image[1] = 255
    seed = keras.random.SeedGenerator(0)
    one = np.ones((2, 1), np.float32)
    make = tf.function(lambda: mix_rows({"image": tf.constant(image)}, one, one, CUTMIX, seed)[0])
    for _ in range(1500):
        inside = np.asarray(make()["image"])[0, :, :, 0] > 0
        edge = inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any()
        areas.append(inside.mean())
        cut.append(edge)
    whole = np.array(areas)[~np.array(cut)]
    assert len(whole) > 180
    # A box of area a is inside with probability (1 - √a)², and a is uniform like Beta(1, 1). So √a
    # has the density 12 √a (1 - √a)², that of Beta(2, 3).
    sides = np.sqrt(whole)
    assert sides.mean() == pytest.approx(0.4, abs=0.03)
    assert (
        stats.kstest(
            sides + np.random.default_rng(0).uniform(-1, 1, len(sides)) / 128, stats.beta(2, 3).cdf
        ).pvalue
        > 0.001
    )


@pytest.mark.parametrize("spec", [MIXUP, CUTMIX, BOTH])
def test_the_loss_of_mixed_rows_is_the_mixed_loss_of_both(spec):
    inputs, y, weight = batch()
    p = np.random.default_rng(1).uniform(0.05, 0.95, y.shape)
    for seed in range(4):
        got, got_y, got_weight = step(inputs, y, weight, spec, seed)
        # The mixed label of a row with label 1 after one with label 0, with equal weights.
        probe_y = np.array([[1.0], [0.0]] * 3, np.float32)
        _, mixed_y, _ = step(inputs, probe_y, np.ones_like(y), spec, seed)
        fraction = float(mixed_y[0, 0])
        for kind in ("binary_crossentropy", "focal"):
            loss = make_loss(LossSpec(loss=kind))
            own = float(loss(y, p, weight))
            other = float(loss(np.roll(y, 1, axis=0), p, np.roll(weight, 1, axis=0)))
            expected = fraction * own + (1 - fraction) * other
            assert float(loss(got_y, p, got_weight)) == pytest.approx(expected, rel=1e-5)
        assert got["image"].dtype == np.float32


def test_each_step_uses_mixup_or_cutmix_with_equal_probability():
    inputs, y, weight = batch()
    seed = keras.random.SeedGenerator(0)
    make = tf.function(lambda: mix_rows(inputs, y, weight, BOTH, seed)[0]["image"])
    own = inputs["image"].astype(np.float32)
    other = np.roll(own, 1, axis=0)
    boxes = 0
    for _ in range(200):
        got = np.asarray(make())
        boxes += bool(((got == own) | (got == other)).all())
    assert 70 < boxes < 130


def test_without_alphas_nothing_is_mixed():
    inputs, y, weight = batch()
    seed = keras.random.SeedGenerator(0)
    before = np.array(seed.state)
    got = mix_rows(inputs, y, weight, LossSpec(), seed)
    assert got[0] is inputs
    assert got[1] is y
    assert got[2] is weight
    np.testing.assert_array_equal(seed.state, before)


def test_a_missing_image_is_not_mixed_in():
    inputs, y = rows_with_all_inputs()
    y, weight = y[:, None].astype(np.float32), np.ones((16, 1), np.float32)
    for spec in (MIXUP, CUTMIX):
        for seed in range(4):
            mask = inputs["image_mask"]
            # Pixels of a missing image would be visible in any mixture.
            image = np.where(mask[:, :, None, None, None] > 0, inputs["image"].astype(float), 1e9)
            got, _, _ = step({**inputs, "image": image.astype(np.float32)}, y, weight, spec, seed)
            there = got["image_mask"] > 0
            assert got["image"].shape == image.shape
            assert got["image"][there].max() <= 255
            own = (got["image_mask"] == mask).all()
            assert own or (got["image_mask"] == np.roll(mask, 1, axis=0)).all()


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
    inputs.pop("image")
    got, _, _ = step(inputs, y, weight, MIXUP, 0)
    assert set(got) == {"numeric", "category"}
    with pytest.raises(
        ValueError,
        match=r"cutmix_alpha=1 needs images, but the model takes \['numeric', 'category'\]",
    ):
        step(inputs, y, weight, CUTMIX, 0)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_shares_are_drawn_from_the_beta_distribution(alpha):
    uniform = keras.random.uniform((20_000,), seed=keras.random.SeedGenerator(3))
    got = np.asarray(beta_quantile(uniform, alpha))
    # Float32 resolves small differences near 0 but not near 1; the distribution is symmetric.
    low = got[got < 0.5]
    assert len(low) / len(got) == pytest.approx(0.5, abs=0.02)
    assert stats.kstest(low, lambda x: 2 * stats.beta(alpha, alpha).cdf(x)).pvalue > 0.01
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

    for _ in range(3):
        for got, got_y, got_weight in compiled(inputs, y, weight):
            assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in inputs.items()}
            assert np.isfinite(got_y).all()
            np.testing.assert_allclose(got_weight, weight, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_features_are_mixed_like_images_view_by_view(seed):
    inputs, y, weight = batch(seed=seed)
    pixels = inputs["image"].astype(np.float32)
    inputs["features"] = inputs.pop("image").reshape(6, 10, -1).astype(np.float32)
    got, _, _ = step(inputs, y, weight, MIXUP, seed)
    as_images, _, _ = step({"image": pixels}, y, weight, MIXUP, seed)
    np.testing.assert_array_equal(got["features"], as_images["image"].reshape(6, 10, -1))
    assert (got["features"] != inputs["features"]).any()


def test_features_of_a_missing_image_are_not_mixed_in():
    inputs, y = rows_with_all_inputs()
    y, weight = y[:, None].astype(np.float32), np.ones((16, 1), np.float32)
    mask = inputs["image_mask"]
    features = np.random.default_rng(0).random((*mask.shape, 2, 5)).astype(np.float32)
    features[mask == 0] = 1e9
    for seed in range(4):
        got, _, _ = step({"features": features, "image_mask": mask}, y, weight, MIXUP, seed)
        assert got["features"].shape == features.shape
        assert got["features"][got["image_mask"] > 0].max() <= 1


def test_cutmix_on_features_is_rejected():
    inputs, y, weight = batch()
    inputs["features"] = inputs.pop("image").reshape(6, 10, -1)
    with pytest.raises(
        ValueError, match=r"cutmix_alpha=1 needs images, but .*'features'\]; set it to 0"
    ):
        step(inputs, y, weight, CUTMIX, 0)
