import keras
import numpy as np
import pytest
from scipy.special import expit

import mm_model
from mm_model.branches import IMAGE_BRANCHES
from mm_model.fusion import FUSIONS
from mm_model.layers.blocks import BlockBuilder
from mm_model.model import build_model
from mm_model.spec import ImageSpec, ModelSpec
from tests.mm_model.examples import NO_RANDOMNESS, UNTRAINED, rows, with_random_heads


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_backbone_is_efficientnet_b5_which_trains_on_plain_arrays():
    image, numbers, y = rows(16, size=32)
    statistics = mm_model.fit_numeric_statistics(numbers)
    model = mm_model.create_model((32, 32, 3), (3,), statistics, image={"weights": None})
    assert model.network.get_layer("efficientnet_b5").count_params() > 28_000_000
    history = model.fit([image, numbers], y, epochs=1, batch_size=8, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert model.predict([image, numbers], verbose=0).shape == (16, 1)


def test_a_model_has_no_layers_for_inputs_that_it_lacks():
    statistics = mm_model.fit_numeric_statistics(rows()[1])
    model = build_model(ModelSpec.model_validate(NO_RANDOMNESS), statistics, (16, 16, 3))
    names = {layer.name for layer in model.network.layers}
    assert {"image", "image_range", "image_pool", "numeric", "numeric_encoding", "heads"} <= names
    unneeded = ("mask", "fold", "view", "augment", "category", "numeric_concat", "modality")
    assert [name for name in names if any(word in name for word in unneeded)] == []


def test_all_blocks_have_the_activation_of_the_spec():
    spec = ModelSpec(image=ImageSpec(kind="tiny", weights=None), activation="silu")
    model = build_model(spec, mm_model.fit_numeric_statistics(rows()[1]), (16, 16, 3))
    own = [n for n in model.network.layers if n.name.endswith("_activation")]
    assert {"image_conv0_activation", "numeric_0_activation"} <= {n.name for n in own}
    assert {n.activation for n in own} == {keras.activations.silu}


def test_a_custom_branch_and_fusion_need_only_an_entry_in_the_registries(monkeypatch):
    def mean_colour(image, spec, blocks: BlockBuilder):
        pooled = keras.layers.GlobalAveragePooling2D()(image)
        return {"pooled": pooled, "tokens": keras.layers.Reshape((1, 3))(pooled)}

    def add(branches, hide, spec, blocks: BlockBuilder):
        pooled = hide([branch["pooled"] for branch in branches.values()])
        return keras.layers.Add()([blocks.linear(x, 4, f"add_{i}") for i, x in enumerate(pooled)])

    monkeypatch.setitem(IMAGE_BRANCHES, "mean_colour", mean_colour)
    monkeypatch.setitem(FUSIONS, "add", add)
    model = mm_model.create_model(
        (16, 16, 3), (3,), image={"kind": "mean_colour", "weights": None}, fusion={"kind": "add"}
    )
    image, numbers, _ = rows()
    assert np.asarray(model([image, np.nan_to_num(numbers)])).shape == (16, 1)


def test_the_probability_is_that_of_the_calibrated_blend_which_gradients_do_not_change():
    image, numbers, _ = rows()
    statistics = mm_model.fit_numeric_statistics(numbers)
    model = with_random_heads(mm_model.create_model((16, 16, 3), (3,), statistics, **NO_RANDOMNESS))
    logits = np.asarray(model.head_logits([image, numbers])) / 10
    for blend, scale, bias in (([1 / 3] * 3, 1.0, 0.0), ([0.5, 0.0, 0.5], 2.0, -0.3)):
        np.testing.assert_allclose(model.blend.weights_M(), blend, rtol=1e-6)
        expected = expit(scale * (logits @ blend) + bias)
        model.calibration.set([scale / 10], bias)
        got = np.asarray(model([image, numbers]))[:, 0]
        np.testing.assert_allclose(got, expected, rtol=1e-4)
        model.blend.set([0.5, 0.0, 0.5])
    assert model.blend.trainable_variables == model.calibration.trainable_variables == []


@pytest.mark.parametrize(
    ("shape_image", "shape_numeric", "message"),
    [
        ((16, 16), (3,), r"image shape \(16, 16\) is invalid; pass \(height, width, 3\)"),
        ((2, 16, 16, 1), (3,), r"\(2, 16, 16, 1\) .* or \(images, height, width, 3\)"),
        ((0, 16, 16, 3), (3,), r"shape \(0, 16, 16, 3\) is invalid"),
        ((16, 16, 3), (), r"numeric shape \(\) is invalid; pass \(columns,\)"),
        ((16, 16, 3), (4,), r"numeric shape \(4,\) does not match .* columns in the statistics, 3"),
    ],
)
def test_an_invalid_shape_is_rejected_with_its_value(shape_image, shape_numeric, message):
    statistics = mm_model.fit_numeric_statistics(rows()[1])
    with pytest.raises(ValueError, match=message):
        mm_model.create_model(shape_image, shape_numeric, statistics, **UNTRAINED)


@pytest.mark.parametrize("shape", [None, (0,)])
def test_a_numeric_branch_without_inputs_is_rejected(shape):
    with pytest.raises(
        ValueError, match=r"neither numbers nor categories.*model\.numeric\.kind=none"
    ):
        build_model(ModelSpec.model_validate(UNTRAINED), None, (16, 16, 3), shape)


def test_an_unknown_option_suggests_the_nearest_one():
    with pytest.raises(ValueError, match=r"unknown image branch 'tiney'; did you mean 'tiny'"):
        mm_model.create_model((16, 16, 3), (3,), image={"kind": "tiney", "weights": None})


def test_a_file_that_contains_code_or_another_model_is_rejected(tmp_path):
    inputs = keras.Input((1,))
    lambdas, dense = keras.layers.Lambda(lambda x: x + 1), keras.layers.Dense(1)
    for layer, message in ((lambdas, "lambda"), (dense, "a Functional, not a FusionModel")):
        keras.Model(inputs, layer(inputs)).save(tmp_path / "other.keras")
        with pytest.raises(ValueError, match=message):
            mm_model.load_model(tmp_path / "other.keras")


@pytest.mark.parametrize("count", [2, 4, 8])
def test_inference_averages_the_logits_of_different_views(count, tmp_path):
    options = {"kind": "tiny", "weights": None, "inference_views": count}
    model = with_random_heads(mm_model.create_model((16, 16, 3), (3,), image=options))
    image, numbers, _ = rows(4)
    numbers = np.nan_to_num(numbers)
    turned = [np.rot90(image, k, axes=(1, 2)) for k in range(0, 4, 1 if count == 8 else 2)]
    views = [view for x in turned[: max(count // 2, 1)] for view in (x, x[:, :, ::-1])][:count]
    network = [np.asarray(model.network({"image": x, "numeric": numbers})) for x in views]
    assert len({x.tobytes() for x in network}) == count
    expected = np.mean(network, axis=0)
    np.testing.assert_allclose(model.head_logits([image, numbers]), expected, atol=1e-5)
    in_training = model.head_logits([image, numbers], training=True)
    assert np.abs(np.asarray(in_training) - expected).max() > 1e-3
    model.save(tmp_path / "model.keras")
    again = mm_model.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again([image, numbers]), model([image, numbers]))


def test_only_square_images_are_rotated():
    options = {"kind": "tiny", "weights": None, "inference_views": 8}
    with pytest.raises(ValueError, match=r"inference_views=8 rotates images, .* not square"):
        mm_model.create_model((16, 24, 3), (3,), image=options)
