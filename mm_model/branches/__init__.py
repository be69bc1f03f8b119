"""Registry of branches; each turns one input into `{"pooled": (B, F), "tokens": (B, T, F)}`.

A branch may add `mask` (B, T), 0 for absent tokens. The registered text branches return only their
tokens.

An entry is a builder or its import path ("module:function"), so that naming a branch in a spec
imports neither Keras nor TensorFlow. To add a branch, add an entry:

    IMAGE_BRANCHES["mine"] = my_branch      # my_branch(image, spec, blocks) -> features

The input of an image branch is single images, even if a row has several. Its backbone consists of
the layers that its tokens depend on. A branch with an entry in `IMAGE_TOPS` can also be built on
precomputed features of its backbone.

    image_inputs      builds the image branch from its inputs
    image_tiny        a small image branch
    image_pretrained  image branches with a backbone of `mm_model.backbones`
    numeric_inputs    builds the numeric branch from numbers and categories
    numeric_mlp       the numeric branch
    text_inputs       builds the text branch from token ids
    text_hashed       a text branch without pretrained weights
    text_pretrained   text branches with a backbone of `mm_model.backbones`
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from mm_model.backbones import HUB_TEXTS, IMAGE_BACKBONES

Builder = Callable[..., Any] | str

IMAGE_BRANCHES: dict[str, Builder] = {
    "tiny": "mm_model.branches.image_tiny:build",
    **dict.fromkeys(IMAGE_BACKBONES, "mm_model.branches.image_pretrained:build"),
}

IMAGE_TOPS: dict[str, Builder] = {
    "tiny": "mm_model.branches.image_tiny:top",
    **dict.fromkeys(IMAGE_BACKBONES, "mm_model.branches.image_pretrained:top"),
}
"""Builders of the layers above the pooled backbone, which is the output of layer `image_pool`:
`my_top(pooled, spec, blocks) -> (B, F)`."""

NUMERIC_BRANCHES: dict[str, Builder] = {
    "mlp": "mm_model.branches.numeric_mlp:build",
}


TEXT_BRANCHES: dict[str, Builder] = {
    "hashed": "mm_model.branches.text_hashed:build",
    **dict.fromkeys(HUB_TEXTS, "mm_model.branches.text_pretrained:build"),
}
"""Text branches: `my_branch(ids_RL, mask_RL, num_tokens, spec, blocks) -> tokens (R, L, F)`. The
stages of `train.stages` freeze the layers of nested Keras models in them."""


def load_builder(builder: Builder) -> Callable[..., Any]:
    """Return a builder; import it if the entry is an import path."""
    if isinstance(builder, str):
        module, function = builder.split(":")
        return getattr(import_module(module), function)
    return builder
