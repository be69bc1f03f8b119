"""Registry of branches; each turns one input into `{"pooled": (B, F), "tokens": (B, T, F)}`.

An entry is a builder or its import path ("module:function"), so that naming a branch in a spec
imports neither Keras nor TensorFlow. To add a branch, add an entry:

    IMAGE_BRANCHES["mine"] = my_branch      # my_branch(image, spec, blocks) -> features

The input of an image branch is single images, even if a row has several. Its backbone consists of
the layers that its tokens depend on. A branch with an entry in `IMAGE_TOPS` can also be built on
precomputed features of its backbone.

    image_inputs    builds the image branch from its inputs; the other image_* modules are its kinds
    numeric_inputs  builds the numeric branch from numbers and categories
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

Builder = Callable[..., Any] | str

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
"""Image branches with a backbone of `keras.applications`, which has ImageNet weights."""

IMAGE_BRANCHES: dict[str, Builder] = {
    "tiny": "mm_model.branches.image_tiny:build",
    **dict.fromkeys(KERAS_APPLICATIONS, "mm_model.branches.image_application:build"),
}

IMAGE_TOPS: dict[str, Builder] = {
    "tiny": "mm_model.branches.image_tiny:top",
    **dict.fromkeys(KERAS_APPLICATIONS, "mm_model.branches.image_application:top"),
}
"""Builders of the layers above the pooled backbone, which is the output of layer `image_pool`:
`my_top(pooled, spec, blocks) -> (B, F)`."""

NUMERIC_BRANCHES: dict[str, Builder] = {
    "mlp": "mm_model.branches.numeric_mlp:build",
}


def load_builder(builder: Builder) -> Callable[..., Any]:
    """Return a builder; import it if the entry is an import path."""
    if isinstance(builder, str):
        module, function = builder.split(":")
        return getattr(import_module(module), function)
    return builder
