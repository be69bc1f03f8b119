"""Image branches with a backbone of `keras.applications`.

Their input is pixels 0-255. EfficientNet, MobileNetV3 and ConvNeXt contain their preprocessing; for
ResNet50, this module adds the preprocessing that it was trained with.
"""

import tempfile
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import keras
from keras import KerasTensor, layers

from mm_model.branches import KERAS_APPLICATIONS
from mm_model.compat_keras import convert_layer, fold_imagenet_scale
from mm_model.layers.batch_norm import SynchronizedBatchNormalization
from mm_model.layers.blocks import BlockBuilder
from mm_model.layers.dropout import RowDropout
from mm_model.spec import ImageSpec


def build(image_BHWC: KerasTensor, spec: ImageSpec, blocks: BlockBuilder) -> dict:
    """Return pooled features and tokens, computed from pixels 0-255.

    Raises:
        OSError: If the backbone's weights cannot be downloaded, found or read.
    """
    synchronized = blocks.spec.batch_norm == "sync"
    backbone = make_backbone(spec.kind, image_BHWC.shape[1:], spec.weights, synchronized)
    backbone.trainable = spec.trainable
    x = CaffePixels(name="image_range")(image_BHWC) if spec.kind == "resnet50" else image_BHWC
    x = backbone(x)
    pooled_BF = layers.GlobalAveragePooling2D(name="image_pool")(x)
    tokens_BTF = layers.Reshape((-1, x.shape[-1]), name="image_tokens")(x)
    return {"pooled": top(pooled_BF, spec, blocks), "tokens": tokens_BTF}


def top(pooled_BF: KerasTensor, spec: ImageSpec, blocks: BlockBuilder) -> KerasTensor:
    """Return the branch's features, computed from its pooled backbone features."""
    pooled_BF = RowDropout(blocks.spec.dropout, name="image_dropout")(pooled_BF)
    return blocks.dense(pooled_BF, spec.units, "image_top")


@keras.saving.register_keras_serializable("mm_model")
class CaffePixels(layers.Layer):
    """Converts RGB 0-255 to BGR centred at ImageNet's mean, with which ResNet50 was trained."""

    def call(self, image_BHWC):
        """Reorder and centre the channels."""
        return keras.applications.resnet.preprocess_input(image_BHWC)


def make_backbone(
    kind: str, shape: tuple[int, int, int], weights: str | None, synchronized: bool
) -> keras.Model:
    """Return a backbone without its classifier.

    Args:
        kind: Key of `KERAS_APPLICATIONS`.
        shape: Height, width, channels.
        weights: `imagenet`, the path or URI of a `.weights.h5` file, or None.
        synchronized: Whether batch norms use statistics of the global batch.

    Raises:
        ValueError: If the backbone does not support images of this shape.
        OSError: If the weights cannot be downloaded, found or read.
    """
    application = getattr(keras.applications, KERAS_APPLICATIONS[kind])
    imagenet = "imagenet" if weights == "imagenet" else None
    try:
        backbone = application(include_top=False, weights=imagenet, input_shape=shape)
    except Exception as error:
        if imagenet is None:
            raise ValueError(
                f"model.image.kind={kind} does not support images of shape {shape}: {error}"
            ) from error
        raise OSError(
            f"could not download the ImageNet weights of {kind}: {error}; set "
            "model.image.weights to a local file or to none"
        ) from error
    # Not passed as `name`, because some applications look up their architecture by name.
    backbone.name = kind
    if weights and not imagenet:
        load_backbone_weights(backbone, kind, weights)
    for layer in backbone.layers:
        if synchronized and type(layer) is layers.BatchNormalization:
            convert_layer(layer, SynchronizedBatchNormalization)
            layer.synchronized = True
        elif type(layer) is layers.Dropout:
            convert_layer(layer, RowDropout)
    return backbone


def load_backbone_weights(backbone: keras.Model, kind: str, weights: str) -> None:
    """Load a local or remote `.weights.h5` or `.h5` file into a backbone.

    Raises:
        OSError: If the file cannot be fetched or does not match the backbone.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            backbone.load_weights(_local_file(weights, folder))
    except (OSError, ValueError, KeyError) as error:
        raise OSError(
            f"could not load model.image.weights={weights} into {kind}: {error}; set it to another "
            "file, to imagenet, or to none"
        ) from error
    if kind.startswith("efficientnet_b"):
        fold_imagenet_scale(backbone)


def _local_file(weights: str, folder: str) -> str:
    url = urlsplit(weights)
    if url.scheme in ("http", "https"):
        # Keras would reuse a cached file of the same name from another address.
        name = f"{sha256(weights.encode()).hexdigest()[:16]}-{Path(url.path).name}"
        return keras.utils.get_file(name, origin=weights)
    if not url.scheme or Path(weights).exists():
        if not Path(weights).is_file():
            raise FileNotFoundError(f"file {weights} does not exist")
        return weights
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(weights)
    local = Path(folder) / Path(path).name
    fs.copy_files(path, str(local), source_filesystem=filesystem)
    return str(local)
