"""Finds the range of the values in images with more than 8 bits, from a sample of the images.

Such files rarely say which of their values are in use: 12-bit cameras and scanners write 16-bit
files, and floats have no fixed range. One range for all images keeps their brightness comparable.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.text import number_text
from ray_jobs.data.images import EIGHT_BITS, BadImage, PixelRange, deep_values
from ray_jobs.data.prefetch import prefetch_map
from ray_jobs.prepare.row_validation import CheckedRows
from ray_jobs.prepare.shards.shard_plan import Earlier
from ray_jobs.prepare.sources.source import ImageReader

_SAMPLE_IMAGES = 64
_INTEGERS = (255, 1023, 4095, 16383, 65535)


def find_pixel_range(
    rows: CheckedRows,
    readers: Sequence[ImageReader],
    spec: PrepareSpec,
    earlier: Earlier | None,
) -> tuple[PixelRange, str]:
    """Return the values of black and white, and a note for the user, empty for 8-bit images.

    The rule for the sample's minimum and maximum: non-negative integers end at the smallest of 255,
    1,023, 4,095, 16,383 and 65,535 that covers them and start at 0; non-negative floats are in 0 to
    1 or 0 to 255, if they fill half of that; all others use minimum and maximum.

    Args:
        rows: All rows; up to 64 images are read, evenly spread over the good ones.
        readers: One reader per image name.
        spec: The `prepare` section; its `pixel_range` takes precedence.
        earlier: An earlier prepare; the range that it found is kept while the sample fits it, so
            that new rows do not change old shards.

    Raises:
        JobError: If no range suits all images.
    """
    if spec.pixel_range:
        black, white = map(number_text, spec.pixel_range)
        return spec.pixel_range, f"images: over 8 bits, {black} is black and {white} is white"
    samples = list(_sample(rows, readers, spec))
    if not samples:
        return EIGHT_BITS, ""
    low, high = min(sample.low for sample in samples), max(sample.high for sample in samples)
    floats = [sample for sample in samples if sample.is_float]
    if floats and max(sample.high for sample in floats) <= 1 < high:
        raise JobError(
            "some images contain floats, others integers: {0.name} has {0.low:g} to {0.high:g}, "
            "and {1.name} has {1.low:g} to {1.high:g}; store all images alike, or set "
            "prepare.pixel_range".format(floats[0], max(samples, key=lambda s: s.high))
        )
    found = _covering(low, high, bool(floats))
    if earlier and not earlier.manifest.prepare.pixel_range:
        known = earlier.manifest.image.pixel_range or EIGHT_BITS
        if known[0] <= low and high <= known[1] and high - low > (known[1] - known[0]) / 2:
            found = known
    bits = f"{int(found[1]).bit_length()} bits" if found[0] == 0 and not floats else "values"
    first, last = map(number_text, found)
    return found, (
        f"images: {bits} in use ({first} to {last}), scaled to 8 bits; "
        "--prepare.pixel_range sets the range"
    )


class _Sample(NamedTuple):
    """An image with more than 8 bits."""

    name: str
    low: float
    high: float
    is_float: bool


def _sample(
    rows: CheckedRows, readers: Sequence[ImageReader], spec: PrepareSpec
) -> Iterator[_Sample]:
    chosen = rows.sample(max(_SAMPLE_IMAGES // max(len(readers), 1), 1))
    num_threads, max_pixels = len(os.sched_getaffinity(0)), spec.max_image_pixels

    def measure(image: tuple[str, bytes | BadImage]) -> _Sample | None:
        name, content = image
        # The row of an image that cannot be read is quarantined when the shard is written.
        with suppress(BadImage):
            values = None if isinstance(content, BadImage) else deep_values(content, max_pixels)
            if values is not None and (finite := values[np.isfinite(values)]).size:
                low, high = float(finite.min()), float(finite.max())
                return _Sample(name, low, high, values.dtype.kind == "f")
        return None

    with ThreadPoolExecutor(num_threads) as threads:
        for refs, reader in zip(rows.images, readers, strict=True):
            present = refs.take(chosen[refs.has_image[chosen]])
            images = zip(map(present.name, range(len(present))), reader.read(present), strict=True)
            found = prefetch_map(measure, images, threads, num_threads)
            yield from (sample for sample in found if sample)


def _covering(low: float, high: float, is_float: bool) -> PixelRange:
    if low >= 0 and not is_float and high <= _INTEGERS[-1]:
        return 0.0, float(next(limit for limit in _INTEGERS if high <= limit))
    for limit in (1.0, 255.0):
        if low >= 0 and is_float and limit / 2 <= high <= limit:
            return 0.0, limit
    return low, high if high > low else low + 1.0
