"""Bilinear resampling of images under an affine map per image.

Shapes: B rows, H × W pixels, C channels.
"""

from dataclasses import dataclass
from typing import Any

from keras import ops


@dataclass(frozen=True)
class Affine:
    """Maps (x, y), relative to the centre, to a source position; entries are numbers or (B,)."""

    xx: Any = 1.0
    xy: Any = 0.0
    x1: Any = 0.0
    yx: Any = 0.0
    yy: Any = 1.0
    y1: Any = 0.0

    def __call__(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return the source position of (x, y)."""
        return self.xx * x + self.xy * y + self.x1, self.yx * x + self.yy * y + self.y1

    def then(self, other: "Affine") -> "Affine":
        """Return the map that applies this map first, then another."""
        x1, y1 = other(self.x1, self.y1)
        return Affine(
            other.xx * self.xx + other.xy * self.yx,
            other.xx * self.xy + other.xy * self.yy,
            x1,
            other.yx * self.xx + other.yy * self.yx,
            other.yx * self.xy + other.yy * self.yy,
            y1,
        )


def resample(images_BHWC: Any, source: Affine) -> Any:
    """Return images whose pixels are read, bilinearly, from source positions.

    Positions outside an image are reflected at its edges. The result equals that of
    `ops.image.affine_transform(…, fill_mode="reflect")`, which has no XLA kernel in TensorFlow.
    """
    height, width, channels = images_BHWC.shape[1:]
    x_W: Any = ops.reshape(ops.arange(width, dtype="float32"), (1, 1, -1))
    y_H: Any = ops.reshape(ops.arange(height, dtype="float32"), (1, -1, 1))
    entries = [ops.convert_to_tensor(e, dtype="float32") for e in vars(source).values()]
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
    """Return the two pixels around a reflected position, and its distance from the first one."""
    # Reflected at the outer edges of the pixels: d c b a | a b c d | d c b a.
    periodic: Any = ops.mod(position + 0.5, 2.0 * size)
    from_edge: Any = ops.abs(periodic - size)
    position = ops.clip(size - 0.5 - from_edge, 0.0, size - 1.0)
    below: Any = ops.floor(position)
    first: Any = ops.cast(below, "int32")
    return first, ops.minimum(first + 1, size - 1), ops.expand_dims(position - below, -1)
