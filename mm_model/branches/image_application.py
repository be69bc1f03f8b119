"""Image branches from `keras.applications`, under top layers of our own.

Every kind takes pixels 0-255: EfficientNet, MobileNetV3 and ConvNeXt bring their own
preprocessing; ResNet50 gets the one that it was trained with.
"""

import tempfile
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import keras
import numpy as np
from keras import KerasTensor, layers

from mm_model.layers.blocks import Blocks, RowDropout, SynchronizedBatchNormalization, register
from mm_model.spec import ImageSpec

APPLICATIONS = {
    **{f"efficientnet_b{n}": f"EfficientNetB{n}" for n in range(8)},
    **{f"efficientnet_v2_b{n}": f"EfficientNetV2B{n}" for n in range(4)},
    **{f"efficientnet_v2_{size}": f"EfficientNetV2{size.upper()}" for size in ("s", "m", "l")},
    **{f"mobilenet_v3_{size}": f"MobileNetV3{size.title()}" for size in ("small", "large")},
    **{
        f"convnext_{size}": f"ConvNeXt{'XLarge' if size == 'xlarge' else size.title()}"
        for size in ("tiny", "small", "base", "large", "xlarge")
    },
    "resnet50": "ResNet50",
}

# Deviation of ImageNet's channels, as the EfficientNet files of keras.applications hold it.
_EFFICIENTNET_FILE_VARIANCE = np.asarray([0.229, 0.224, 0.225], np.float32)


def build(image_BHWC: KerasTensor, kind: str, spec: ImageSpec, blocks: Blocks) -> dict:
    """Return pooled features and tokens of pixels 0-255.

    Raises:
        OSError: if the backbone's weights cannot be had; the text names the other ways.
    """
    backbone = make_backbone(kind, image_BHWC.shape[1:], spec.weights, blocks.synchronized)
    backbone.trainable = spec.trainable
    x = CaffePixels(name="image_range")(image_BHWC) if kind == "resnet50" else image_BHWC
    x = backbone(x)
    pooled_BF = layers.GlobalAveragePooling2D(name="image_pool")(x)
    tokens_BTF = layers.Reshape((-1, x.shape[-1]), name="image_tokens")(x)
    return {"pooled": top(pooled_BF, kind, spec, blocks), "tokens": tokens_BTF}


def top(pooled_BF: KerasTensor, kind: str, spec: ImageSpec, blocks: Blocks) -> KerasTensor:
    """Return the branch's features of what its backbone gave."""
    del kind
    pooled_BF = RowDropout(blocks.dropout, name="image_dropout")(pooled_BF)
    return blocks.dense(pooled_BF, spec.units, "image_top")


@register
class CaffePixels(layers.Layer):
    """RGB 0-255 to BGR around ImageNet's mean, as ResNet50's weights were trained."""

    def call(self, image_BHWC):
        """Reorder and centre."""
        return keras.applications.resnet.preprocess_input(image_BHWC)

    def compute_output_shape(self, input_shape):
        """Return the shape unchanged."""
        return input_shape


def make_backbone(
    kind: str, shape: tuple[int, int, int], weights: str | None, synchronized: bool
) -> keras.Model:
    """Return a backbone without its classifier.

    Args:
        kind: a key of `APPLICATIONS`.
        shape: height, width, channels.
        weights: `imagenet`, the path or URI of a `.weights.h5` file, or None.
        synchronized: whether its batch norms take statistics of the global batch.

    Raises:
        OSError: if the weights cannot be downloaded, found or read.
    """
    application = getattr(keras.applications, APPLICATIONS[kind])
    from_keras = weights if weights == "imagenet" else None
    try:
        backbone = application(include_top=False, weights=from_keras, input_shape=shape)
    except Exception as error:
        if from_keras is None:
            raise ValueError(f"{kind} cannot take images of shape {shape}: {error}") from error
        raise OSError(
            f"the ImageNet weights of {kind} could not be downloaded ({error}); set "
            "model.image.weights to a file that you have, or to none"
        ) from error
    # Named afterwards: some applications look up by name what they are to build.
    backbone.name = kind
    if weights and weights != "imagenet":
        load_backbone_weights(backbone, kind, weights)
    _give_layers_of_ours(backbone, synchronized)
    return backbone


def load_backbone_weights(backbone: keras.Model, kind: str, weights: str) -> None:
    """Load a local or remote `.weights.h5` or `.h5` file into a backbone.

    Raises:
        OSError: if the file cannot be fetched or does not fit; the text names the other ways.
    """
    others = "set model.image.weights to another file, to imagenet, or to none"
    try:
        with tempfile.TemporaryDirectory() as folder:
            backbone.load_weights(_local_file(weights, folder))
    except (OSError, ValueError, KeyError) as error:
        raise OSError(
            f"weights {weights!r} of {kind} could not be read ({error}); {others}"
        ) from error
    if kind.startswith("efficientnet_b"):
        _fold_imagenet_scale(backbone)


def _local_file(weights: str, folder: str) -> str:
    scheme = urlsplit(weights).scheme
    if scheme in ("http", "https"):
        # Keras would take a file of the same name from elsewhere for this one.
        name = f"{sha256(weights.encode()).hexdigest()[:16]}-{Path(urlsplit(weights).path).name}"
        return keras.utils.get_file(name, origin=weights)
    if not scheme or Path(weights).exists():
        if not Path(weights).is_file():
            raise FileNotFoundError(f"no file {weights}")
        return weights
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(weights)
    local = Path(folder) / Path(path).name
    fs.copy_files(path, str(local), source_filesystem=filesystem)
    return str(local)


def _fold_imagenet_scale(backbone: keras.Model) -> None:
    # keras.applications' EfficientNet files hold the deviation where a variance belongs, and
    # weights="imagenet" adds a layer that makes up for it; a file loaded by path gets no such
    # layer, so its variance is mended instead.
    normalization = next(x for x in backbone.layers if isinstance(x, layers.Normalization))
    variance = np.asarray(normalization.adapt_variance)
    if variance.shape == (3,) and np.allclose(variance, _EFFICIENTNET_FILE_VARIANCE, atol=1e-3):
        normalization.adapt_variance.assign(variance**2)
        normalization.finalize_state()


def _give_layers_of_ours(backbone: keras.Model, synchronized: bool) -> None:
    """Let a backbone's dropout draw by rows, and its batch norms take the statistics asked for.

    In place: a clone would cost as long as the backbone did, and its weights once more.
    """
    for layer in backbone.layers:
        if synchronized and type(layer) is layers.BatchNormalization:
            layer.__class__ = SynchronizedBatchNormalization
            layer.synchronized = True
        elif type(layer) is layers.Dropout:
            layer.__class__ = RowDropout
