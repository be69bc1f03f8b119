"""Rows, images and models that several tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from scipy import ndimage

import mm_model
from mm_model.branches.text_inputs import TextShape
from mm_model.spec import NO_AUGMENTATION
from mm_model.statistics import Vocabulary

SMALLEST_OF_EACH_FAMILY = {
    "tiny": 16,
    "efficientnet_b0": 32,
    "efficientnet_v2_b0": 32,
    "mobilenet_v3_small": 32,
    "convnext_tiny": 32,
    "resnet50": 32,
    "efficientnet_lite0": 32,
    "vit_tiny": 32,
    "deit_tiny": 32,
    "dinov2_small": 28,
    "dinov3_small": 32,
    "swin_tiny": 224,
    "siglip_base": 32,
}
TEXT = TextShape(columns=2, length=6, num_tokens=40)
UNTRAINED = {"image": {"kind": "tiny", "weights": None}}
NO_RANDOMNESS = {
    **UNTRAINED,
    "augmentation": NO_AUGMENTATION.model_dump(),
    "dropout": 0,
    "fusion": {"modality_dropout": 0},
}
COLOUR = Vocabulary(column="colour", words=("blue", "green", "red"))


def rows(
    count: int = 16, size: int = 16, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(count, 3)) * [1, 10, 100]
    y = (numbers[:, 0] > 0).astype(int)
    y[:2] = 0, 1
    numbers[rng.random(numbers.shape) < 0.1] = np.nan
    return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), numbers, y


def rows_with_all_inputs(
    count: int = 16, num_images: int = 3, size: int = 16
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All inputs by name, with several images and texts per row, some missing, and labels."""
    rng = np.random.default_rng(7)
    _, numbers, y = rows(count)
    image = rng.integers(0, 256, (count, num_images, size, size, 3), dtype=np.uint8)
    mask = (rng.random((count, num_images)) < 0.6).astype(np.float32)
    mask[np.arange(count), rng.integers(0, num_images, count)] = 1
    category = rng.integers(0, COLOUR.num_codes, (count, 1)).astype(np.int32)
    num_tokens = rng.integers(0, TEXT.length + 1, (count, TEXT.columns, 1))
    inputs = {
        "image": image,
        "image_mask": mask,
        "numeric": numbers,
        "category": category,
        "text": rng.integers(1, TEXT.num_tokens, (count, TEXT.columns, TEXT.length)),
        "text_mask": (np.arange(TEXT.length) < num_tokens).astype(np.float32),
    }
    return inputs, y


def model_with_all_inputs(inputs: dict[str, np.ndarray], **options: Any) -> mm_model.FusionModel:
    """A model for `rows_with_all_inputs` with a different probability for each row."""
    statistics = mm_model.fit_numeric_statistics(inputs["numeric"])
    shapes = inputs["image"].shape[1:], inputs["numeric"].shape[1:]
    model = mm_model.create_model(
        *shapes, statistics, vocabularies=[COLOUR], **UNTRAINED, **{"text": TEXT, **options}
    )
    return with_random_heads(model)


@contextmanager
def half_precision() -> Iterator[None]:
    """Create layers that compute in bfloat16."""
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16")
    try:
        yield
    finally:
        keras.mixed_precision.set_dtype_policy("float32")


def with_random_heads(model: mm_model.FusionModel) -> mm_model.FusionModel:
    """Replace the zero weights of the heads, so that different features have different logits."""
    rng = np.random.default_rng(3)
    for name in model.heads:
        head = model.network.get_layer(f"{name}_head")
        head.set_weights([rng.normal(size=w.shape) for w in head.get_weights()])
    return model


def pictures(count: int = 8, height: int = 20, width: int = 24, seed: int = 0) -> np.ndarray:
    """Smooth images with integer pixels and different channels."""
    noise = np.random.default_rng(seed).normal(size=(count, height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2, 0))
    scaled = (smooth - smooth.min()) / np.ptp(smooth) * 255
    return np.round(scaled).astype(np.float32)
