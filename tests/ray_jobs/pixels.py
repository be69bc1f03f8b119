"""Image files with more than 8 bits, as cameras, microscopes and scanners write them."""

import io
import struct
import zlib
from typing import Any

import numpy as np


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_16(values: np.ndarray) -> bytes:
    """Return values (H, W) or (H, W, 2 to 4 channels) as a PNG with 16 bits per channel."""
    height, width = values.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values[0, 0].size]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(values: np.ndarray, photometric: int | None = None, orientation: int = 1) -> bytes:
    """Return values (H, W) or (H, W, 3) as a TIFF of their type; photometric 0 is WhiteIsZero."""
    height, width = values.shape[:2]
    channels = values[0, 0].size
    if photometric is None:
        photometric = 2 if channels == 3 else 1
    pixels = values.astype(values.dtype.newbyteorder("<")).tobytes()
    bits, kind = values.dtype.itemsize * 8, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    end = 8 + len(pixels)
    pair = struct.pack("<HHH", *[bits] * 3) + struct.pack("<HHH", *[kind] * 3)
    entries: list[tuple[int, int, int, int]] = [
        (256, 4, 1, width), (257, 4, 1, height),
        (258, 3, channels, bits if channels == 1 else end),
        (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8), (274, 3, 1, orientation),
        (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, len(pixels)),
        (339, 3, channels, kind if channels == 1 else end + 6),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", *entry) for entry in entries
    )
    header = struct.pack("<2sHI", b"II", 42, end + len(pair))
    return header + pixels + pair + directory + bytes(4)


def dicom(values: np.ndarray, bits: int = 12, **elements: Any) -> bytes:
    """Return values (H, W), (H, W, 3) or (frames, H, W) of an integer type as a DICOM file."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    is_colour = values.ndim == 3 and values.shape[-1] == 3
    file.SamplesPerPixel = 3 if is_colour else 1
    file.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    file.PlanarConfiguration = 0
    file.Rows, file.Columns = values.shape[:2] if is_colour else values.shape[-2:]
    file.BitsAllocated, file.BitsStored, file.HighBit = values.dtype.itemsize * 8, bits, bits - 1
    file.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in elements.items():
        setattr(file, name, value)
    file.PixelData = values.tobytes()
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()
