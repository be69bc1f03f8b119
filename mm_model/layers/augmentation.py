"""Random augmentation of training images (pixels 0-255) on the training device.

Each row has its own random numbers (`mm_model.per_row_random`). All operations are dense float32
operations in one static graph that XLA can compile. Inference leaves images unchanged.

Keras' own layers are unsuitable: their random numbers depend on the number of replicas, each of
them resamples the image again, and XLA can compile neither RandAugment nor their rotation.

Shapes: B rows, H × W pixels, C channels.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import layers, ops

from mm_model import per_row_random
from mm_model.layers.resampling import Affine, resample
from mm_model.spec import AugmentationSpec

WHITE = 255.0


def augmentation_layers(spec: AugmentationSpec) -> list[layers.Layer]:
    """Return the augmentation layers that a spec enables."""
    result: list[layers.Layer] = []
    if spec.flip != "none" or spec.rotation or spec.zoom or spec.translation:
        result.append(
            RandomGeometry(
                spec.flip, spec.rotation, spec.zoom, spec.translation, name="augment_geometry"
            )
        )
    if spec.contrast or spec.brightness:
        result.append(RandomColour(spec.contrast, spec.brightness, name="augment_colour"))
    if spec.rand_augment:
        result.append(RandAugment(spec.rand_augment, name="augment_rand"))
    return result


class Augmentation(layers.Layer):
    """Base class of layers that change images (B, H, W, C) in training only."""

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        # Half precision cannot represent fractions of pixel values up to 255.
        super().__init__(autocast=False, **kwargs)
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, images_BHWC: Any, training: bool = False) -> Any:
        """Change the images in training."""
        return self.augment(ops.cast(images_BHWC, "float32")) if training else images_BHWC

    def augment(self, images_BHWC: Any) -> Any:
        """Return the float32 images, each with its own random change."""
        raise NotImplementedError

    def draw(self, images_BHWC: Any, count: int) -> list[Any]:
        """Return `count` random numbers per row from [-1, 1), each of shape (B,)."""
        shape: Any = ops.shape(images_BHWC)
        draw = per_row_random.uniform((shape[0], count), self.seed_generator, -1.0, 1.0)
        return [draw[:, i] for i in range(count)]


@keras.saving.register_keras_serializable("mm_model")
class RandomGeometry(Augmentation):
    """Flips, rotates, zooms and shifts in one bilinear resampling, reflected at the edges.

    Flips first, then rotates and zooms about the centre, then shifts. Flipping alone does not
    interpolate.

    Args:
        flip: See `AugmentationSpec.flip`; each axis is flipped with probability 0.5.
        rotation: Maximum rotation in either direction, as a fraction of a full turn.
        zoom: Images shrink to at least 1 / (1 + zoom) or grow to at most 1 / (1 - zoom).
        translation: Maximum shift along each axis, as a fraction of the image.
        seed: Seed for the random numbers.
    """

    def __init__(
        self,
        flip: str = "none",
        rotation: float = 0.0,
        zoom: float = 0.0,
        translation: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.flip, self.rotation = flip, rotation
        self.zoom, self.translation = zoom, translation

    def augment(self, images_BHWC: Any) -> Any:
        """Return the images, each transformed by its own affine map."""
        flip_x, flip_y, rotation, zoom, shift_x, shift_y = self.draw(images_BHWC, 6)
        flips_x = self.flip in ("horizontal", "horizontal_and_vertical")
        flips_y = self.flip in ("vertical", "horizontal_and_vertical")
        if not (self.rotation or self.zoom or self.translation):
            for flips, draw_B, axis in ((flips_x, flip_x, 2), (flips_y, flip_y, 1)):
                if flips:
                    flipped = ops.flip(images_BHWC, axis=axis)
                    images_BHWC = ops.where(_per_image(draw_B) < 0, flipped, images_BHWC)
            return images_BHWC
        height, width = images_BHWC.shape[1:3]
        shift = Affine(
            x1=-shift_x * (self.translation * width), y1=-shift_y * (self.translation * height)
        )
        scale, angle = 1.0 + zoom * self.zoom, rotation * (2 * math.pi * self.rotation)
        cos, sin = scale * ops.cos(angle), scale * ops.sin(angle)
        flip = Affine(
            xx=ops.where(flip_x < 0, -1.0, 1.0) if flips_x else 1.0,
            yy=ops.where(flip_y < 0, -1.0, 1.0) if flips_y else 1.0,
        )
        return resample(images_BHWC, shift.then(Affine(cos, -sin, 0, sin, cos, 0)).then(flip))


@keras.saving.register_keras_serializable("mm_model")
class RandomColour(Augmentation):
    """Changes contrast and brightness of each image, equally in all channels; clips to 0-255.

    Args:
        contrast: Maximum relative change of the deviations from each channel's mean.
        brightness: Maximum shift of all pixels, as a fraction of 255.
        seed: Seed for the random numbers.
    """

    def __init__(self, contrast: float = 0.0, brightness: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.contrast, self.brightness = contrast, brightness

    def augment(self, images_BHWC: Any) -> Any:
        """Return the images with changed contrast and brightness."""
        contrast_B, brightness_B = self.draw(images_BHWC, 2)
        shift = _per_image(brightness_B * (self.brightness * WHITE))
        if self.contrast:
            factor = _per_image(1.0 + contrast_B * self.contrast)
            mean: Any = ops.mean(images_BHWC, axis=(1, 2), keepdims=True)
            # Computes (x - mean) × factor + mean with one product per pixel.
            images_BHWC, shift = images_BHWC * factor, shift + mean * (1.0 - factor)
        return ops.clip(images_BHWC + shift, 0.0, WHITE)


@keras.saving.register_keras_serializable("mm_model")
class RandAugment(Augmentation):
    """Applies random operations of one magnitude to each image, by default two.

    Implements Cubuk et al. 2019, "RandAugment: Practical automated data augmentation with a reduced
    search space", arXiv 1909.13719, but omits equalize, whose histograms are expensive. Applies
    geometric operations first, in one bilinear resampling. Signs are drawn per image. The ranges at
    magnitude m are those of Cubuk et al. 2018 (AutoAugment, arXiv 1805.09501, table 6):

        identity
        rotate                                      by 30° × m
        shear_x, shear_y                            by 0.3 × m
        translate_x, translate_y                    by 0.45 × m of the image
        brightness, contrast, colour, sharpness     times 1 ± 0.9 × m, as Pillow's `ImageEnhance`
        autocontrast                                stretch each channel to 0-255
        posterize                                   to 8 - round(4 × m) bits a channel
        solarize                                    invert from 256 × (1 - m) up

    Args:
        magnitude: m, in (0, 1).
        operations: Names of the operations to choose from.
        num_operations: Operations per image.
        seed: Seed for the random numbers.
    """

    GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    ENHANCING = ("brightness", "contrast", "colour", "sharpness")
    OPERATIONS = ("identity", *GEOMETRIC, *ENHANCING, "autocontrast", "posterize", "solarize")

    def __init__(
        self,
        magnitude: float,
        operations: Sequence[str] = OPERATIONS,
        num_operations: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.magnitude, self.num_operations = magnitude, num_operations
        self.operations = tuple(operations)

    def augment(self, images_BHWC: Any) -> Any:
        """Return the images after their operations."""
        draw = self.draw(images_BHWC, 2 * self.num_operations)
        positions = [(d + 1.0) * (len(self.operations) / 2) for d in draw[::2]]
        chosen = [ops.cast(ops.floor(p), "int32") for p in positions]
        signs = [ops.where(d < 0, -1.0, 1.0) for d in draw[1::2]]
        if set(self.operations) & set(self.GEOMETRIC):
            source = Affine()
            # Maps go from the result back to the image, so the last operation comes first.
            for chosen_B, sign_B in reversed(list(zip(chosen, signs, strict=True))):
                source = source.then(self._affine(images_BHWC, chosen_B, sign_B))
            images_BHWC = resample(images_BHWC, source)
        for chosen_B, sign_B in zip(chosen, signs, strict=True):
            images_BHWC = self._change_colours(
                images_BHWC, _per_image(chosen_B), _per_image(sign_B)
            )
        return images_BHWC

    def _where(self, name: str, chosen: Any, then: Any, otherwise: Any) -> Any:
        """Return `then` for the rows whose operation is `name`, `otherwise` for all others."""
        index = self.operations.index(name) if name in self.operations else -1
        return ops.where(ops.equal(chosen, index), then, otherwise)

    def _affine(self, images_BHWC: Any, chosen_B: Any, sign_B: Any) -> "Affine":
        """Return the map of a geometric operation, or the identity for any other."""
        height, width = images_BHWC.shape[1:3]

        def amount(name: str, maximum: float) -> Any:
            return self._where(name, chosen_B, sign_B * (self.magnitude * maximum), 0.0)

        angle = amount("rotate", math.radians(30))
        cos, sin = ops.cos(angle), ops.sin(angle)
        return Affine(
            xx=cos,
            xy=amount("shear_x", 0.3) - sin,
            x1=amount("translate_x", 0.45 * width),
            yx=amount("shear_y", 0.3) + sin,
            yy=cos,
            y1=amount("translate_y", 0.45 * height),
        )

    def _change_colours(self, x: Any, chosen: Any, sign: Any) -> Any:
        """Return the images after a colour operation, or unchanged for any other.

        The enhancing operations and autocontrast compute factor × x + shift. The factor is 1 and
        the shift 0 for rows with another operation, so one expression serves all rows.
        """
        grey: Any = x[..., :1] * 0.299 + x[..., 1:2] * 0.587 + x[..., 2:] * 0.114
        change = sign * (-0.9 * self.magnitude)
        changes = {name: self._where(name, chosen, change, 0.0) for name in self.ENHANCING}
        low: Any = ops.min(x, axis=(1, 2), keepdims=True)
        span: Any = ops.max(x, axis=(1, 2), keepdims=True) - low
        # Leaves a channel unchanged if all its pixels are equal.
        low, span = ops.where(span > 0, low, 0.0), ops.where(span > 0, span, WHITE)
        factor = self._where("autocontrast", chosen, WHITE / span, 1.0 - sum(changes.values()))
        shift = self._where(
            "autocontrast",
            chosen,
            low * (-WHITE / span),
            changes["contrast"] * ops.mean(grey, axis=(1, 2), keepdims=True),
        )
        blended = changes["colour"] * grey + changes["sharpness"] * _smooth(x)
        x = ops.clip(x * factor + shift + blended, 0.0, WHITE)
        step = 2.0 ** round(4 * self.magnitude)
        levels: Any = ops.floor(x / step)
        x = self._where("posterize", chosen, levels * step, x)
        start = self._where("solarize", chosen, 256.0 * (1.0 - self.magnitude), 256.0)
        return ops.where(x >= start, WHITE - x, x)

    def get_config(self) -> dict:
        """Return the settings."""
        config = {
            "magnitude": self.magnitude,
            "operations": list(self.operations),
            "num_operations": self.num_operations,
        }
        return {**super().get_config(), **config}


def _smooth(images_BHWC: Any) -> Any:
    """Apply Pillow's SMOOTH filter, which leaves the outermost pixels unchanged."""
    rows = images_BHWC[:, :-2] + images_BHWC[:, 1:-1] + images_BHWC[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = (box + 4.0 * images_BHWC[:, 1:-1, 1:-1]) / 13.0
    middle = ops.concatenate([images_BHWC[:, 1:-1, :1], inner, images_BHWC[:, 1:-1, -1:]], axis=2)
    return ops.concatenate([images_BHWC[:, :1], middle, images_BHWC[:, -1:]], axis=1)


def _per_image(value_B: Any) -> Any:
    return ops.reshape(value_B, (-1, 1, 1, 1))
