"""The model on features of a frozen backbone, and the backbone by itself."""

from typing import Any

import keras
import numpy as np
import pytest

import mm_model
from mm_model.branches import IMAGE_BRANCHES
from mm_model.fusion import TOKEN_FUSIONS
from mm_model.model import backbone_model, build_model
from mm_model.spec import FusionSpec, ImageSpec, ModelSpec, NumericSpec
from tests.mm_model.examples import COLOUR, rows_with_all_inputs, with_random_heads


def spec_of(kind: str = "tiny", fusion: str = "gated") -> ModelSpec:
    return ModelSpec(
        image=ImageSpec(kind=kind, weights=None, units=8, trainable=False),
        numeric=NumericSpec(units=(8,)),
        fusion=FusionSpec(kind=fusion, units=8),
    )


def weights_by_path(model: keras.Model) -> dict[str, keras.Variable]:
    return {v.path: v for v in model.weights}


def models_of(
    inputs: dict[str, np.ndarray], kind: str, fusion: str
) -> tuple[mm_model.FusionModel, mm_model.FusionModel]:
    """A full model and one on features, with equal weights above the backbone."""
    statistics = mm_model.fit_numeric_statistics(inputs["numeric"])
    spec = spec_of(kind, fusion)
    full = build_model(spec, statistics, inputs["image"].shape[1:], vocabularies=[COLOUR])
    shape = backbone_model(full, fusion in TOKEN_FUSIONS).output.shape[1:]
    several = inputs["image"].shape[1:-3]
    small = build_model(
        spec,
        statistics,
        None,
        vocabularies=[COLOUR],
        shape_features=(*several, 1, *shape),
    )
    above = weights_by_path(full)
    for layer in full.backbone_layers():
        for variable in layer.variables:
            above.pop(variable.path, None)
    mine = weights_by_path(with_random_heads(small))
    # The paths are equal for all weights above the backbone, and only for these.
    assert mine.keys() == above.keys()
    for path, variable in mine.items():
        above[path].assign(variable)
    return full, small


def fit_batch_norms(model: mm_model.FusionModel, image: np.ndarray) -> None:
    """Fit the batch norms of an untrained backbone, so that images have different features."""
    norms: list[Any] = [x for x in model.backbone_layers() if hasattr(x, "moving_mean")]
    for norm in norms:
        norm.trainable, norm.momentum = True, 0.0
    backbone_model(model)(image.reshape(-1, *image.shape[-3:]), training=True)
    for norm in norms:
        norm.trainable = False


def features_of(full: mm_model.FusionModel, image: np.ndarray, fusion: str) -> np.ndarray:
    """Features (…, 1, F) or (…, 1, 1 + T, F) of unaugmented images (…, H, W, 3)."""
    backbone = backbone_model(full, fusion in TOKEN_FUSIONS)
    features = np.array(backbone(image.reshape(-1, *image.shape[-3:])))
    return features.reshape(*image.shape[:-3], 1, *features.shape[1:])


@pytest.mark.parametrize(
    ("kind", "size", "fusion"),
    [
        ("tiny", 16, "gated"),
        ("tiny", 16, "cross_attention"),
        ("mobilenet_v3_small", 32, "gated"),
        ("vit_tiny", 32, "cross_attention"),
    ],
)
@pytest.mark.parametrize("num_images", [1, 3])
def test_a_model_on_features_predicts_what_the_full_model_predicts_for_the_images(
    kind, size, fusion, num_images
):
    inputs, _ = rows_with_all_inputs(num_images=num_images, size=size)
    if num_images == 1:
        inputs = {**inputs, "image": inputs["image"][:, 0]}
        del inputs["image_mask"]
    full, small = models_of(inputs, kind, fusion)
    fit_batch_norms(full, inputs["image"])
    features = features_of(full, inputs["image"], fusion)
    assert features.std(axis=0).max() > 0.1
    mask = inputs.get("image_mask")
    if mask is not None:
        assert (mask == 0).any()
        features[mask == 0] = 1e6  # Missing features have no effect.
    given = {**inputs, "features": features}
    del given["image"]
    assert small.input_names == ["features", *full.input_names[1:]]
    expected = np.asarray(full(inputs))
    other = np.asarray(full({**inputs, "image": 255 - inputs["image"]}))
    assert np.abs(other - expected).max() > 0.01
    np.testing.assert_allclose(np.asarray(small(given)), expected, atol=1e-5)
    if mask is not None:
        # Without a mask, the features of all images are present.
        given["image_mask"] = np.ones_like(mask)
    by_place = [features, inputs["numeric"], inputs["category"]]
    np.testing.assert_array_equal(np.asarray(small(by_place)), np.asarray(small(given)))


@pytest.mark.parametrize(("kind", "size"), [("tiny", 16), ("mobilenet_v3_small", 32)])
def test_a_frozen_backbone_augments_and_keeps_its_statistics(kind, size):
    inputs, _ = rows_with_all_inputs(count=4, num_images=1, size=size)
    image = inputs["image"][:, 0]
    model = build_model(spec_of(kind), None, (size, size, 3), (3,))
    fit_batch_norms(model, image)
    backbone = backbone_model(model)
    before = {path: np.array(v) for path, v in weights_by_path(backbone).items()}
    plain = np.asarray(backbone(image, training=False))
    expected = keras.Model(
        model.network.input["image"], model.network.get_layer("image_pool").output
    )(image)
    np.testing.assert_array_equal(plain, expected)
    augmented = [np.asarray(backbone(image, training=True)) for _ in range(2)]
    for a, b in ((plain, augmented[0]), (plain, augmented[1]), augmented):
        assert (np.abs(a - b).max(axis=1) > 1e-2).all()
    for path, v in weights_by_path(backbone).items():
        np.testing.assert_array_equal(before[path], v, err_msg=path)
    assert any("moving_mean" in path for path in before)


def test_a_missing_backbone_is_rejected(monkeypatch):
    without = ModelSpec(image=ImageSpec(kind="none", weights=None))
    with pytest.raises(
        ValueError, match=r"a model with inputs \['numeric'\] has no image backbone"
    ):
        backbone_model(build_model(without, None, None, (3,)))

    def mine(image, spec, blocks):
        pooled = keras.layers.GlobalMaxPooling2D()(image)
        return {"pooled": pooled, "tokens": keras.layers.Reshape((1, -1))(pooled)}

    monkeypatch.setitem(IMAGE_BRANCHES, "mine", mine)
    spec = spec_of("mine")
    with pytest.raises(ValueError, match="has no layer 'image_pool'"):
        backbone_model(build_model(spec, None, (16, 16, 3), (3,)))
    with pytest.raises(ValueError, match=r"'mine' cannot be built on features; .* IMAGE_TOPS"):
        build_model(spec, None, None, (3,), shape_features=(1, 8))


@pytest.mark.parametrize("shape", [(8,), (1, 2, 3, 4), (0, 8), None])
def test_features_of_an_invalid_shape_are_rejected(shape):
    features = r"features shape .* invalid; pass \(views, width\)"
    with pytest.raises(ValueError, match=features if shape else r"image shape \(\) is invalid"):
        build_model(spec_of(), None, None, (3,), shape_features=shape)
