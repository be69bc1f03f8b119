"""Applies mixup and CutMix to the rows of a training batch, inside the training step.

Mixes each row with its neighbour in the batch, with one random fraction per step. Pairs are formed
within a replica, so they depend on the number of replicas.

Shapes: B rows, N images per row, H × W pixels, V views, F columns, C categories.
"""

from functools import lru_cache
from typing import Any

import keras
import numpy as np
from keras import ops

from mm_model.spec import LossSpec

_NUM_QUANTILES = 4096


def mix_rows(
    inputs: dict[str, Any],
    y_B1: Any,
    weight_B1: Any,
    spec: LossSpec,
    seed: keras.random.SeedGenerator,
) -> tuple[dict[str, Any], Any, Any]:
    """Return inputs, labels and weights of mixed rows, or the arguments if mixing is disabled.

    Mixup (Zhang et al. 2017, arXiv 1710.09412) returns fraction × row + (1 - fraction) × neighbour,
    with the fraction drawn from Beta(alpha, alpha). CutMix (Yun et al. 2019, arXiv 1905.04899)
    pastes a box cut from the neighbour's image. The relative area of the box is 1 - fraction before
    it is clipped at the image's edges; the area outside the clipped box is the fraction for all
    other inputs. If both are enabled, each step uses either with probability 0.5.

    If one of two numbers to mix is missing, the result is the other; with several images per row,
    the same holds for images. Categories, texts and masks come from the row with the larger
    fraction.
    Labels are weighted so that the loss of a mixed row is the mixed loss of both rows.

    Precomputed features are mixed like images, view by view; the result differs from the backbone's
    features of mixed images.

    Args:
        inputs: Inputs of a `FusionModel` by name.
        y_B1: Labels, 0 to 1.
        weight_B1: Weights of the rows.
        spec: Alphas of mixup and CutMix.
        seed: Seed for the fraction; equal on all replicas.

    Raises:
        ValueError: If CutMix is set for a model without images.
    """
    if not (spec.mixup_alpha or spec.cutmix_alpha):
        return inputs, y_B1, weight_B1
    image = inputs.get("image")
    if image is None and spec.cutmix_alpha:
        raise ValueError(
            f"cutmix_alpha={spec.cutmix_alpha:g} needs images, but the model takes {list(inputs)}; "
            "set it to 0"
        )
    size = (1, 1) if image is None else tuple(image.shape[-3:-1])
    fraction_HW, fraction = _draw_fractions(size, spec, seed)
    image_fraction = {"image": fraction_HW[:, :, None], "features": fraction}
    result = {}
    for name, own in inputs.items():
        other = _neighbour(own)
        if name in image_fraction:
            result[name] = _mix_images(own, other, image_fraction[name], inputs.get("image_mask"))
        elif name == "numeric":
            result[name] = _mix_numbers(own, other, fraction)
        else:
            result[name] = ops.where(fraction >= 0.5, own, other)
    own, other = fraction * weight_B1, (1.0 - fraction) * _neighbour(weight_B1)
    weight: Any = own + other
    y: Any = own * y_B1 + other * _neighbour(y_B1)
    # If both rows have no weight, the row keeps its own label, which has no effect.
    return result, ops.where(weight > 0, y / ops.where(weight > 0, weight, 1.0), y_B1), weight


def _draw_fractions(
    size: tuple[int, int], spec: LossSpec, seed: keras.random.SeedGenerator
) -> tuple[Any, Any]:
    """Return the row's own fraction of each pixel (H, W), and of all other inputs."""
    draw: Any = keras.random.uniform((5,), seed=seed)
    fraction = beta_quantile(draw[0], spec.mixup_alpha) if spec.mixup_alpha else None
    even = None if fraction is None else ops.broadcast_to(fraction, size)
    if not spec.cutmix_alpha:
        return even, fraction
    outside_HW, area = _outside_box(
        size, beta_quantile(draw[1], spec.cutmix_alpha), draw[2], draw[3]
    )
    if fraction is None:
        return outside_HW, area
    boxes = draw[4] < 0.5
    return ops.where(boxes, outside_HW, even), ops.where(boxes, area, fraction)


def _outside_box(size: tuple[int, int], fraction: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """Return (H, W) with 0 in a box around (x, y) and 1 outside, and the fraction outside."""
    height, width = size
    side: Any = ops.sqrt(1.0 - fraction)

    def inside(length: int, centre: Any) -> Any:
        extent: Any = ops.floor(length * side)
        start = ops.round(centre * length - extent / 2)
        stop = ops.round(centre * length + extent / 2)
        pixel: Any = ops.arange(length, dtype="float32")
        return ops.cast(ops.logical_and(pixel >= start, pixel < stop), "float32")

    inside_H, inside_W = inside(height, y), inside(width, x)
    outside_HW: Any = 1.0 - inside_H[:, None] * inside_W[None, :]
    return outside_HW, ops.mean(outside_HW)


def _mix_images(own: Any, other: Any, fraction: Any, mask_BN: Any) -> Any:
    own, other = _float(own), _float(other)
    result = fraction * own + (1.0 - fraction) * other
    if mask_BN is None:
        return result
    present = ops.reshape(mask_BN > 0, (-1, own.shape[1], *[1] * (len(own.shape) - 2)))
    return ops.where(_neighbour(present), ops.where(present, result, other), own)


def _mix_numbers(own: Any, other: Any, fraction: Any) -> Any:
    own, other = _float(own), _float(other)
    result = fraction * own + (1.0 - fraction) * other
    return ops.where(ops.isnan(own), other, ops.where(ops.isnan(other), own, result))


def _float(x: Any) -> Any:
    return ops.cast(x, "float32")


def _neighbour(x: Any) -> Any:
    return ops.roll(x, 1, axis=0)


def beta_quantile(probability: Any, alpha: float) -> Any:
    """Return a quantile of Beta(alpha, alpha), interpolated between 4,096 exact ones.

    The quantile at a uniform random number is a Beta random number. XLA can compile this, unlike
    the sampler of `keras.random.beta`.
    """
    table = ops.convert_to_tensor(_beta_quantiles(alpha))
    position = probability * _NUM_QUANTILES
    below: Any = ops.minimum(ops.floor(position), _NUM_QUANTILES - 1)
    start: Any = ops.cast(below, "int32")
    low: Any = ops.take(table, start)
    high: Any = ops.take(table, start + 1)
    return low + (high - low) * (position - below)


@lru_cache
def _beta_quantiles(alpha: float) -> np.ndarray:
    from scipy.special import betaincinv

    probabilities = np.linspace(0.0, 1.0, _NUM_QUANTILES + 1)
    return betaincinv(alpha, alpha, probabilities).astype(np.float32)
