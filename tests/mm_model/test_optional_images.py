"""Rows without an image: no blank images, no NaN (autogluon#1207, U-HVED#7, BM-MAE#2)."""

from typing import Any

import keras
import numpy as np
import pytest

from mm_model import build_model, load_model
from mm_model.mixup import mix_rows
from mm_model.spec import ImageSpec, LossSpec, ModelSpec, NumericSpec
from mm_model.statistics import fit_numeric_statistics
from tests.mm_model.examples import with_random_heads

ROWS, COLUMNS, SIZE = 12, 3, 16


def make_model(num_images: int = 1, **options: Any) -> Any:
    numbers = np.random.default_rng(0).normal(size=(50, COLUMNS))
    spec = ModelSpec.model_validate(
        {
            "image": ImageSpec(kind="tiny", weights=None, units=8),
            "numeric": NumericSpec(units=(8,)),
            **options,
        }
    )
    keras.utils.set_random_seed(1)
    shape = (num_images, SIZE, SIZE, 3)
    model = build_model(spec, fit_numeric_statistics(numbers), shape, image_optional=True)
    return with_random_heads(model)


def make_inputs(num_images: int = 1) -> dict[str, np.ndarray]:
    """Every third row has no image."""
    rng = np.random.default_rng(2)
    mask = np.ones((ROWS, num_images), np.float32)
    mask[::3] = 0
    return {
        "image": rng.integers(0, 256, (ROWS, num_images, SIZE, SIZE, 3)).astype(np.float32),
        "image_mask": mask,
        "numeric": rng.normal(size=(ROWS, COLUMNS)).astype(np.float32),
    }


@pytest.mark.parametrize("num_images", [1, 3])
def test_a_row_without_an_image_is_predicted_as_if_dropout_hid_it(tmp_path, num_images):
    model, inputs = make_model(num_images), make_inputs(num_images)
    model.blend.set([0.5, 0.2, 0.3])
    without = inputs["image_mask"].max(axis=1) == 0
    image, numeric, joint = np.asarray(model.head_logits(inputs)).T
    np.testing.assert_array_equal(image[without], joint[without])
    assert (image[~without] != joint[~without]).all()
    expected = 1 / (1 + np.exp(-(0.5 * joint + 0.2 * numeric + 0.3 * joint)))
    probability = np.asarray(model(inputs))[:, 0]
    np.testing.assert_allclose(probability[without], expected[without], atol=1e-6)
    # The joint network gets zeros, as from modality dropout.
    network: Any = model.network
    pooled = keras.Model(network.input, network.get_layer("image_unfold").output[0])
    features = np.asarray(pooled(inputs))
    assert (features[without] == 0).all()
    assert (features[~without] != 0).any(axis=1).all()
    # The placeholder does not matter, and other rows do not either.
    other = inputs["image"].copy()
    other[without] = 255
    again = np.asarray(model({**inputs, "image": other}))[:, 0]
    np.testing.assert_array_equal(again, probability)
    model.save(tmp_path / "model.keras")
    loaded = np.asarray(load_model(tmp_path / "model.keras")(inputs))[:, 0]
    np.testing.assert_allclose(loaded, probability, atol=1e-6)


def test_the_image_head_learns_nothing_from_rows_without_an_image():
    import tensorflow as tf

    model, inputs = make_model(), make_inputs()
    model.compile(loss="binary_crossentropy")
    inputs["image_mask"][:] = 0
    y = np.arange(ROWS).reshape(-1, 1) % 2.0
    head = model.network.get_layer("image_head")
    joint = model.network.get_layer("joint_head")
    with tf.GradientTape() as tape:
        loss = model.compute_loss(inputs, y, model(inputs, training=True))
    variables = [head.kernel.value, head.bias.value, joint.kernel.value]
    kernel, bias, joint_kernel = tape.gradient(loss, variables)
    assert np.isfinite(float(loss))
    for gradient in (kernel, bias):
        assert gradient is None or not np.abs(gradient).max()
    assert np.abs(joint_kernel).max() > 0


def test_mixup_of_rows_without_an_image_takes_the_other_rows_image():
    inputs, y = make_inputs(), np.ones((ROWS, 1), np.float32)
    seed = keras.random.SeedGenerator(0)
    mixed, _, _ = mix_rows(inputs, y, y, LossSpec(mixup_alpha=1.0), seed)
    image, mask = np.asarray(mixed["image"]), np.asarray(mixed["image_mask"])
    present = inputs["image_mask"][:, 0] > 0
    neighbour = np.roll(present, 1)
    chosen = present if (mask[:, 0] == present).all() else neighbour
    np.testing.assert_array_equal(mask[:, 0], chosen)
    for only, source in (
        (present & ~neighbour, inputs["image"]),
        (neighbour & ~present, np.roll(inputs["image"], 1, axis=0)),
    ):
        assert only.any()
        np.testing.assert_array_equal(image[only], source[only])


@pytest.mark.parametrize(
    ("shape", "options"),
    [((1, SIZE, SIZE, 3), {"numeric": {"kind": "none"}}), ((SIZE, SIZE, 3), {})],
)
def test_rows_without_an_image_need_another_branch_and_a_mask(shape, options):
    spec = ModelSpec.model_validate(
        {"image": {"kind": "tiny", "weights": None}, **options},
    )
    with pytest.raises(ValueError, match="rows without an image need another branch"):
        build_model(spec, None, shape, (3,), image_optional=True)
