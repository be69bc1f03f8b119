from collections.abc import Callable
from functools import cache

import keras
import numpy as np
import pytest

import mm_model
from mm_model.backbones import HUB_IMAGES
from mm_model.backbones.image_backbone import make_backbone
from mm_model.layers.dropout import RowDropout
from mm_model.model import build_model
from mm_model.spec import ImageSpec, ModelSpec
from tests.mm_model.examples import SMALLEST_OF_EACH_FAMILY

MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Of ImageNet's channels."""
KERAS_FAMILIES = [kind for kind in SMALLEST_OF_EACH_FAMILY if kind not in HUB_IMAGES]


@pytest.fixture(scope="module")
def built() -> Callable[[str], mm_model.FusionModel]:
    """A function that builds one model per kind on its first call; tests must not change it."""

    @cache
    def of(kind: str) -> mm_model.FusionModel:
        spec = ModelSpec(image=ImageSpec(kind=kind, weights=None))
        return build_model(spec, None, (32, 32, 3), (3,))

    return of


def backbone_of(model: mm_model.FusionModel) -> keras.Model:
    return model.network.get_layer(model.backbone[0])


@pytest.mark.parametrize("kind", [k for k in KERAS_FAMILIES if k != "tiny"])
def test_every_backbone_gets_the_pixel_range_of_its_training(kind, built):
    """The input of the first convolution for black and white, as in the paper of each family."""
    backbone = backbone_of(built(kind))
    convolutions = keras.layers.Conv2D | keras.layers.DepthwiseConv2D
    first = next(x for x in backbone.layers if isinstance(x, convolutions))
    # ConvNeXt's first convolution is inside a block, directly after its preprocessing.
    probe = backbone.layers[1].output if kind == "convnext_tiny" else first.input
    pixels = np.stack([np.zeros((32, 32, 3)), np.full((32, 32, 3), 255)]).astype("float32")
    if kind == "resnet50":
        pixels = np.asarray(built(kind).network.get_layer("image_range")(pixels))
    seen = np.asarray(keras.Model(backbone.input, probe)(pixels))
    expected = {
        "efficientnet_b0": [[0] * 3, [1] * 3],
        "mobilenet_v3_small": [[-1] * 3, [1] * 3],
        "efficientnet_lite0": [[-127 / 128] * 3, [1] * 3],
        "resnet50": [[-103.939, -116.779, -123.68], [151.061, 138.221, 131.32]],
    }.get(kind, np.divide(np.subtract([[0], [1]], MEAN), DEVIATION))
    np.testing.assert_allclose(seen[:, 10:20, 10:20].mean((1, 2)), expected, atol=1e-2)


def test_an_efficientnet_file_gets_the_scale_of_imagenet_weights_and_row_dropout(tmp_path, built):
    theirs = keras.applications.EfficientNetB0(
        include_top=False, weights=None, input_shape=(32, 32, 3)
    )
    normalization = next(x for x in theirs.layers if isinstance(x, keras.layers.Normalization))
    normalization.adapt_mean.assign(MEAN)
    normalization.adapt_variance.assign(DEVIATION)  # as stored in the files of keras.applications
    path = tmp_path / "b0.weights.h5"
    theirs.save_weights(path)
    normalization.adapt_variance.assign(np.square(DEVIATION, dtype=np.float32))
    normalization.finalize_state()
    dropped = [x.name for x in theirs.layers if isinstance(x, keras.layers.Dropout)]
    assert dropped
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("float32")
    expected = np.asarray(theirs(image))
    assert expected.std() > 0
    loaded = make_backbone("efficientnet_b0", (32, 32, 3), path.as_uri(), synchronized=True)
    assert loaded.name == "efficientnet_b0"
    inside = next(x for x in loaded.layers if isinstance(x, keras.layers.Normalization))
    seen = np.asarray(keras.Model(loaded.input, inside.output)(np.full((1, 32, 32, 3), 255.0)))
    np.testing.assert_allclose(seen[0, 0, 0], np.divide(np.subtract(1, MEAN), DEVIATION), rtol=1e-4)
    np.testing.assert_array_equal(loaded(image), expected)
    names = [layer.name for layer in built("efficientnet_b0").backbone_layers()]
    # Without the statistics of the pixels, which are constants.
    assert (names[0], names[-1]) == ("stem_conv", "top_bn")
    for ours, synchronized in ((loaded, True), (backbone_of(built("efficientnet_b0")), False)):
        for our, their in zip(ours.layers, theirs.layers, strict=True):
            assert isinstance(our, type(their))
        by_rows = [x for x in ours.layers if isinstance(x, RowDropout)]
        assert [x.name for x in by_rows] == dropped
        assert all(x.noise_shape == (None, 1, 1, 1) for x in by_rows)
        norms = [x for x in ours.layers if isinstance(x, keras.layers.BatchNormalization)]
        assert all(norm.synchronized == synchronized for norm in norms)


def test_a_failed_download_suggests_alternatives(monkeypatch):
    def offline(**_):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.applications, "EfficientNetB0", offline)
    with pytest.raises(
        OSError, match=r"could not download the ImageNet weights.*to a local file or to none"
    ):
        make_backbone("efficientnet_b0", (32, 32, 3), "imagenet", synchronized=False)


def test_weights_are_loaded_from_a_local_file_and_a_missing_one_suggests_alternatives(
    tmp_path, built
):
    kind, path = "mobilenet_v3_small", str(tmp_path / "w.weights.h5")
    with pytest.raises(OSError, match=r"w\.weights\.h5 does not exist.*imagenet, or to none"):
        make_backbone(kind, (32, 32, 3), path, synchronized=False)
    first = backbone_of(built(kind))
    first.save_weights(path)
    again = make_backbone(kind, (32, 32, 3), path, synchronized=False)
    for a, b in zip(first.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KERAS_FAMILIES)
def test_every_random_layer_of_a_model_draws_per_row(kind, built):
    layers = [x for x in built(kind)._flatten_layers() if not isinstance(x, keras.Model)]
    random = [x for x in layers if any("seed_generator" in v.path for v in x.variables)]
    assert {type(x).__module__.split(".")[0] for x in random} == {"mm_model"}
