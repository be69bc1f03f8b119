"""Registry of branches; each turns one input into `{"pooled": (B, F), "tokens": (B, T, F)}`.

An entry is a builder or its import path ("module:function"), so that naming a branch in a spec
imports neither Keras nor TensorFlow. To add a branch, add an entry:

    IMAGE_BRANCHES["mine"] = my_branch      # my_branch(image, spec, blocks) -> features

An image branch sees single images, also if a row has several. Its backbone consists of the layers
that its tokens depend on. A branch with an entry in `IMAGE_TOPS` can also be built on precomputed
features of its backbone.

    image_inputs    from the inputs to the image branch's features; image_* are its kinds
    numeric_inputs  from numbers and categories to the numeric branch's features
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
"""Layers on the pooled backbone, the output of layer `image_pool`, as
`my_top(pooled, spec, blocks) -> (B, F)`."""

NUMERIC_BRANCHES: dict[str, Builder] = {
    "mlp": "mm_model.branches.numeric_mlp:build",
}


def load_builder(builder: Builder) -> Callable[..., Any]:
    """Return a builder, imported if the entry is an import path."""
    if isinstance(builder, str):
        module, function = builder.split(":")
        return getattr(import_module(module), function)
    return builder
