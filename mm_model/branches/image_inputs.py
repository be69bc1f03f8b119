"""Builds the image branch, from its inputs to its features per row.

The input is either images or precomputed features of a backbone. For features, only the layers
above the backbone are built. They have the same names in both cases, so their weights can be copied
by path.

Shapes: B rows, N images per row, H × W pixels, V views, T tokens, F features.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import KerasTensor, layers

from mm_model.branches import IMAGE_BRANCHES, IMAGE_TOPS, load_builder
from mm_model.fusion import TOKEN_FUSIONS
from mm_model.layers.augmentation import augmentation_layers
from mm_model.layers.blocks import BlockBuilder
from mm_model.layers.image_stack import FoldImages, PickView, UnfoldImages
from mm_model.spec import ModelSpec

IMAGE_FOLD, IMAGE_POOL, IMAGE_TOKENS = "image_fold", "image_pool", "image_tokens"
"""Names of the last layer before augmentation, of the layer that pools the backbone, and of the one
that returns its tokens."""


def build_image_branch(
    inputs: dict[str, Any],
    spec: ModelSpec,
    shape_image: Sequence[int] | None,
    shape_features: Sequence[int] | None,
    blocks: BlockBuilder,
) -> tuple[dict[str, KerasTensor], list[str]]:
    """Return the image branch's features per row and the names of its backbone's layers.

    Adds the branch's inputs to `inputs`. If `shape_features` is given, `shape_image` is ignored.
    With a fusion that uses tokens, the features are the pooled ones, then those of each token.
    """
    with_tokens = spec.fusion.kind in TOKEN_FUSIONS
    if shape_features is None:
        name, shape, one_image = "image", _image_shape(shape_image or ()), 3
    else:
        one_image = 3 if with_tokens else 2
        name, shape = "features", _features_shape(shape_features, spec.image.kind, one_image)
    several = len(shape) > one_image
    inputs[name] = x = keras.Input(shape, name=name)
    if several:
        inputs["image_mask"] = keras.Input(shape[:1], name="image_mask")
        x = FoldImages(name=IMAGE_FOLD)([x, inputs["image_mask"]])
    backbone: list[str] = []
    if shape_features is None:
        for layer in augmentation_layers(spec.augmentation):
            x = layer(x)
        features = load_builder(IMAGE_BRANCHES[spec.image.kind])(x, spec.image, blocks)
        # The tokens are the output of the backbone, before any layer on top of it.
        below = keras.Model(list(inputs.values()), features["tokens"], name="image_backbone").layers
        backbone = [layer.name for layer in below if layer.weights]
    else:
        picked: Any = PickView(name="image_view")(x)
        if with_tokens:
            picked_BF, tokens_BTF = picked[:, 0], picked[:, 1:]
        else:
            picked_BF = picked
            tokens_BTF = layers.Reshape((1, shape[-1]), name=IMAGE_TOKENS)(picked)
        pooled_BF = load_builder(IMAGE_TOPS[spec.image.kind])(picked_BF, spec.image, blocks)
        features = {"pooled": pooled_BF, "tokens": tokens_BTF}
    if several:
        unfold = UnfoldImages(name="image_unfold")
        pooled, tokens = unfold([features["pooled"], features["tokens"], inputs["image_mask"]])
        features = {"pooled": pooled, "tokens": tokens, "mask": inputs["image_mask"]}
    return features, backbone


def _image_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) not in (3, 4) or shape[-1] != 3 or min(shape) < 1:
        raise ValueError(
            f"image shape {tuple(shape)} is invalid; pass (height, width, 3), or (images, height, "
            "width, 3) for several images per row"
        )
    return tuple(map(int, shape))


def _features_shape(shape: Sequence[int], kind: str, one_image: int) -> tuple[int, ...]:
    if len(shape) not in (one_image, one_image + 1) or min(shape) < 1:
        each = "views, width" if one_image == 2 else "views, 1 + tokens, width"
        raise ValueError(
            f"features shape {tuple(shape)} is invalid; pass ({each}), or (images, {each}) for "
            "several images per row"
        )
    if kind not in IMAGE_TOPS:
        raise ValueError(
            f"image branch {kind!r} cannot be built on features; add the layers above its backbone "
            "to IMAGE_TOPS"
        )
    return tuple(map(int, shape))
