"""Shards → what `inspect` computes with: keys, labels, hashes and brightness of images, columns.

Row groups are streamed through a few threads; of each row a few bytes stay, of each image 24. Of a
split with more than `max_rows` rows a sample by hash of the key is looked at, the same key in every
split alike.

    R rows looked at, of one split   I image columns
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.config.spec import Split
from ray_jobs.data.batch import KEY, LABEL
from ray_jobs.data.images import decode_stored, stored_size
from ray_jobs.data.manifest import ImageInfo, Shard, SplitInfo
from ray_jobs.data.prefetch import prefetch_map
from ray_jobs.storage.folder import Folder

T = TypeVar("T")
R = TypeVar("R")

HASH_SIDE = 32
"""Images are shrunk to a square of this side before they are hashed."""
_LOW = 8
_GROUPS_PER_TASK = 16


@dataclass(frozen=True)
class ScannedSplit:
    """What is known of the rows of one split that were looked at."""

    rows_R: np.ndarray
    """Place of each row in the split, in stored order: int64."""
    key_hash_R: np.ndarray
    """uint64."""
    label_R: np.ndarray
    """int8."""
    content_RI: np.ndarray
    """Hash of each image's stored bytes, uint64; 0 where there is none."""
    looks_RI: np.ndarray
    """Perceptual hash of each image, uint64."""
    brightness_RI: np.ndarray
    """Mean grey of each image, 0 to 255, float32; NaN where there is none or it is unreadable."""
    contrast_RI: np.ndarray
    """Standard deviation of each image's grey, float32; NaN likewise."""


@dataclass(frozen=True)
class Place:
    """One image: where its row is among those looked at, and which image of the row it is."""

    split: Split
    index: int
    column: int


@dataclass(frozen=True)
class _Groups:
    """Some consecutive row groups of one shard."""

    shard: Shard
    groups: range
    first_row: int
    """Place of the first row in the split."""


def scan_split(
    folder: Folder,
    info: SplitInfo,
    image: ImageInfo,
    max_rows: int,
    progress: Callable[[int], Any] = lambda rows: None,
) -> ScannedSplit:
    """Read keys, labels and images of one split.

    Args:
        folder: prepared data.
        info: of the split.
        image: how images are stored.
        max_rows: a sample of about as many rows is looked at.
        progress: is told of the rows that were read, again and again.
    """
    columns = [KEY, LABEL, *image.columns]
    limit = sample_limit(info.num_rows, max_rows)

    def scan(part: _Groups) -> tuple[int, list[ScannedSplit]]:
        scanned, num_rows = [], 0
        for first_row, table in _read_groups(folder, part, columns):
            scanned.append(_scan_group(table, first_row, image, limit))
            num_rows += table.num_rows
        return num_rows, scanned

    parts: list[ScannedSplit] = []
    for num_rows, scanned in _in_order(scan, _tasks(info)):
        parts += scanned
        progress(num_rows)
    if not parts:
        return _scan_group(_no_rows(columns), 0, image, limit)
    return ScannedSplit(
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ScannedSplit.__annotations__
        }
    )


def read_columns(
    folder: Folder, info: SplitInfo, columns: Sequence[str], rows_R: np.ndarray
) -> pa.Table:
    """Return some columns of some rows of a split, in stored order.

    Args:
        folder: prepared data.
        info: of the split.
        columns: to read.
        rows_R: places of the rows in the split, ascending.
    """

    def read(part: _Groups) -> list[pa.Table]:
        tables = []
        for first_row, table in _read_groups(folder, part, columns, rows_R):
            start, stop = np.searchsorted(rows_R, (first_row, first_row + table.num_rows))
            tables.append(table.take(pa.array(rows_R[start:stop] - first_row)))
        return tables

    tables = [table for part in _in_order(read, _tasks(info)) for table in part]
    return pa.concat_tables(tables) if tables else _no_rows(columns)


def sample_limit(num_rows: int, max_rows: int) -> int:
    """Return the hash of a key below which its row is looked at: 2^64 for all."""
    return (max_rows << 64) // num_rows if num_rows > max_rows else 1 << 64


def hash_key(key: str) -> int:
    """Return 64 bits of a key's hash; other bits than those that split the rows."""
    return _hash64(key.encode())


def grey_pixels(content: Any, image: ImageInfo) -> np.ndarray:
    """Return a stored image in grey: uint8 (H, W).

    Raises:
        ValueError: if it cannot be decoded or has another size than the manifest says.
    """
    shape = (image.height, image.width)
    data = np.frombuffer(content, np.uint8)
    if image.encoding == "raw":
        return cv2.cvtColor(data.reshape(*shape, 3), cv2.COLOR_RGB2GRAY)
    kind = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
    grey = cv2.imdecode(data, kind) if stored_size(content) == shape else None
    if grey is None:
        raise ValueError("it cannot be decoded, or has another size than the manifest says")
    return grey


def rgb_pixels(content: bytes, image: ImageInfo) -> np.ndarray:
    """Return the pixels of a stored image: uint8 (H, W, 3).

    Raises:
        ValueError: if it cannot be decoded.
    """
    if image.encoding == "raw":
        return np.frombuffer(content, np.uint8).reshape(image.height, image.width, 3)
    return decode_stored(content, (image.height, image.width, 3))


def perceptual_hashes(small_N: np.ndarray) -> np.ndarray:
    """Return the 64-bit perceptual hash of each image: uint64 (N,).

    The signs of the 8 × 8 lowest frequencies of a cosine transform around their median, as in
    Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010.

    Args:
        small_N: grey, shrunk to `HASH_SIDE`: (N, 32, 32).
    """
    cosines = _low_cosines()
    low_N = (cosines @ small_N.astype(np.float64) @ cosines.T).reshape(-1, _LOW * _LOW)
    bits_N = low_N > np.median(low_N, axis=1, keepdims=True)
    return np.packbits(bits_N, axis=1).view(">u8").astype(np.uint64).ravel()


def _low_cosines() -> np.ndarray:
    """Return the rows of the orthonormal DCT-II matrix with the lowest frequencies."""
    frequency, place = np.ogrid[:_LOW, :HASH_SIDE]
    cosines = np.cos(np.pi * frequency * (2 * place + 1) / (2 * HASH_SIDE))
    scale = np.where(frequency == 0, np.sqrt(1 / HASH_SIDE), np.sqrt(2 / HASH_SIDE))
    return cosines * scale


def _scan_group(table: pa.Table, first_row: int, image: ImageInfo, limit: int) -> ScannedSplit:
    hashes = [hash_key(key) for key in table.column(KEY).to_pylist()]
    chosen = np.flatnonzero([value < limit for value in hashes])
    shape = (len(chosen), len(image.columns))
    content_RI, looks_RI = np.zeros(shape, np.uint64), np.zeros(shape, np.uint64)
    brightness_RI, contrast_RI = (
        np.full(shape, np.nan, np.float32),
        np.full(shape, np.nan, np.float32),
    )
    for i, name in enumerate(image.columns):
        column, small, places = table.column(name), [], []
        for place, row in enumerate(chosen):
            content = column[int(row)].as_buffer()
            if content is None:
                continue
            content_RI[place, i] = _hash64(content)
            try:
                grey = grey_pixels(content, image)
            except ValueError:
                continue
            mean, std = cv2.meanStdDev(grey)
            brightness_RI[place, i], contrast_RI[place, i] = mean[0, 0], std[0, 0]
            side = (HASH_SIDE, HASH_SIDE)
            small.append(cv2.resize(grey, side, interpolation=cv2.INTER_AREA))
            places.append(place)
        if small:
            looks_RI[places, i] = perceptual_hashes(np.stack(small))
    return ScannedSplit(
        rows_R=first_row + chosen.astype(np.int64),
        key_hash_R=np.asarray(hashes, np.uint64)[chosen],
        label_R=table.column(LABEL).to_numpy().astype(np.int8)[chosen],
        content_RI=content_RI,
        looks_RI=looks_RI,
        brightness_RI=brightness_RI,
        contrast_RI=contrast_RI,
    )


def _hash64(content: Any) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _tasks(info: SplitInfo) -> Iterator[_Groups]:
    first_row = 0
    for shard in info.shards:
        for start in range(0, len(shard.row_groups), _GROUPS_PER_TASK):
            groups = range(start, min(start + _GROUPS_PER_TASK, len(shard.row_groups)))
            yield _Groups(shard, groups, first_row)
            first_row += sum(shard.row_groups[start : groups.stop])


def _read_groups(
    folder: Folder, part: _Groups, columns: Sequence[str], rows_R: np.ndarray | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """Yield place of the first row and rows of each row group; only those that hold some rows."""
    wanted, first_row = [], part.first_row
    for group in part.groups:
        stop = first_row + part.shard.row_groups[group]
        if rows_R is None or np.diff(np.searchsorted(rows_R, (first_row, stop)))[0]:
            wanted.append((first_row, group))
        first_row = stop
    if not wanted:
        return
    path = folder.locate(part.shard.path)
    with pq.ParquetFile(folder.filesystem.open_input_file(path)) as file:
        for first_row, group in wanted:
            yield first_row, file.read_row_group(group, columns=list(columns), use_threads=False)


def _no_rows(columns: Sequence[str]) -> pa.Table:
    return pa.table({name: pa.array([], pa.null()) for name in columns})


def _in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the results in order, while threads work on the next few: no more are held."""
    # All the work is in C code that lets go of the interpreter.
    num_threads = len(os.sched_getaffinity(0)) + 1
    with ThreadPoolExecutor(num_threads) as threads:
        yield from prefetch_map(function, items, threads, num_threads)
