from collections.abc import Callable
from functools import cache

import keras
import numpy as np
import pytest

import mm_model
from mm_model.branches.image_application import CaffePixels, make_backbone
from mm_model.layers.dropout import RowDropout
from tests.mm_model.examples import SMALLEST_OF_EACH_FAMILY


@pytest.fixture(scope="module")
def built() -> Callable[[str], mm_model.FusionModel]:
    """A function that builds one model per kind on its first call; tests must not change it."""

    @cache
    def of(kind: str) -> mm_model.FusionModel:
        return mm_model.create_model((32, 32, 3), (3,), image={"kind": kind, "weights": None})

    return of


def backbone_of(model: mm_model.FusionModel) -> keras.Model:
    return model.network.get_layer(model.backbone[0])


@pytest.mark.parametrize("kind", [k for k in SMALLEST_OF_EACH_FAMILY if k != "tiny"])
def test_every_backbone_gets_the_pixel_range_of_its_training(kind, built):
    """The input of the first convolution for black and white, as in the paper of each family."""
    model = built(kind)
    backbone = backbone_of(model)
    first = next(
        x
        for x in backbone.layers
        if isinstance(x, keras.layers.Conv2D | keras.layers.DepthwiseConv2D)
    )
    # ConvNeXt's first convolution is inside a block, directly after its preprocessing.
    probe = backbone.layers[1].output if kind == "convnext_tiny" else first.input
    seen = keras.Model(backbone.input, probe)
    pixels = np.stack([np.zeros((32, 32, 3)), np.full((32, 32, 3), 255)]).astype("float32")
    if kind == "resnet50":
        pixels = np.asarray(model.network.get_layer("image_range")(pixels))
    inner = np.asarray(seen(pixels))[:, 10:20, 10:20]
    low, high = inner[0].mean((0, 1)), inner[1].mean((0, 1))
    expected = {
        "efficientnet_b0": ([0] * 3, [1] * 3),
        "efficientnet_v2_b0": (
            -np.divide([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            np.divide(np.subtract(1, [0.485, 0.456, 0.406]), [0.229, 0.224, 0.225]),
        ),
        "mobilenet_v3_small": ([-1] * 3, [1] * 3),
        "convnext_tiny": (
            -np.divide([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            np.divide(np.subtract(1, [0.485, 0.456, 0.406]), [0.229, 0.224, 0.225]),
        ),
        "resnet50": ([-103.939, -116.779, -123.68], [151.061, 138.221, 131.32]),
    }[kind]
    np.testing.assert_allclose(low, expected[0], atol=1e-2)
    np.testing.assert_allclose(high, expected[1], atol=1e-2)


def test_the_preprocessing_of_resnet_loads_in_safe_mode(tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 3)), CaffePixels(name="image_range")])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert isinstance(again.get_layer("image_range"), CaffePixels)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype("float32")
    np.testing.assert_array_equal(again(pixels), model(pixels))


def test_an_efficientnet_file_gets_the_scale_of_imagenet_weights_and_row_dropout(tmp_path, built):
    theirs = keras.applications.EfficientNetB0(
        include_top=False, weights=None, input_shape=(32, 32, 3)
    )
    normalization = next(x for x in theirs.layers if isinstance(x, keras.layers.Normalization))
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    normalization.adapt_mean.assign(mean)
    normalization.adapt_variance.assign(deviation)  # as stored in the files of keras.applications
    path = tmp_path / "b0.weights.h5"
    theirs.save_weights(path)
    normalization.adapt_variance.assign(np.square(deviation, dtype=np.float32))
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
    np.testing.assert_allclose(seen[0, 0, 0], np.divide(np.subtract(1, mean), deviation), rtol=1e-4)
    np.testing.assert_array_equal(loaded(image), expected)
    for ours, synchronized in ((loaded, True), (backbone_of(built("efficientnet_b0")), False)):
        for our, their in zip(ours.layers, theirs.layers, strict=True):
            assert isinstance(our, type(their))
        by_rows = [x for x in ours.layers if isinstance(x, RowDropout)]
        assert [x.name for x in by_rows] == dropped
        assert all(x.noise_shape == (None, 1, 1, 1) for x in by_rows)
        norms = [x for x in ours.layers if isinstance(x, keras.layers.BatchNormalization)]
        assert all(norm.synchronized == synchronized for norm in norms)


def test_weights_are_loaded_from_a_file(tmp_path, built):
    first = backbone_of(built("mobilenet_v3_small"))
    first.save_weights(tmp_path / "w.weights.h5")
    for synchronized in (False, True):
        again = make_backbone(
            "mobilenet_v3_small", (32, 32, 3), str(tmp_path / "w.weights.h5"), synchronized
        )
        for a, b in zip(first.get_weights(), again.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    norms = [x for x in again.layers if isinstance(x, keras.layers.BatchNormalization)]
    assert norms
    assert all(norm.synchronized for norm in norms)


def test_a_failed_download_suggests_alternatives(monkeypatch):
    def offline(**_):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.applications, "EfficientNetB0", offline)
    with pytest.raises(
        OSError, match=r"could not download the ImageNet weights.*to a local file or to none"
    ):
        make_backbone("efficientnet_b0", (32, 32, 3), "imagenet", synchronized=False)


def test_a_missing_weights_file_suggests_alternatives():
    with pytest.raises(OSError, match=r"nowhere\.h5 does not exist.*imagenet, or to none"):
        make_backbone("mobilenet_v3_small", (32, 32, 3), "nowhere.h5", synchronized=False)


@pytest.mark.parametrize("kind", SMALLEST_OF_EACH_FAMILY)
def test_every_random_layer_of_a_model_draws_per_row(kind, built):
    layers = [x for x in built(kind)._flatten_layers() if not isinstance(x, keras.Model)]
    random = [x for x in layers if any("seed_generator" in v.path for v in x.variables)]
    assert {type(x).__module__.split(".")[0] for x in random} == {"mm_model"}
