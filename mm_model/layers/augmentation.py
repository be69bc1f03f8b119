"""Random changes of training images, pixels 0-255, on the device that trains.

Every row draws for itself (`mm_model.per_row_random`), everything is one static graph of dense
operations in float32 that XLA can compile, and nothing happens at inference.

Keras' own layers do none of this: their draws depend on the number of replicas, they resample once
a change, and neither RandAugment nor their rotation compiles with XLA.

Shapes: B rows, H × W pixels, C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import layers, ops

from mm_model import per_row_random
from mm_model.layers.blocks import register
from mm_model.spec import AugmentationSpec

WHITE = 255.0


def augmentation(spec: AugmentationSpec) -> list[layers.Layer]:
    """Return the augmentation layers that a spec asks for."""
    made: list[layers.Layer] = []
    if spec.flip != "none" or spec.rotation or spec.zoom or spec.translation:
        made.append(
            RandomGeometry(
                spec.flip, spec.rotation, spec.zoom, spec.translation, name="augment_geometry"
            )
        )
    if spec.contrast or spec.brightness:
        made.append(RandomColour(spec.contrast, spec.brightness, name="augment_colour"))
    if spec.rand_augment:
        made.append(RandAugment(spec.rand_augment, name="augment_rand"))
    return made


class Augmentation(layers.Layer):
    """Changes float32 images of shape (B, H, W, C) while training, and then alone."""

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        # Half precision holds no fraction of a pixel of 255.
        super().__init__(autocast=False, **kwargs)
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, images_BHWC: Any, training: bool = False) -> Any:
        """Change images while training."""
        return self.changed(ops.cast(images_BHWC, "float32")) if training else images_BHWC

    def changed(self, images_BHWC: Any) -> Any:
        """Return the images with a random change each."""
        raise NotImplementedError

    def draw(self, images_BHWC: Any, count: int) -> list[Any]:
        """Return `count` draws from [-1, 1), each of shape (B,)."""
        shape: Any = ops.shape(images_BHWC)
        draw = per_row_random.uniform((shape[0], count), self.seed_generator, -1.0, 1.0)
        return [draw[:, i] for i in range(count)]

    def compute_output_shape(self, input_shape):
        """Return the shape unchanged."""
        return input_shape


@register
class RandomGeometry(Augmentation):
    """Mirrors, turns, zooms and shifts, in one bilinear resampling; what comes in is reflected.

    The image is mirrored first, then turned and zoomed about its centre, then shifted. Where only
    mirroring is asked for, no pixel is interpolated.

    Args:
        flip: as `AugmentationSpec.flip`; along each axis every other image, on average.
        rotation: largest rotation to either side, as a share of a full turn.
        zoom: images become at most this share smaller (1 / (1 + zoom)) or larger (1 / (1 - zoom)).
        translation: largest shift along each axis, as a share of the image.
        seed: of the draws.
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

    def changed(self, images_BHWC: Any) -> Any:
        """Return the images, each under a map of its own."""
        flip_x, flip_y, turn, zoom, shift_x, shift_y = self.draw(images_BHWC, 6)
        flips_x = self.flip in ("horizontal", "horizontal_and_vertical")
        flips_y = self.flip in ("vertical", "horizontal_and_vertical")
        if not (self.rotation or self.zoom or self.translation):
            for flips, draw_B, axis in ((flips_x, flip_x, 2), (flips_y, flip_y, 1)):
                if flips:
                    flipped = ops.flip(images_BHWC, axis=axis)
                    images_BHWC = ops.where(_of_image(draw_B) < 0, flipped, images_BHWC)
            return images_BHWC
        height, width = images_BHWC.shape[1:3]
        shift = Affine(
            x1=-shift_x * (self.translation * width), y1=-shift_y * (self.translation * height)
        )
        scale, angle = 1.0 + zoom * self.zoom, turn * (2 * math.pi * self.rotation)
        cos, sin = scale * ops.cos(angle), scale * ops.sin(angle)
        flip = Affine(
            xx=ops.where(flip_x < 0, -1.0, 1.0) if flips_x else 1.0,
            yy=ops.where(flip_y < 0, -1.0, 1.0) if flips_y else 1.0,
        )
        return resampled(images_BHWC, shift.then(Affine(cos, -sin, 0, sin, cos, 0)).then(flip))

    def get_config(self) -> dict:
        """Return the settings."""
        names = ("flip", "rotation", "zoom", "translation")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@register
class RandomColour(Augmentation):
    """Changes contrast and brightness of each image, all channels alike, and cuts at 0 and 255.

    Args:
        contrast: deviations from the mean of each channel grow or shrink by at most this share.
        brightness: largest shift of all pixels, as a share of 255.
        seed: of the draws.
    """

    def __init__(self, contrast: float = 0.0, brightness: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.contrast, self.brightness = contrast, brightness

    def changed(self, images_BHWC: Any) -> Any:
        """Return the images in other colours."""
        contrast_B, brightness_B = self.draw(images_BHWC, 2)
        shift = _of_image(brightness_B * (self.brightness * WHITE))
        if self.contrast:
            factor = _of_image(1.0 + contrast_B * self.contrast)
            mean: Any = ops.mean(images_BHWC, axis=(1, 2), keepdims=True)
            # (x - mean) × factor + mean, with one product a pixel.
            images_BHWC, shift = images_BHWC * factor, shift + mean * (1.0 - factor)
        return ops.clip(images_BHWC + shift, 0.0, WHITE)

    def get_config(self) -> dict:
        """Return the settings."""
        return {
            **super().get_config(),
            "contrast": self.contrast,
            "brightness": self.brightness,
        }


@register
class RandAugment(Augmentation):
    """Two operations an image, drawn from a list, all of one magnitude.

    Cubuk et al. 2019, "RandAugment: Practical automated data augmentation with a reduced search
    space", arXiv 1909.13719. The list is theirs without equalize, whose histograms are dear; the
    geometric ones of the two come first, in one bilinear resampling. Signs are drawn by image. At
    magnitude m, with the ranges of Cubuk et al. 2018 (AutoAugment, arXiv 1805.09501, table 6):

        identity
        rotate                                      by 30° × m
        shear_x, shear_y                            by 0.3 × m
        translate_x, translate_y                    by 0.45 × m of the image
        brightness, contrast, colour, sharpness     times 1 ± 0.9 × m, as Pillow's `ImageEnhance`
        autocontrast                                each channel's range to 0-255
        posterize                                   to 8 - round(4 × m) bits a channel
        solarize                                    invert from 256 × (1 - m) up

    Args:
        magnitude: m, in (0, 1).
        operations: names of those that are drawn from.
        num_operations: drawn an image.
        seed: of the draws.
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

    def changed(self, images_BHWC: Any) -> Any:
        """Return the images, each after its operations."""
        draw = self.draw(images_BHWC, 2 * self.num_operations)
        share = [(d + 1.0) * (len(self.operations) / 2) for d in draw[::2]]
        chosen = [ops.cast(ops.floor(s), "int32") for s in share]
        signs = [ops.where(d < 0, -1.0, 1.0) for d in draw[1::2]]
        if set(self.operations) & set(self.GEOMETRIC):
            position = Affine()
            # What is done last maps the result first.
            for chosen_B, sign_B in reversed(list(zip(chosen, signs, strict=True))):
                position = position.then(self._map(images_BHWC, chosen_B, sign_B))
            images_BHWC = resampled(images_BHWC, position)
        for chosen_B, sign_B in zip(chosen, signs, strict=True):
            images_BHWC = self._coloured(images_BHWC, _of_image(chosen_B), _of_image(sign_B))
        return images_BHWC

    def _where(self, name: str, chosen: Any, then: Any, otherwise: Any) -> Any:
        """Return `then` for the rows that drew an operation, `otherwise` for the others."""
        place = self.operations.index(name) if name in self.operations else -1
        return ops.where(ops.equal(chosen, place), then, otherwise)

    def _map(self, images_BHWC: Any, chosen_B: Any, sign_B: Any) -> "Affine":
        """Return the map of the geometric operation; the identity where it is none."""
        height, width = images_BHWC.shape[1:3]

        def amount(name: str, largest: float) -> Any:
            return self._where(name, chosen_B, sign_B * (self.magnitude * largest), 0.0)

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

    def _coloured(self, x: Any, chosen: Any, sign: Any) -> Any:
        """Return the images after the operation on colours, if it is one.

        What enhances and stretches is factor × x + a share of something else; the factor is 1 and
        every share 0 for rows that drew another operation, so that all go the same way.
        """
        grey: Any = x[..., :1] * 0.299 + x[..., 1:2] * 0.587 + x[..., 2:] * 0.114
        share = sign * (-0.9 * self.magnitude)
        of = {name: self._where(name, chosen, share, 0.0) for name in self.ENHANCING}
        low: Any = ops.min(x, axis=(1, 2), keepdims=True)
        span: Any = ops.max(x, axis=(1, 2), keepdims=True) - low
        # A channel of one value stays as it is.
        low, span = ops.where(span > 0, low, 0.0), ops.where(span > 0, span, WHITE)
        factor = self._where("autocontrast", chosen, WHITE / span, 1.0 - sum(of.values()))
        shift = self._where(
            "autocontrast",
            chosen,
            low * (-WHITE / span),
            of["contrast"] * ops.mean(grey, axis=(1, 2), keepdims=True),
        )
        others = of["colour"] * grey + of["sharpness"] * _smoothed(x)
        x = ops.clip(x * factor + shift + others, 0.0, WHITE)
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


@dataclass(frozen=True)
class Affine:
    """Where the pixel at (x, y) from the centre comes from; every entry a number or (B,)."""

    xx: Any = 1.0
    xy: Any = 0.0
    x1: Any = 0.0
    yx: Any = 0.0
    yy: Any = 1.0
    y1: Any = 0.0

    def __call__(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return the position that (x, y) comes from."""
        return self.xx * x + self.xy * y + self.x1, self.yx * x + self.yy * y + self.y1

    def then(self, other: "Affine") -> "Affine":
        """Return the map that looks up the position of this one through another."""
        x1, y1 = other(self.x1, self.y1)
        return Affine(
            other.xx * self.xx + other.xy * self.yx,
            other.xx * self.xy + other.xy * self.yy,
            x1,
            other.yx * self.xx + other.yy * self.yx,
            other.yx * self.xy + other.yy * self.yy,
            y1,
        )


def resampled(images_BHWC: Any, position: Affine) -> Any:
    """Return images whose pixels come from other positions: bilinear, reflected at the edges.

    The same as `ops.image.affine_transform(…, fill_mode="reflect")`, for which TensorFlow has no
    XLA kernel.
    """
    height, width, channels = images_BHWC.shape[1:]
    x_W: Any = ops.reshape(ops.arange(width, dtype="float32"), (1, 1, -1))
    y_H: Any = ops.reshape(ops.arange(height, dtype="float32"), (1, -1, 1))
    entries = [ops.convert_to_tensor(e, dtype="float32") for e in vars(position).values()]
    from_centre = Affine(*(ops.reshape(e, (-1, 1, 1)) for e in entries))
    x_BHW, y_BHW = from_centre(x_W - (width - 1) / 2, y_H - (height - 1) / 2)
    left, right, in_x = _neighbours(x_BHW + (width - 1) / 2, width)
    upper, lower, in_y = _neighbours(y_BHW + (height - 1) / 2, height)
    shape: Any = ops.shape(images_BHWC)
    first: Any = ops.reshape(ops.arange(shape[0], dtype="int32") * (height * width), (-1, 1, 1))
    pixels = ops.reshape(images_BHWC, (-1, channels))

    def between(row: Any) -> Any:
        start: Any = first + row * width
        before: Any = ops.take(pixels, start + left, axis=0)
        after: Any = ops.take(pixels, start + right, axis=0)
        return before + (after - before) * in_x

    above, below = between(upper), between(lower)
    return above + (below - above) * in_y


def _neighbours(position: Any, size: int) -> tuple[Any, Any, Any]:
    """Return the pixels on both sides of a reflected position, and how far it is from the first."""
    # Reflected at the outer edges of the pixels: d c b a | a b c d | d c b a.
    turned: Any = ops.mod(position + 0.5, 2.0 * size)
    from_edge: Any = ops.abs(turned - size)
    position = ops.clip(size - 0.5 - from_edge, 0.0, size - 1.0)
    below: Any = ops.floor(position)
    first: Any = ops.cast(below, "int32")
    return first, ops.minimum(first + 1, size - 1), ops.expand_dims(position - below, -1)


def _smoothed(images_BHWC: Any) -> Any:
    """Return the images under Pillow's SMOOTH filter, which leaves the outermost pixels alone."""
    rows = images_BHWC[:, :-2] + images_BHWC[:, 1:-1] + images_BHWC[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = (box + 4.0 * images_BHWC[:, 1:-1, 1:-1]) / 13.0
    middle = ops.concatenate([images_BHWC[:, 1:-1, :1], inner, images_BHWC[:, 1:-1, -1:]], axis=2)
    return ops.concatenate([images_BHWC[:, :1], middle, images_BHWC[:, -1:]], axis=1)


def _of_image(value_B: Any) -> Any:
    return ops.reshape(value_B, (-1, 1, 1, 1))
