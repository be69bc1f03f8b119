"""Makes photo-like images: noise at every scale, so that JPEG coding takes a realistic time."""

import io
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import csv

_OCTAVES = range(1, 8)


def photo(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return an image, uint8 (size, size, 3); finer noise is weaker."""
    pixels = np.full((size, size, 3), 128.0, np.float32)
    for octave in _OCTAVES:
        side = min(2**octave, size)
        noise = rng.normal(size=(side, side, 3)).astype(np.float32)
        pixels += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC) * 60 / octave**1.5
    pixels += rng.normal(size=pixels.shape) * 4
    return np.clip(pixels, 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    """Encode pixels as JPEG."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def make_jpegs(size: int, count: int = 1, rng: np.random.Generator | None = None) -> list[bytes]:
    """Return different photos of `size` × `size` pixels as JPEGs."""
    rng = rng or np.random.default_rng(0)
    return [jpeg(photo(rng, size)) for _ in range(count)]


def write_photos(folder: Path, num_rows: dict[str, int], size: int, num_distinct: int) -> None:
    """Write images and table.csv for `prepare`, with the split column `split`.

    Args:
        folder: Folder to create.
        num_rows: Rows of each split.
        size: Side of the images in pixels.
        num_distinct: Number of distinct images, which the rows repeat.
    """
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    contents = make_jpegs(size, num_distinct, rng)
    splits = [split for split, count in num_rows.items() for _ in range(count)]
    for i in range(len(splits)):
        (folder / "images" / f"{i}.jpg").write_bytes(contents[i % num_distinct])
    numbers = rng.normal(size=(4, len(splits)))
    columns = {f"number_{i}": column for i, column in enumerate(numbers)}
    label = np.arange(len(splits)) % 2
    keys = [str(i) for i in range(len(splits))]
    table = pa.table({"key": keys, "split": splits, **columns, "label": label})
    csv.write_csv(table, folder / "table.csv")
