"""Explains single rows: which part of the image and which columns the probability depends on.

Shapes: B rows, I images, h × w positions of a feature map, H × W pixels, F features, E encoded
components.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from mm_model.model_parts import (
    ENCODED_COLUMNS,
    IMAGE_FEATURES,
    IMAGE_MAP,
    CutModel,
    has_feature_map,
)
from ray_jobs.data.batch import IMAGE

_STEPS, _IMAGE_STEPS = 32, 16
_CELL = 8
_IMAGE_ROWS = 8  # differentiated at once with respect to their pixels


def image_maps(
    model: Any, inputs: Mapping[str, np.ndarray], is_positive_B: np.ndarray
) -> np.ndarray:
    """Return how much each part of the images adds to the predicted class (I, h, w), at least 0.

    By Grad-CAM for backbones with convolutions, and by integrated gradients for transformers: in
    their upper blocks, a token no longer stands for its own patch. Explains the calibrated logit,
    or its negative for rows that are predicted negative. Maps are not normalized.

    Args:
        model: A `FusionModel` with an image backbone.
        inputs: Inputs of the model.
        is_positive_B: Whether the predicted class of each row is the positive one.
    """
    sign_B1 = np.where(is_positive_B, np.float32(1), np.float32(-1))[:, None]
    if has_feature_map(model):
        return _grad_cam(model, inputs, sign_B1)
    maps = []
    for start in range(0, len(sign_B1), _IMAGE_ROWS):
        part = slice(start, start + _IMAGE_ROWS)
        rows = {name: values[part] for name, values in inputs.items()}
        maps.append(_pixel_contributions(model, rows, sign_B1[part]))
    return np.concatenate(maps)


def _grad_cam(model: Any, inputs: Mapping[str, np.ndarray], sign_B1: np.ndarray) -> np.ndarray:
    """Return maps by Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2."""
    import tensorflow as tf

    cut = CutModel(model, [IMAGE_MAP])
    tensors = cut.tensors(inputs)
    map_IhwF: Any = tensors[IMAGE_MAP]
    with tf.GradientTape() as tape:
        tape.watch(map_IhwF)
        logit_B1: Any = cut.logit({IMAGE_MAP: map_IhwF}, inputs)
        score = tf.reduce_sum(sign_B1 * logit_B1)
    gradient: Any = tape.gradient(score, map_IhwF)
    weight = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)
    return np.asarray(tf.nn.relu(tf.reduce_sum(weight * map_IhwF, axis=-1)))


def _pixel_contributions(
    model: Any, inputs: Mapping[str, np.ndarray], sign_B1: np.ndarray
) -> np.ndarray:
    """Return maps by integrated gradients of the pixels, summed over cells of 8 × 8.

    The path begins at images of one color, the mean of each image.
    """
    import cv2
    import tensorflow as tf

    whole = CutModel(model, [])
    image = inputs[IMAGE].astype(np.float32)
    plain = image.mean(axis=(-3, -2), keepdims=True)
    gradient = np.zeros_like(image)
    for step in range(_IMAGE_STEPS):
        point = tf.constant(plain + (step + 0.5) / _IMAGE_STEPS * (image - plain))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(point)
            logit_B1: Any = whole.logit({}, {**inputs, IMAGE: point})
            score = tf.reduce_sum(sign_B1 * logit_B1)
        found: Any = tape.gradient(score, point)
        gradient += np.asarray(found) / _IMAGE_STEPS
    parts_IHW = ((image - plain) * gradient).sum(axis=-1).reshape(-1, *image.shape[-3:-1])
    height, width = parts_IHW.shape[1:]
    size = (max(width // _CELL, 1), max(height // _CELL, 1))
    small = [cv2.resize(parts_HW, size, interpolation=cv2.INTER_AREA) for parts_HW in parts_IHW]
    return np.maximum(np.stack(small), 0)


def map_similarity(
    model: Any, inputs: Mapping[str, np.ndarray], maps_IHW: np.ndarray, is_positive_B: np.ndarray
) -> float | None:
    """Return the rank correlation of maps with those of the same model with shuffled weights.

    The closer to 0, the more the maps depend on what the model has learned (Adebayo et al. 2018,
    "Sanity Checks for Saliency Maps", arXiv 1810.03292). The weights are restored. Returns None if
    no map differs between its positions in both models.
    """
    from scipy.stats import spearmanr

    rng, weights = np.random.default_rng(0), model.get_weights()
    try:
        model.set_weights([rng.permutation(w.ravel()).reshape(w.shape) for w in weights])
        others_IHW = image_maps(model, inputs, is_positive_B)
    finally:
        model.set_weights(weights)
    correlations = [
        float(cast(Any, spearmanr(one.ravel(), other.ravel())).statistic)
        for one, other in zip(maps_IHW, others_IHW, strict=True)
        if np.ptp(one) > 0 and np.ptp(other) > 0
    ]
    return float(np.mean(correlations)) if correlations else None


def column_contributions(
    model: Any,
    inputs: Mapping[str, np.ndarray],
    columns: Mapping[str, Sequence[str]],
    average: Mapping[str, np.ndarray],
) -> list[dict[str, float]]:
    """Return, for each row, what each column adds to the logit, compared with an average row.

    Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365, equation 3), from the average
    of the encoded numbers and words to those of the row, with the row's own images and texts. The
    contributions add up to the difference in the logit, but for the error of the integration.

    Args:
        model: A `FusionModel`.
        inputs: Inputs of the model.
        columns: The column of each component of the encoded numbers and words, by layer.
        average: Average of the encoded numbers and words (E,), by layer.
    """
    import tensorflow as tf

    cut = CutModel(model, [*IMAGE_FEATURES, *ENCODED_COLUMNS])
    tensors = cut.tensors(inputs)
    ends = {name: np.asarray(tensors[name]) for name in columns}
    gradients: dict[str, Any] = {name: 0.0 for name in columns}
    for step in range(_STEPS):
        fraction = (step + 0.5) / _STEPS
        points = {
            name: tf.constant(average[name] + fraction * (end - average[name]), tf.float32)
            for name, end in ends.items()
        }
        with tf.GradientTape() as tape:
            tape.watch(points)
            logit: Any = tf.reduce_sum(cut.logit({**tensors, **points}, inputs))
        found: Any = tape.gradient(logit, points)
        gradients = {name: gradients[name] + np.asarray(found[name]) / _STEPS for name in columns}
    rows: list[dict[str, float]] = [{} for _ in range(len(next(iter(ends.values()))))]
    for name, names in columns.items():
        parts_BE = (ends[name] - average[name]) * gradients[name]
        for row, parts in zip(rows, parts_BE, strict=True):
            for column, part in zip(names, parts, strict=True):
                row[column] = row.get(column, 0.0) + float(part)
    return rows
