"""Image backbones of `keras.applications`.

EfficientNet, MobileNetV3 and ConvNeXt contain their preprocessing of pixels 0-255. ResNet50 does
not: its input has to pass through `CaffePixels`.
"""

import keras
from keras import layers

from mm_model.backbones import KERAS_APPLICATIONS


def make_application(kind: str, shape: tuple[int, int, int], weights: str | None) -> keras.Model:
    """Return a backbone without its classifier, from pixels to feature maps.

    Args:
        kind: Key of `KERAS_APPLICATIONS`.
        shape: Height, width, channels.
        weights: `imagenet`, or None for random ones.

    Raises:
        ValueError: If the backbone does not support images of this shape.
        OSError: If the weights cannot be downloaded.
    """
    application = getattr(keras.applications, KERAS_APPLICATIONS[kind])
    try:
        backbone = application(include_top=False, weights=weights, input_shape=shape)
    except Exception as error:
        if weights is None:
            raise ValueError(
                f"model.image.kind={kind} does not support images of shape {shape}: {error}"
            ) from error
        raise OSError(
            f"could not download the ImageNet weights of {kind}: {error}; set "
            "model.image.weights to a local file or to none"
        ) from error
    # Not passed as `name`, because some applications look up their architecture by name.
    backbone.name = kind
    return backbone


@keras.saving.register_keras_serializable("mm_model")
class CaffePixels(layers.Layer):
    """Converts RGB 0-255 to BGR centred at ImageNet's mean, with which ResNet50 was trained."""

    def call(self, image_BHWC):
        """Reorder and centre the channels."""
        return keras.applications.resnet.preprocess_input(image_BHWC)
