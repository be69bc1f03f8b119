"""Converts a user's image file to a stored square, and stored squares to pixels for the model.

Pillow reads users' files, because it detects damage and supports every mode; OpenCV decodes stored
JPEGs, because it is twice as fast. Imports neither Ray nor TensorFlow.
"""

import io
import struct
import threading
import warnings
from typing import Literal

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from ray_jobs.config.spec import PrepareSpec

Aspect = Literal["stretch", "crop", "pad"]

# Excludes formats for which Pillow runs programs or opens further files (EPS, WMF, …).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")

_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_REDUCED = {
    1: _RGB,
    # OpenCV's flags for colour also set BGR; those for grey set only the bit of the reduction.
    2: _RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: _RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: _RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_WHITE = (255, 255, 255, 255)
# Start of the data of a JPEG 2000 image; its size follows.
_CODESTREAM = b"\xff\x4f\xff\x51"
# Start of frame markers of a JPEG; its size follows.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class BadImage(Exception):
    """An unusable image.

    Args:
        reason: Identifier by which images are counted, such as `unreadable_image`.
        detail: Explanation for the user.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def prepare_image(content: bytes, spec: PrepareSpec) -> bytes:
    """Return a user's image as a square of `prepare.image_size`: a JPEG or, by `store`, raw pixels.

    Raises:
        BadImage: If the image cannot be used.
    """
    # Resampling from at least twice the size keeps the quality.
    image = decode(content, spec.max_image_pixels, at_least=2 * spec.image_size)
    square = to_square(image, spec.image_size, spec.aspect)
    return square.tobytes() if spec.store == "raw" else encode_jpeg(square, spec.jpeg_quality)


def decode(content: bytes, max_pixels: int, at_least: int | None = None) -> Image.Image:
    """Return an image file as upright RGB without metadata.

    Scales 16-bit greys to 8 bits and replaces transparency by white.

    Args:
        content: The file.
        max_pixels: Larger images are rejected before they are decoded.
        at_least: Allows decoding a JPEG at 1/2, 1/4 or 1/8 of its size, as long as neither side
            becomes shorter than this number of pixels.

    Raises:
        BadImage: `unreadable_image`, `animated_image` (more than one frame) or `too_large_image`.
    """
    if not content:
        raise BadImage("unreadable_image", "the file is empty")
    # Pillow's own limit differs from `max_pixels`, which is checked below.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with _suppress_warnings, Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _require_usable(image, max_pixels)
            if image.format == "JPEG2000":
                _require_consistent_size(image, content)
            if at_least:
                image.draft(None, (at_least, at_least))
            image.load()
            upright = ImageOps.exif_transpose(image)
            rgb = _to_rgb(upright)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(
            "unreadable_image", f"no image of a known format ({', '.join(FORMATS)})"
        ) from None
    # Pillow's decoders raise any exception on damaged data.
    except Exception as error:
        raise BadImage("unreadable_image", str(error) or type(error).__name__) from error
    rgb.info = {}
    return rgb


def to_square(image: Image.Image, size: int, aspect: Aspect) -> Image.Image:
    """Return an RGB image as a square of `size` × `size` pixels, resampled by Lanczos.

    `aspect` selects how: `stretch` to the square, `crop` to the centre, or `pad` with black.
    """
    width, height = image.size
    if aspect == "pad":
        scale = size / max(width, height)
        inner = (max(round(width * scale), 1), max(round(height * scale), 1))
        square = Image.new("RGB", (size, size))
        corner = ((size - inner[0]) // 2, (size - inner[1]) // 2)
        square.paste(image.resize(inner, Image.Resampling.LANCZOS), corner)
        return square
    box = (0.0, 0.0, float(width), float(height))
    if aspect == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Return an RGB image as a JPEG; equal pixels give equal bytes."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def decode_stored(
    content: bytes | pa.Buffer,
    stored_shape: tuple[int, int, int] | None = None,
    shape: tuple[int, int, int] | None = None,
) -> np.ndarray:
    """Return the RGB pixels of a stored JPEG at the size of the model: uint8 (H, W, 3).

    To be fast, decodes at 1/2, 1/4 or 1/8 of the size where that suffices. Uses a single thread.
    Checks the size in the JPEG's header before allocating memory.

    Args:
        content: The JPEG.
        stored_shape: Required shape of the JPEG; any by default.
        shape: Shape to return; the stored one by default.

    Raises:
        ValueError: If the JPEG cannot be decoded or has another shape.
    """
    shape = shape or stored_shape
    reduced = 1
    if shape and stored_shape:
        reduced = max(n for n in _REDUCED if n == 1 or n * max(shape[:2]) <= min(stored_shape[:2]))
    size = stored_size(content)
    if stored_shape and size != stored_shape[:2]:
        raise ValueError(f"its shape is {(*size, 3)}, but the manifest says {stored_shape}")
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), _REDUCED[reduced])
    if pixels is None:
        raise ValueError(f"its {len(content)} bytes are not a JPEG")
    return resize(pixels, shape) if shape else pixels


def stored_size(content: bytes | pa.Buffer) -> tuple[int, int]:
    """Return the height and width in a JPEG's header, without decoding it.

    Source: ITU-T T.81, annex B.

    Raises:
        ValueError: If the header has no size.
    """
    data, position = memoryview(content).cast("B"), 2
    if data[:2] == b"\xff\xd8":
        while len(data) >= position + 9 and data[position] == 0xFF:
            if data[position + 1] in _FRAMES:
                height, width = struct.unpack_from(">HH", data, position + 5)
                return height, width
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    raise ValueError(f"its {len(data)} bytes are not a JPEG")


def resize(pixels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Resize pixels bilinearly, or by area means to half the size or less."""
    if pixels.shape == shape:
        return pixels
    small = 2 * shape[0] <= pixels.shape[0] and 2 * shape[1] <= pixels.shape[1]
    method = cv2.INTER_AREA if small else cv2.INTER_LINEAR
    return cv2.resize(pixels, (shape[1], shape[0]), interpolation=method)


def _require_usable(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if not width or not height:
        raise BadImage("unreadable_image", f"it has {width} × {height} pixels")
    if width * height > max_pixels:
        raise BadImage(
            "too_large_image",
            f"it has {width} × {height} pixels, more than prepare.max_image_pixels={max_pixels}",
        )
    # Phones append a preview or a depth map to the photo (MPO); the photo is the first frame.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise BadImage("animated_image", f"it has {frames} frames; extract one of them")


def _require_consistent_size(image: Image.Image, content: bytes) -> None:
    """Check that a JPEG 2000 file has the same size in its header and in its data.

    Pillow reads only the header; the decoder allocates memory for the size in the data.
    """
    start = -1
    while (start := content.find(_CODESTREAM, start + 1)) >= 0:
        sides = content[start + 8 : start + 24]
        if len(sides) == 16:
            right, lower, left, upper = struct.unpack(">IIII", sides)
            if (right - left, lower - upper) != image.size:
                raise BadImage(
                    "unreadable_image",
                    f"its header says {image.width} × {image.height} pixels and its data "
                    f"{right - left} × {lower - upper}",
                )


class _SuppressWarnings:
    """Suppresses Pillow's warnings about metadata, in any number of threads.

    Warning filters are global to a process: the first thread to enter sets them, the last one to
    leave restores them.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._caught = warnings.catch_warnings(action="ignore")
                self._caught.__enter__()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)


_suppress_warnings = _SuppressWarnings()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, _WHITE)
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale a 16-bit grey image to 8 bits; Pillow's conversion would clip it."""
    values = np.asarray(image)
    # Older files store 16-bit greys as 32-bit integers; wider values have no known range.
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise BadImage(
            "unreadable_image",
            f"its values, {values.min():g} to {values.max():g}, have no known range; "
            "store it with 8 or 16 bits",
        )
    return Image.fromarray(np.rint(values.astype(np.float32) / 257.0).astype(np.uint8))
