"""The branches by name: each turns one input into `{"pooled": (B, F), "tokens": (B, T, F)}`.

The dicts hold either a builder or where to import it from ("module:function"), so that naming a
branch in a spec imports neither Keras nor TensorFlow. A branch of your own is one more entry:

    IMAGE_BRANCHES["mine"] = my_branch      # my_branch(image, kind, spec, blocks) -> Features

An image branch sees single images, also where a row has several. Its backbone, which
`mm_model.freezing` freezes, is the layers that its tokens come from. Where it has a top of
its own in `IMAGE_TOPS`, a model can also be built on features that the backbone gave before.
"""

from collections.abc import Callable
from typing import Any

Builder = Callable[..., Any] | str

_TINY = "mm_model.branches.image_tiny:build"
_APPLICATION = "mm_model.branches.image_application:build"

IMAGE_BRANCHES: dict[str, Builder] = {
    "tiny": _TINY,
    **{f"efficientnet_b{n}": _APPLICATION for n in range(8)},
    **{f"efficientnet_v2_b{n}": _APPLICATION for n in range(4)},
    **{f"efficientnet_v2_{size}": _APPLICATION for size in ("s", "m", "l")},
    **{f"mobilenet_v3_{size}": _APPLICATION for size in ("small", "large")},
    **{f"convnext_{size}": _APPLICATION for size in ("tiny", "small", "base", "large", "xlarge")},
    "resnet50": _APPLICATION,
}

IMAGE_TOPS: dict[str, Builder] = {
    kind: builder.replace(":build", ":top")
    for kind, builder in IMAGE_BRANCHES.items()
    if isinstance(builder, str)
}
"""What each kind puts on its pooled backbone, the output of its layer `image_pool`, as
`my_top(pooled, kind, spec, blocks) -> (B, F)`."""

NUMERIC_BRANCHES: dict[str, Builder] = {
    "mlp": "mm_model.branches.numeric_mlp:build",
}


def has_imagenet_weights() -> tuple[str, ...]:
    """Return the kinds of image branch that `keras.applications` has ImageNet weights for."""
    return tuple(kind for kind, builder in IMAGE_BRANCHES.items() if builder == _APPLICATION)
