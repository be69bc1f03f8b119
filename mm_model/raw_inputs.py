"""Builds a TensorFlow graph from image files, numbers and words to the inputs of a model.

It lets a SavedModel answer without this package: the graph repeats what `prepare` and the feed do
with pixels. Its resampling is TensorFlow's, so pixels can differ by a few levels.

Shapes: B rows, N images per row, H × W pixels, F numbers, C categories.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tensorflow as tf

from mm_model.statistics import Vocabulary

_REDUCED = (8, 4, 2, 1)
_ACCURATE = "INTEGER_ACCURATE"


@dataclass(frozen=True)
class StoredFormat:
    """How training images were stored, between the user's files and the pixels of the model."""

    size: int
    """Side of the stored square."""
    aspect: Literal["stretch", "crop", "pad"]
    """How an image becomes a square."""
    jpeg_quality: int | None
    """Quality of the stored JPEG; None for raw pixels."""


def raw_signature(model: Any) -> dict[str, Any]:
    """Return the inputs of the graph: `image`, `numeric` and `words`, as far as the model has them.

    `image` has the content of JPEG or PNG files, (B,) or (B, N) for several images per row; an
    empty string is a missing image. `numeric` (B, F) has NaN for missing numbers, `words` (B, C)
    empty strings for missing words. Other inputs, such as token ids, are those of the model.
    """
    shapes = {name: tensor.shape[1:] for name, tensor in model.network.input.items()}
    signature: dict[str, Any] = {}
    if "image" in shapes:
        signature["image"] = tf.TensorSpec((None, *shapes["image"][:-3]), tf.string, "image")
    if "numeric" in shapes:
        signature["numeric"] = tf.TensorSpec((None, *shapes["numeric"]), tf.float32, "numeric")
    if "category" in shapes:
        signature["words"] = tf.TensorSpec((None, *shapes["category"]), tf.string, "words")
    for name in ("text", "text_mask"):
        if name in shapes:
            kind = tf.int32 if name == "text" else tf.float32
            signature[name] = tf.TensorSpec((None, *shapes[name]), kind, name)
    return signature


def raw_inputs(
    model: Any, stored: StoredFormat, vocabularies: Sequence[Vocabulary], placeholder: int = 0
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the function from the inputs of `raw_signature` to those of the model.

    Args:
        model: A `FusionModel` or `MeanModel` that takes images, not precomputed features.
        stored: Format of the stored images.
        vocabularies: Vocabularies of the categorical columns.
        placeholder: Value of the pixels of a missing image.
    """
    shapes = {name: tensor.shape[1:] for name, tensor in model.network.input.items()}

    def convert(raw: dict[str, Any]) -> dict[str, Any]:
        inputs = {name: raw[name] for name in shapes if name in raw}
        if "image" in shapes:
            side = shapes["image"][-2]
            contents: Any = raw["image"]
            empty: Any = tf.fill((side, side, 3), tf.constant(placeholder, tf.uint8))

            def pixels(content: Any) -> Any:
                return tf.cond(content == "", lambda: empty, lambda: _pixels(content, stored, side))

            images = tf.map_fn(pixels, tf.reshape(contents, (-1,)), fn_output_signature=empty.dtype)
            inputs["image"] = tf.reshape(images, (-1, *shapes["image"]))
            if "image_mask" in shapes:
                inputs["image_mask"] = tf.cast(contents != "", tf.float32)
        if "category" in shapes:
            columns = [_codes(raw["words"][:, i], v) for i, v in enumerate(vocabularies)]
            inputs["category"] = tf.stack(columns, axis=1)
        return inputs

    return convert


def _pixels(content: Any, stored: StoredFormat, side: int) -> Any:
    """Return the content of an image file as uint8 (side, side, 3)."""
    square = _to_square(_decode(content), stored)
    if stored.jpeg_quality is None:
        return _resize(square, side)
    file: Any = tf.io.encode_jpeg(square, quality=stored.jpeg_quality, chroma_downsampling=True)
    reduced = next(n for n in _REDUCED if n == 1 or n * side <= stored.size)
    return _resize(tf.io.decode_jpeg(file, 3, ratio=reduced, dct_method=_ACCURATE), side)


def _decode(content: Any) -> Any:
    """Return an image file as uint8 (H, W, 3), transparency over white."""

    def png() -> Any:
        rgba = tf.cast(tf.io.decode_png(content, channels=4), tf.float32)
        alpha = rgba[..., 3:] / 255
        return tf.cast(tf.round(rgba[..., :3] * alpha + 255 * (1 - alpha)), tf.uint8)

    return tf.cond(
        tf.io.is_jpeg(content), lambda: tf.io.decode_jpeg(content, 3, dct_method=_ACCURATE), png
    )


def _to_square(image: Any, stored: StoredFormat) -> Any:
    """Return an image as a square, resampled by Lanczos as Pillow does."""
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    side = float(stored.size)
    if stored.aspect == "stretch":
        scale: Any = side / size
        shift: Any = tf.zeros(2)
    elif stored.aspect == "crop":
        shortest = tf.reduce_min(size)
        scale = tf.fill((2,), side / shortest)
        shift = -(size - shortest) / 2 * scale
    else:
        inner = tf.maximum(tf.round(size * (side / tf.reduce_max(size))), 1.0)
        scale = inner / size
        shift = tf.floor((side - inner) / 2)
    # Like Pillow, first the rows of pixels, then the columns, each rounded to 8 bits.
    for is_along in (tf.constant([False, True]), tf.constant([True, False])):
        resampled: Any = tf.raw_ops.ScaleAndTranslate(
            images=tf.cast(image, tf.float32)[None],
            size=tf.where(is_along, stored.size, tf.shape(image)[:2]),
            scale=tf.where(is_along, scale, 1.0),
            translation=tf.where(is_along, shift, 0.0),
            kernel_type="lanczos3",
            antialias=True,
        )
        image = _to_uint8(resampled[0])
    return tf.ensure_shape(image, (stored.size, stored.size, 3))


def _resize(image: Any, side: int) -> Any:
    """Return a square at the size of the model, as the feed resizes stored images."""
    stored = image.shape[0]
    if stored == side:
        return tf.ensure_shape(image, (side, side, 3))
    method = "area" if stored is not None and 2 * side <= stored else "bilinear"
    resized: Any = tf.image.resize(tf.cast(image, tf.float32), (side, side), method)
    return _to_uint8(resized)


def _to_uint8(values: Any) -> Any:
    return tf.cast(tf.clip_by_value(tf.round(values), 0.0, 255.0), tf.uint8)


def _codes(words_B: Any, vocabulary: Vocabulary) -> Any:
    """Return the code of each word."""
    if not vocabulary.words:
        return tf.where(words_B == "", Vocabulary.MISSING, Vocabulary.UNKNOWN)
    is_equal: Any = words_B[:, None] == tf.constant(vocabulary.words)
    known = tf.argmax(tf.cast(is_equal, tf.int32), axis=1, output_type=tf.int32) + 2
    code = tf.where(tf.reduce_any(is_equal, axis=1), known, Vocabulary.UNKNOWN)
    return tf.where(words_B == "", Vocabulary.MISSING, code)
