"""One image: a user's file → an RGB square → stored JPEG or pixels → what a model takes.

Enters: encoded bytes of any common format.  Leaves: `BadImage` with a reason, or pixels.

Pillow reads users' files, since it notices damage and knows every mode; OpenCV reads back what was
stored, since it is twice as fast.  Imports neither Ray nor TensorFlow.
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

Aspect = Literal["stretch", "crop", "pad"]

# Pillow also opens formats that run other programs or fetch other files (EPS, WMF, …).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")

_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_REDUCED = {
    # As stored: what a JPEG says of its orientation is for users' files.
    1: _RGB,
    # The grey flags hold the bit of the reduction alone; those of colour say BGR, too.
    2: _RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: _RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: _RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_WHITE = (255, 255, 255, 255)
# How the data of a JPEG 2000 image begins; its sides follow.
_CODESTREAM = b"\xff\x4f\xff\x51"
# The markers that begin a JPEG's frame, where its sides are.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class BadImage(Exception):
    """An image that cannot be used: `reason` is one word to count by, `detail` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def prepare_image(
    content: bytes,
    size: int,
    aspect: Aspect,
    quality: int,
    max_pixels: int,
    store: Literal["jpeg", "raw"] = "jpeg",
) -> bytes:
    """Return a user's image file as it is stored: a JPEG of `size` × `size` pixels, or those alone.

    Raises:
        BadImage: if it cannot be used.
    """
    # Twice the size that is kept leaves the resampling enough to work with.
    image = decode(content, max_pixels, at_least=2 * size)
    square = to_square(image, size, aspect)
    return square.tobytes() if store == "raw" else encode_jpeg(square, quality)


def decode(content: bytes, max_pixels: int, at_least: int | None = None) -> Image.Image:
    """Return an image file as RGB, turned upright, without metadata.

    16-bit greys are scaled to 8 bits; transparent parts become white, as on a page.

    Args:
        content: the file.
        max_pixels: larger images are refused before they are decoded.
        at_least: a large JPEG may be decoded at a half, a quarter or an eighth of its size, as
            long as neither side gets shorter than this.

    Raises:
        BadImage: `unreadable_image`, `animated_image` (more than one frame) or `too_large_image`.
    """
    if not content:
        raise BadImage("unreadable_image", "the file is empty")
    # Pillow's own limit warns or raises by another number; ours is checked below.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with _silence, Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _require_usable(image, max_pixels)
            if image.format == "JPEG2000":
                _require_honest(image, content)
            if at_least:
                image.draft(None, (at_least, at_least))
            image.load()
            upright = ImageOps.exif_transpose(image)
            rgb = _to_rgb(upright)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("unreadable_image", f"no image of a known format ({_known()})") from None
    # On damaged data Pillow's decoders raise whatever they trip over.
    except Exception as error:
        raise BadImage("unreadable_image", str(error) or type(error).__name__) from error
    rgb.info = {}
    return rgb


def to_square(image: Image.Image, size: int, aspect: Aspect) -> Image.Image:
    """Return an RGB image as a square of `size` pixels, resampled by Lanczos.

    Args:
        image: RGB.
        size: side of the square.
        aspect: `stretch` both sides, `crop` to the centre, or `pad` with black.
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
    """Return an RGB image as JPEG; the same pixels give the same bytes."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def decode_stored(
    content: bytes | pa.Buffer,
    stored_shape: tuple[int, int, int] | None = None,
    shape: tuple[int, int, int] | None = None,
) -> np.ndarray:
    """Return the pixels of a stored JPEG at the size a model takes: uint8 (H, W, 3), RGB.

    Decoding a JPEG takes one thread, whatever OpenCV's number of threads is. At half the stored
    size or less it is decoded at a half, a quarter or an eighth, which is cheaper. One that says
    that it has another size is refused before it takes memory.

    Args:
        content: the JPEG.
        stored_shape: that it must have; by default whatever it has.
        shape: to return; the stored one by default.

    Raises:
        ValueError: if it cannot be decoded or has another shape.
    """
    shape = shape or stored_shape
    reduced = 1
    if shape and stored_shape:
        reduced = max(n for n in _REDUCED if n == 1 or n * max(shape[:2]) <= min(stored_shape[:2]))
    size = stored_size(content)
    if stored_shape and size != stored_shape[:2]:
        raise ValueError(f"its shape is {(*size, 3)}, the manifest says {stored_shape}")
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), _REDUCED[reduced])
    if pixels is None:
        raise ValueError(f"{len(content)} bytes that are no image")
    return resized(pixels, shape) if shape else pixels


def stored_size(content: bytes | pa.Buffer) -> tuple[int, int]:
    """Return the height and width that a JPEG says it has, in the time of a few of its pixels.

    Source: ITU-T T.81, annex B.

    Raises:
        ValueError: if it says none.
    """
    data, place = memoryview(content).cast("B"), 2
    if data[:2] == b"\xff\xd8":
        while len(data) >= place + 9 and data[place] == 0xFF:
            if data[place + 1] in _FRAMES:
                height, width = struct.unpack_from(">HH", data, place + 5)
                return height, width
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    raise ValueError(f"{len(data)} bytes that are no image")


def resized(pixels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return pixels at another size: bilinear, or means over areas for less than half the size."""
    if pixels.shape == shape:
        return pixels
    small = 2 * shape[0] <= pixels.shape[0] and 2 * shape[1] <= pixels.shape[1]
    way = cv2.INTER_AREA if small else cv2.INTER_LINEAR
    return cv2.resize(pixels, (shape[1], shape[0]), interpolation=way)


def _require_usable(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if not width or not height:
        raise BadImage("unreadable_image", f"it has {width} × {height} pixels")
    if width * height > max_pixels:
        raise BadImage(
            "too_large_image",
            f"it has {width} × {height} pixels, more than prepare.max_image_pixels={max_pixels}",
        )
    # Phones put a preview or a depth map behind the photo (MPO); the photo is the first frame.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise BadImage("animated_image", f"it has {frames} frames; give one of them")


def _require_honest(image: Image.Image, content: bytes) -> None:
    """Check that a JPEG 2000 file's data has the size in its header.

    Pillow looks at the header alone, and the decoder would take memory for what the data says.
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


class _Silence:
    """Keeps Pillow's warnings about odd metadata to itself, in any number of threads.

    Which warnings are shown is the whole process's: the first thread to come in silences them, the
    last one to go out restores what was.
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


_silence = _Silence()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, _WHITE)
        image = Image.alpha_composite(page, image.convert("RGBA"))
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Return a 16-bit grey image with 8 bits; Pillow's own conversion would clip it."""
    values = np.asarray(image)
    # Older files hold 16-bit greys in 32-bit integers; wider ones tell no range to scale from.
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise BadImage(
            "unreadable_image",
            f"its values, {values.min():g} to {values.max():g}, have no known range; "
            "store it with 8 or 16 bits",
        )
    return Image.fromarray(np.rint(values.astype(np.float32) / 257.0).astype(np.uint8))


def _known() -> str:
    return ", ".join(FORMATS)
