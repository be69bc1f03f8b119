"""Reads the pixels of DICOM files through pydicom, the extra `dicom`; only imported if needed."""

import io
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.pixels.utils import pixel_array


def open_file(content: bytes) -> tuple[Any, tuple[int, int], int]:
    """Return a file's dataset, its width and height, and its number of frames.

    Raises:
        ValueError: If it contains no image, such as a report.
    """
    dataset = pydicom.dcmread(io.BytesIO(content))
    if not dataset.get("Rows") or not dataset.get("Columns"):
        raise ValueError("the DICOM file contains no image")
    return dataset, (dataset.Columns, dataset.Rows), int(dataset.get("NumberOfFrames") or 1)


def read_pixels(
    dataset: Any, pixel_range: tuple[float, float] | None
) -> tuple[np.ndarray, tuple[float, float], bool]:
    """Return an image's values, those of black and white, and whether greys are inverted.

    Greys are scaled by slope and intercept (or a lookup table), then by `pixel_range`, else by the
    first window of the file, else by their own range without padding; 8-bit greys keep theirs.

    Returns:
        Values (H, W), or (H, W, 3) for colours, which pydicom converts to RGB.
    """
    stored = pixel_array(dataset)
    photometric = dataset.PhotometricInterpretation
    bits = int(dataset.get("BitsStored") or 32)
    if photometric == "PALETTE COLOR":
        colours = apply_color_lut(stored, dataset)
        return colours, (0, np.iinfo(colours.dtype).max), False
    if stored.ndim == 3:
        return stored, (0, 2**bits - 1), False
    inverted = photometric == "MONOCHROME1"
    values = apply_modality_lut(stored, dataset)
    if pixel_range:
        return values, pixel_range, inverted
    if all(dataset.get(name) not in (None, "") for name in ("WindowCenter", "WindowWidth")):
        # The window's output range is that of values far outside the window.
        low, high = apply_voi_lut(np.array([-1e12, 1e12]), dataset, prefer_lut=False)
        return apply_voi_lut(values, dataset, prefer_lut=False), (low, high), inverted
    if dataset.get("VOILUTSequence"):
        high = 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
        return apply_voi_lut(np.rint(values).astype(np.int64), dataset), (0, high), inverted
    if bits <= 8 and stored.min() >= 0 and np.array_equal(values, stored):
        return values, (0, 2**bits - 1), inverted
    padding = dataset.get("PixelPaddingValue")
    kept = values if padding is None else values[stored != padding]
    low, high = (float(kept.min()), float(kept.max())) if kept.size else (0.0, 1.0)
    return values, (low, high if high > low else low + 1), inverted
