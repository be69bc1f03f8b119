"""Builds the backbone of an image branch.

Shapes: B rows, H × W pixels, h × w positions, T tokens, F features.
"""

import tempfile
from functools import partial
from typing import Any

import keras
from keras import KerasTensor, layers

from mm_model.backbones import HUB_IMAGES, KERAS_APPLICATIONS, is_location
from mm_model.backbones.applications import CaffePixels, make_application
from mm_model.backbones.lite0 import make_lite0
from mm_model.backbones.weight_files import fetch_weights
from mm_model.compat_keras import convert_layer, fold_imagenet_scale
from mm_model.layers.batch_norm import SynchronizedBatchNormalization
from mm_model.layers.dropout import RowDropout


def make_backbone(
    kind: str, shape: tuple[int, int, int], weights: str | None, synchronized: bool
) -> keras.Model:
    """Return a backbone without its classifier, from pixels 0-255.

    It returns feature maps (B, h, w, F), or, for those of KerasHub, `pooled` (B, F) and `tokens`
    (B, T, F).

    Args:
        kind: Key of `IMAGE_BACKBONES`.
        shape: Height, width, channels.
        weights: Initial weights, as in `ImageSpec.weights`.
        synchronized: Whether batch norms use statistics of the global batch.

    Raises:
        ValueError: If the backbone does not support images of this shape.
        OSError: If the weights cannot be downloaded, found or read.
    """
    if kind in HUB_IMAGES:
        from mm_model.backbones.hub import make_hub_image

        return make_hub_image(kind, shape, weights)
    named = None if is_location(weights) else weights
    make = partial(make_application, kind) if kind in KERAS_APPLICATIONS else make_lite0
    backbone = make(shape, named)
    if weights is not None and named is None:
        _load_file(backbone, kind, weights)
    for layer in backbone.layers:
        if synchronized and type(layer) is layers.BatchNormalization:
            convert_layer(layer, SynchronizedBatchNormalization)
            layer.synchronized = True
        elif type(layer) is layers.Dropout:
            convert_layer(layer, RowDropout)
    return backbone


def preprocess(image_BHWC: KerasTensor, kind: str) -> Any:
    """Return the input of a backbone, computed from pixels 0-255."""
    return CaffePixels(name="image_range")(image_BHWC) if kind == "resnet50" else image_BHWC


def _load_file(backbone: keras.Model, kind: str, weights: str) -> None:
    """Load a local or remote `.weights.h5` or `.h5` file into a backbone.

    Raises:
        OSError: If the file cannot be fetched or does not match the backbone.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            backbone.load_weights(fetch_weights(weights, folder))
    except (OSError, ValueError, KeyError) as error:
        raise OSError(
            f"could not load model.image.weights={weights} into {kind}: {error}; set it to another "
            "file, to imagenet, or to none"
        ) from error
    if kind.startswith("efficientnet_b"):
        fold_imagenet_scale(backbone)
