"""Reads shards: keys, labels, hashes and brightness of images, columns and thumbnails.

A few threads stream row groups; memory holds the key of each row and 24 bytes per image. From a
split with more than `max_rows` rows, it samples the keys with the lowest hashes, so that a key that
is in two splits tends to be in both samples.

    R inspected rows of one split   I image columns   N images
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import fft

from ray_jobs.config.prepare_spec import Split
from ray_jobs.data.batch import KEY, LABEL
from ray_jobs.data.images import decode_stored, stored_size
from ray_jobs.data.manifest import ImageInfo, Manifest, Shard, SplitInfo
from ray_jobs.data.prefetch import prefetch_map
from ray_jobs.inspect.report_schema import ImageRef
from ray_jobs.storage.folder import Folder

R = TypeVar("R")

_HASH_SIDE = 32
"""Images are shrunk to a square of this side before they are hashed."""
_LOW = 8
_GROUPS_PER_TASK = 16
_THUMBNAIL = 128


@dataclass(frozen=True)
class ScannedSplit:
    """The inspected rows of one split."""

    split: Split
    image_columns: tuple[str, ...]
    rows_R: np.ndarray
    """Index of each row in the split, in stored order: int64."""
    keys_R: np.ndarray
    """Key of each row: str objects."""
    key_hash_R: np.ndarray
    """uint64."""
    label_R: np.ndarray
    """int8."""
    content_RI: np.ndarray
    """Hash of each image's stored bytes: uint64; 0 for a missing image."""
    perceptual_RI: np.ndarray
    """Perceptual hash of each image: uint64."""
    brightness_RI: np.ndarray
    """Mean grey level of each image, 0 to 255: float32; NaN if missing or unreadable."""
    contrast_RI: np.ndarray
    """Standard deviation of each image's grey levels: float32; NaN likewise."""

    def image(self, r: int, i: int) -> ImageRef:
        """Return the image in one of the inspected rows and image columns."""
        return ImageRef(
            split=self.split,
            row=int(self.rows_R[r]),
            key=self.keys_R[r],
            column=self.image_columns[i],
            label=int(self.label_R[r]),
        )


Scans = Mapping[Split, ScannedSplit]


def scan_split(
    folder: Folder, manifest: Manifest, split: Split, max_rows: int, progress: Callable[[int], Any]
) -> ScannedSplit:
    """Read keys, labels and images of one split.

    Args:
        folder: Prepared data.
        manifest: Its manifest.
        split: The split to read.
        max_rows: Approximate maximum number of rows; larger splits are sampled.
        progress: Called with the number of rows of each row group, from several threads.
    """
    image, info = manifest.image, manifest.splits[split]
    columns = [KEY, LABEL, *image.columns]
    limit = (max_rows << 64) // info.num_rows if info.num_rows > max_rows else 1 << 64

    def scan(first_row: int, table: pa.Table) -> dict[str, np.ndarray]:
        progress(table.num_rows)
        return _scan_group(table, first_row, image, limit)

    parts = [
        _scan_group(_no_rows(columns), 0, image, limit),
        *_map_row_groups(scan, folder, info, columns),
    ]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return ScannedSplit(split, image.columns, **arrays)


def read_columns(
    folder: Folder, info: SplitInfo, columns: Sequence[str], rows_R: np.ndarray
) -> pa.Table:
    """Return some columns of some rows of a split, in stored order.

    Args:
        folder: Prepared data.
        info: The split in the manifest.
        columns: Columns to read.
        rows_R: Indices of the rows in the split, ascending.
    """

    def select(first_row: int, table: pa.Table) -> pa.Table:
        start, stop = np.searchsorted(rows_R, (first_row, first_row + table.num_rows))
        return table.take(pa.array(rows_R[start:stop] - first_row))

    tables = list(_map_row_groups(select, folder, info, columns, rows_R))
    return pa.concat_tables(tables) if tables else _no_rows(columns)


def read_thumbnails(
    folder: Folder, manifest: Manifest, images: Iterable[ImageRef]
) -> dict[tuple[Split, int, str], bytes]:
    """Return small JPEGs by split, row and column, without missing and unreadable images."""
    wanted: dict[tuple[Split, str], set[int]] = defaultdict(set)
    for image in images:
        wanted[image.split, image.column].add(image.row)
    shape = (manifest.image.height, manifest.image.width, 3)
    thumbnails = {}
    for (split, column), rows in wanted.items():
        rows_R = np.array(sorted(rows), np.int64)
        table = read_columns(folder, manifest.splits[split], [column], rows_R)
        for row, content in zip(rows_R, table.column(0), strict=True):
            if not content.is_valid:
                continue
            if manifest.image.encoding == "raw":
                pixels = np.frombuffer(content.as_py(), np.uint8).reshape(shape)
            else:
                try:
                    pixels = decode_stored(content.as_py(), shape)
                except ValueError:
                    continue
            thumbnails[split, int(row), column] = _encode_thumbnail(pixels)
    return thumbnails


def hash_key(key: str) -> int:
    """Return a 64-bit hash of a key, independent of the hash that assigns rows to splits."""
    return _hash64(key.encode())


def perceptual_hashes(small_N: np.ndarray) -> np.ndarray:
    """Return the 64-bit perceptual hash of each image: uint64 (N,).

    Its bits are the signs of the 8 × 8 lowest frequencies of a cosine transform, relative to their
    median (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010).

    Args:
        small_N: Grey images: (N, 32, 32).
    """
    spectrum_N = np.asarray(fft.dctn(small_N.astype(np.float64), axes=(1, 2), norm="ortho"))
    low_N = spectrum_N[:, :_LOW, :_LOW].reshape(-1, _LOW * _LOW)
    bits_N = low_N > np.median(low_N, axis=1, keepdims=True)
    return np.packbits(bits_N, axis=1).view(">u8").astype(np.uint64).ravel()


def _scan_group(
    table: pa.Table, first_row: int, image: ImageInfo, limit: int
) -> dict[str, np.ndarray]:
    """Return the arrays of a `ScannedSplit` for rows of a group with a key hash below a limit."""
    keys = table.column(KEY).to_pylist()
    hashes = [hash_key(key) for key in keys]
    chosen = np.flatnonzero([value < limit for value in hashes])
    shape = (len(chosen), len(image.columns))
    content_RI, perceptual_RI = np.zeros(shape, np.uint64), np.zeros(shape, np.uint64)
    brightness_RI = np.full(shape, np.nan, np.float32)
    contrast_RI = brightness_RI.copy()
    for i, name in enumerate(image.columns):
        column, small, readable = table.column(name), [], []
        for r, row in enumerate(chosen):
            content = column[int(row)].as_buffer()
            if content is None:
                continue
            content_RI[r, i] = _hash64(content)
            try:
                grey = _decode_grey(content, image)
            except ValueError:
                continue
            mean, std = cv2.meanStdDev(grey)
            brightness_RI[r, i], contrast_RI[r, i] = mean[0, 0], std[0, 0]
            small.append(cv2.resize(grey, (_HASH_SIDE, _HASH_SIDE), interpolation=cv2.INTER_AREA))
            readable.append(r)
        if small:
            perceptual_RI[readable, i] = perceptual_hashes(np.stack(small))
    return {
        "rows_R": first_row + chosen.astype(np.int64),
        "keys_R": np.array(keys, object)[chosen],
        "key_hash_R": np.asarray(hashes, np.uint64)[chosen],
        "label_R": table.column(LABEL).to_numpy().astype(np.int8)[chosen],
        "content_RI": content_RI,
        "perceptual_RI": perceptual_RI,
        "brightness_RI": brightness_RI,
        "contrast_RI": contrast_RI,
    }


def _decode_grey(content: Any, image: ImageInfo) -> np.ndarray:
    """Return a stored image in grey: uint8 (H, W).

    Raises:
        ValueError: If it is unreadable or does not have the size in the manifest.
    """
    shape = (image.height, image.width)
    data = np.frombuffer(content, np.uint8)
    if image.encoding == "raw":
        return cv2.cvtColor(data.reshape(*shape, 3), cv2.COLOR_RGB2GRAY)
    flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
    grey = cv2.imdecode(data, flags) if stored_size(content) == shape else None
    if grey is None:
        raise ValueError(f"not a readable image of {image.width} × {image.height} pixels")
    return grey


def _encode_thumbnail(pixels: np.ndarray) -> bytes:
    height, width = pixels.shape[:2]
    scale = min(_THUMBNAIL / max(height, width), 1)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 85]
    return cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), quality)[1].tobytes()


def _hash64(content: Any) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _map_row_groups(
    function: Callable[[int, pa.Table], R],
    folder: Folder,
    info: SplitInfo,
    columns: Sequence[str],
    rows_R: np.ndarray | None = None,
) -> Iterator[R]:
    """Yield the result of a function for each row group, in stored order.

    Args:
        function: Called in threads with a row group's rows and the index of the first in the split.
        folder: Prepared data.
        info: The split in the manifest.
        columns: Columns to read.
        rows_R: Indices of rows, ascending; row groups without any of them are skipped.
    """

    def read(task: tuple[Shard, list[tuple[int, int]]]) -> list[R]:
        shard, groups = task
        with pq.ParquetFile(folder.filesystem.open_input_file(folder.locate(shard.path))) as file:
            return [
                function(
                    first_row, file.read_row_group(g, columns=list(columns), use_threads=False)
                )
                for g, first_row in groups
            ]

    # Reading, hashing and decoding run in C code that releases the interpreter lock.
    num_threads = len(os.sched_getaffinity(0)) + 1
    with ThreadPoolExecutor(num_threads) as threads:
        for results in prefetch_map(read, _tasks(info, rows_R), threads, num_threads):
            yield from results


def _tasks(
    info: SplitInfo, rows_R: np.ndarray | None
) -> Iterator[tuple[Shard, list[tuple[int, int]]]]:
    """Yield shards, each with some of its row groups and the index of their first row."""
    first_row = 0
    for shard in info.shards:
        groups = []
        for group, num_rows in enumerate(shard.row_groups):
            stop = first_row + num_rows
            if rows_R is None or np.diff(np.searchsorted(rows_R, (first_row, stop)))[0]:
                groups.append((group, first_row))
            first_row = stop
        for start in range(0, len(groups), _GROUPS_PER_TASK):
            yield shard, groups[start : start + _GROUPS_PER_TASK]


def _no_rows(columns: Sequence[str]) -> pa.Table:
    return pa.table({name: pa.array([], pa.null()) for name in columns})
