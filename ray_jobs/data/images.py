"""Converts a user's image file to a stored square, and stored squares to pixels for the model.

Pillow reads users' files, because it detects damage and supports every mode; OpenCV decodes stored
JPEGs, because it is twice as fast. Imports neither Ray nor TensorFlow.
"""

import io
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.data.batch import ORIGINAL_PIXELS

Aspect = Literal["stretch", "crop", "pad"]
PixelRange = tuple[float, float]
"""Values of black and white in images with more than 8 bits."""
EIGHT_BITS: PixelRange = (0.0, 255.0)
"""Found in a sample whose images have at most 8 bits, or 16 bits with such values."""

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
_BITS, _PHOTOMETRIC, _ORIENTATION, _EXTRA, _SAMPLE_FORMAT = 258, 262, 274, 338, 339
_WHITE_IS_ZERO, _PREMULTIPLIED, _SIGNED = 0, 1, 2
# Fraction of the pixels that may be far outside a range that other images use.
_MAX_FAR_OUTSIDE = 0.01
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


class StoredImage(NamedTuple):
    """An image as the shards contain it."""

    content: bytes
    """A JPEG or, by `prepare.store`, raw pixels."""
    original_pixels: int
    """Number of pixels of the user's image."""


def prepare_image(
    content: bytes, spec: PrepareSpec, found_range: PixelRange | None = None
) -> StoredImage:
    """Return a user's image as a square of `prepare.image_size`.

    Args:
        content: The file.
        spec: The `prepare` section.
        found_range: Range that a sample of the images uses; `prepare.pixel_range` overrides it.

    Raises:
        BadImage: If the image cannot be used.
    """
    # Resampling from at least twice the size keeps the quality.
    image = decode(
        content, spec.max_image_pixels, 2 * spec.image_size, spec.pixel_range, found_range
    )
    square = to_square(image, spec.image_size, spec.aspect)
    is_raw = spec.store == "raw"
    stored = square.tobytes() if is_raw else encode_jpeg(square, spec.jpeg_quality)
    return StoredImage(stored, image.info[ORIGINAL_PIXELS])


def decode(
    content: bytes,
    max_pixels: int,
    at_least: int | None = None,
    pixel_range: PixelRange | None = None,
    found_range: PixelRange | None = None,
) -> Image.Image:
    """Return an image file as upright RGB; its `info` has only the number of `ORIGINAL_PIXELS`.

    Scales images with more than 8 bits, clips them to their range, and replaces transparency by
    white.

    Args:
        content: The file.
        max_pixels: Larger images are rejected before they are decoded.
        at_least: Allows decoding a JPEG at 1/2, 1/4 or 1/8 of its size, as long as neither side
            becomes shorter than this number of pixels.
        pixel_range: Range that the user set.
        found_range: Range that a sample of the images uses; images far outside it are rejected.
            Without either, 16-bit images are scaled by 65,535.

    Raises:
        BadImage: `unreadable_image`, `animated_image` (more than one frame) or `too_large_image`.
    """
    with _translate_errors(content):
        if _is_dicom(content):
            values, own_range, inverted = _read_dicom(content, max_pixels, pixel_range)
            rgb = _to_rgb(_from_values(values, own_range, inverted))
            rgb.info = {ORIGINAL_PIXELS: rgb.width * rgb.height}
            return rgb
        with _open(content, max_pixels) as image:
            is_deep, tags = _is_deep(image), getattr(image, "tag_v2", {})
            original_pixels = image.width * image.height
            if at_least:
                image.draft(None, (at_least, at_least))
            image.load()
            if is_deep:
                values, alpha = _deep_values(image, content)
                known = pixel_range or _require_inside(values, found_range)
                inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
                scaled = _from_values(values, known, inverted)
                if alpha is not None:
                    scaled.putalpha(Image.fromarray((alpha >> 8).astype(np.uint8)))
                turned = Image.Exif()
                turned[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
                scaled.info["exif"] = turned.tobytes()
                image = scaled
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
            # Upright images still have their metadata.
            rgb.getexif().clear()
    rgb.info = {ORIGINAL_PIXELS: original_pixels}
    return rgb


def deep_values(content: bytes, max_pixels: int) -> np.ndarray | None:
    """Return the values of an image with more than 8 bits, without alpha; None for other images.

    DICOM files contain their own range, so they also give None.

    Raises:
        BadImage: If the image cannot be used.
    """
    with _translate_errors(content):
        if _is_dicom(content):
            return None
        with _open(content, max_pixels) as image:
            if not _is_deep(image):
                return None
            image.load()
            return _deep_values(image, content)[0]


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


@contextmanager
def _translate_errors(content: bytes) -> Iterator[None]:
    """Raise every error of a decoder as BadImage, and suppress warnings."""
    if not content:
        raise BadImage("unreadable_image", "the file is empty")
    try:
        with _suppress_warnings:
            yield
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        detail = f"no image of a known format ({', '.join(FORMATS)}, DICOM)"
        if content[:4] in (b"II*\0", b"MM\0*"):
            detail = (
                "a TIFF with unsupported values; store it as 8 or 16 bits, or grey 32-bit floats"
            )
        raise BadImage("unreadable_image", detail) from None
    # Decoders raise any exception on damaged data.
    except Exception as error:
        raise BadImage("unreadable_image", str(error) or type(error).__name__) from error


@contextmanager
def _open(content: bytes, max_pixels: int) -> Iterator[Image.Image]:
    # Pillow's own limit differs from `max_pixels`, which is checked below.
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        # Phones append a preview or a depth map to the photo (MPO); the photo is the first frame.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        _require_usable(image.size, frames, max_pixels)
        if image.format == "JPEG2000":
            _require_consistent_size(image, content)
        yield image


def _is_dicom(content: bytes) -> bool:
    return content[128:132] == b"DICM"


def _read_dicom(
    content: bytes, max_pixels: int, pixel_range: PixelRange | None
) -> tuple[np.ndarray, PixelRange, bool]:
    try:
        from ray_jobs.data import dicom
    except ImportError:
        detail = "reading DICOM files needs `pip install 'multimodal-ray[dicom]'`"
        raise BadImage("unreadable_image", detail) from None
    dataset, size, frames = dicom.open_file(content)
    _require_usable(size, frames, max_pixels)
    return dicom.read_pixels(dataset, pixel_range)


def _require_usable(size: tuple[int, int], frames: int, max_pixels: int) -> None:
    width, height = size
    if not width or not height:
        raise BadImage("unreadable_image", f"it has {width} × {height} pixels")
    if width * height > max_pixels:
        raise BadImage(
            "too_large_image",
            f"it has {width} × {height} pixels, more than prepare.max_image_pixels={max_pixels}",
        )
    if frames > 1:
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
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, _WHITE)
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    """Return whether an image that has not been loaded has values other than 0 to 255."""
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode in ("RGB", "RGBA"):
        # Pillow keeps the upper 8 of 16 bits; the other formats scale by the range in the file.
        if image.format == "TIFF":
            return 16 in tags.get(_BITS, ()) and tags.get(_EXTRA) != (_PREMULTIPLIED,)
        tile: Any = getattr(image, "tile", None)
        return image.format == "PNG" and bool(tile) and ";16" in str(tile[0][3])
    is_signed = image.mode == "L" and _SIGNED in tags.get(_SAMPLE_FORMAT, ())
    return image.mode in ("I", "F") or image.mode.startswith("I;16") or is_signed


def _deep_values(image: Image.Image, content: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the values, (H, W) or (H, W, RGB), and alpha of a loaded image that `_is_deep`.

    Alpha is uint16 (H, W), or None; 65,535 is opaque, whatever the range of the values.
    """
    if image.mode == "L":
        return np.asarray(image).view(np.int8), None
    if image.mode not in ("RGB", "RGBA"):
        return np.asarray(image), None
    bgra = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if bgra is None or bgra.dtype != np.uint16 or bgra.shape[:2] != image.size[::-1]:
        raise BadImage("unreadable_image", "its 16-bit colours cannot be read; store it as 8 bits")
    has_alpha = image.mode == "RGBA" or "transparency" in image.info
    return bgra[..., 2::-1], bgra[..., 3] if has_alpha else None


def _require_inside(values: np.ndarray, found_range: PixelRange | None) -> PixelRange:
    """Return the range by which to scale values.

    Raises:
        BadImage: If over 1% of the values are outside the range by more than its width, or any
            where no range was found.
    """
    if found_range:
        low, high = found_range
        far = np.mean((values < 2 * low - high) | (values > 2 * high - low))
        if far <= _MAX_FAR_OUTSIDE:
            return found_range
        problem = f"are far outside {low:g} to {high:g}, the range of the sampled images"
    else:
        if values.dtype.kind != "f" and values.min() >= 0 and values.max() <= 65535:
            return 0.0, 65535.0
        problem = "have no known range"
    raise BadImage(
        "unreadable_image",
        f"its values, {np.nanmin(values):g} to {np.nanmax(values):g}, {problem}; store it as 8 "
        "bits, or set prepare.pixel_range for all images",
    )


def _from_values(values: np.ndarray, pixel_range: PixelRange, inverted: bool) -> Image.Image:
    """Scale values from a range to 8 bits; clip values outside, and make NaN black."""
    low, high = pixel_range
    scaled = values.astype(np.float32)
    scaled -= low
    scaled /= (high - low) / 255
    np.nan_to_num(scaled, copy=False)
    pixels = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return Image.fromarray(255 - pixels if inverted else pixels)
