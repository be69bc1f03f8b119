"""Mixes the rows of a training batch with each other: mixup and cutmix, inside the step.

Each row is mixed with its neighbour in the batch, all by the one share that a step draws. The rows
are those of one replica, so who is mixed with whom does depend on the number of replicas.

Shapes: B rows, N images a row, H × W pixels, V views, F columns, C categories.
"""

from functools import lru_cache
from typing import Any

import keras
import numpy as np
from keras import ops

from mm_model.spec import LossSpec

_NUM_QUANTILES = 4096


def mixed(
    inputs: dict[str, Any],
    y_B1: Any,
    weight_B1: Any,
    spec: LossSpec,
    seed: keras.random.SeedGenerator,
) -> tuple[dict[str, Any], Any, Any]:
    """Return inputs, labels and weights of mixed rows; the arguments where the spec mixes none.

    Mixup (Zhang et al. 2017, arXiv 1710.09412) takes share × row + (1 - share) × neighbour, with
    the share from Beta(alpha, alpha). Cutmix (Yun et al. 2019, arXiv 1905.04899) puts a box of the
    neighbour's image in, of 1 - share of the area before it is cut at the image's edges; what is
    left outside it is the share of everything else. With both, a step does either as often.

    Numbers mix, and where one of two is missing, it is the other. Categories and masks cannot mix:
    those of the row with the larger share stand. Where one of two images of several is missing, it
    is the other. The loss of a mixed row is the mixed loss of both: their labels count by weight.

    Features in place of images mix as images do, view by view; what comes of it is not what the
    backbone would give of mixed images.

    Args:
        inputs: by name, as `FusionModel` takes them.
        y_B1: labels, 0 to 1.
        weight_B1: weights.
        spec: how to mix.
        seed: of the draws; alike on all replicas, so is the share.

    Raises:
        ValueError: if boxes are asked for where there is no image.
    """
    if not (spec.mixup_alpha or spec.cutmix_alpha):
        return inputs, y_B1, weight_B1
    image = inputs.get("image")
    if image is None and spec.cutmix_alpha:
        instead = "features of them" if "features" in inputs else "none"
        raise ValueError(
            f"cutmix_alpha={spec.cutmix_alpha:g} puts boxes into images, and the model takes "
            f"{instead}; set it to 0"
        )
    size = (1, 1) if image is None else tuple(image.shape[-3:-1])
    kept_HW, share = _kept(size, spec, seed)
    result = {}
    for name, own in inputs.items():
        other = _neighbour(own)
        if name == "image":
            kept_HW1 = kept_HW[:, :, None]
            result[name] = _images(own, other, kept_HW1, inputs.get("image_mask"))
        elif name == "features":
            result[name] = _images(own, other, share, inputs.get("image_mask"))
        elif name == "numeric":
            result[name] = _numbers(own, other, share)
        else:
            result[name] = ops.where(share >= 0.5, own, other)
    own, other = share * weight_B1, (1.0 - share) * _neighbour(weight_B1)
    weight: Any = own + other
    y: Any = own * y_B1 + other * _neighbour(y_B1)
    # Two rows without weight have no label that counts.
    return result, ops.where(weight > 0, y / ops.where(weight > 0, weight, 1.0), y_B1), weight


def _kept(
    size: tuple[int, int], spec: LossSpec, seed: keras.random.SeedGenerator
) -> tuple[Any, Any]:
    """Return what share of each pixel (H, W) is the row's own, and of everything else."""
    draw: Any = keras.random.uniform((5,), seed=seed)
    share = beta_quantile(draw[0], spec.mixup_alpha) if spec.mixup_alpha else None
    even = None if share is None else ops.broadcast_to(share, size)
    if not spec.cutmix_alpha:
        return even, share
    kept_HW, area = _outside_box(size, beta_quantile(draw[1], spec.cutmix_alpha), draw[2], draw[3])
    if share is None:
        return kept_HW, area
    boxes = draw[4] < 0.5
    return ops.where(boxes, kept_HW, even), ops.where(boxes, area, share)


def _outside_box(size: tuple[int, int], share: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """Return 1 outside a box about (x, y), 0 in it, and the area outside; all of the image is 1."""
    height, width = size
    side: Any = ops.sqrt(1.0 - share)

    def inside(length: int, centre: Any) -> Any:
        extent: Any = ops.floor(length * side)
        start = ops.round(centre * length - extent / 2)
        stop = ops.round(centre * length + extent / 2)
        place: Any = ops.arange(length, dtype="float32")
        return ops.cast(ops.logical_and(place >= start, place < stop), "float32")

    inside_H, inside_W = inside(height, y), inside(width, x)
    outside_HW: Any = 1.0 - inside_H[:, None] * inside_W[None, :]
    return outside_HW, ops.mean(outside_HW)


def _images(own: Any, other: Any, kept: Any, mask_BN: Any) -> Any:
    own, other = _float(own), _float(other)
    result = kept * own + (1.0 - kept) * other
    if mask_BN is None:
        return result
    there = ops.reshape(mask_BN > 0, (-1, own.shape[1], *[1] * (len(own.shape) - 2)))
    return ops.where(_neighbour(there), ops.where(there, result, other), own)


def _numbers(own: Any, other: Any, share: Any) -> Any:
    own, other = _float(own), _float(other)
    result = share * own + (1.0 - share) * other
    return ops.where(ops.isnan(own), other, ops.where(ops.isnan(other), own, result))


def _float(x: Any) -> Any:
    return ops.cast(x, "float32")


def _neighbour(x: Any) -> Any:
    return ops.roll(x, 1, axis=0)


def beta_quantile(share: Any, alpha: float) -> Any:
    """Return the number that a share of Beta(alpha, alpha) lies below.

    Of a uniform number it is a draw, which XLA can compile, unlike the sampler of
    `keras.random.beta`. Between 4,096 exact quantiles it is a straight line.
    """
    table = ops.convert_to_tensor(_beta_quantiles(alpha))
    place = share * _NUM_QUANTILES
    below: Any = ops.minimum(ops.floor(place), _NUM_QUANTILES - 1)
    start: Any = ops.cast(below, "int32")
    low: Any = ops.take(table, start)
    high: Any = ops.take(table, start + 1)
    return low + (high - low) * (place - below)


@lru_cache
def _beta_quantiles(alpha: float) -> np.ndarray:
    from scipy.special import betaincinv

    shares = np.linspace(0.0, 1.0, _NUM_QUANTILES + 1)
    return betaincinv(alpha, alpha, shares).astype(np.float32)
