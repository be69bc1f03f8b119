"""TFRecord files of `tf.train.Example` → a `Source`.

Enters: files whose records hold an image's file in a feature and, unless there is a table, the
numbers in others.  Leaves: the place of each image inside its file; images are not read.

Neither pyarrow nor Ray reads these without TensorFlow, and TensorFlow reads whole records. The
format is two: a frame (length, masked CRC32C of the length, record, masked CRC32C of the record;
https://www.tensorflow.org/tutorials/load_data/tfrecord) around a protocol buffer
(https://protobuf.dev/programming-guides/encoding/). The lengths' checksums are checked; the
records' would need all pixels. Imports neither Ray nor TensorFlow.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.prepare.number_parsing import texts
from ray_jobs.prepare.sources.containers import (
    CHUNK_RECORDS,
    Index,
    PieceReader,
    file_of_each,
    find_files,
    in_threads,
    join,
    read_user_table,
    require_key_column,
    stack,
)
from ray_jobs.prepare.sources.refs import ImageReader, ImageRefs, Source
from ray_jobs.storage.folder import Folder

DEFAULT_FEATURES = ("image/encoded", "image")
_WINDOW_BYTES = {True: 16 << 10, False: 4 << 20}
"""By whether the files are local: read at once; images are skipped where that spares a read."""
_MAX_TEXT_BYTES = 4096
"""Longer bytes are no cell of a table."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def open_source(spec: PrepareSpec, categorical: Sequence[str], labelled: bool) -> Source:
    """Return the records of the TFRecord files that `prepare.images` names.

    The image is in the feature that `prepare.image_column` names, by default `image/encoded` or
    `image`, or several are in `prepare.image_columns`. Features of one number or text a record are
    the table, or with `prepare.table` only the key, by which both are joined.

    Raises:
        JobError: if a file is missing, compressed or damaged, or lacks the image or the key.
    """
    folder, names = find_files(spec.images, is_tfrecord, "TFRecord files")
    features = _image_features(spec)
    files = in_threads(partial(_read_file, folder, features, spec), names)
    left_out = {feature for file in files for feature in file.left_out}
    own = stack(file.records for file in files)
    own = own.select([name for name in own.column_names if name not in left_out])
    paths = file_of_each(names, (file.num_records for file in files))
    refs: dict[str, ImageRefs] = {}
    for image, candidates in features.items():
        starts = np.concatenate([file.starts[image] for file in files])
        sizes = np.concatenate([file.sizes[image] for file in files])
        has_image = sizes >= 0
        if not has_image.any():
            seen = sorted({name for file in files for name in file.features})
            raise JobError(
                f"no record of prepare.images={spec.images!r} holds an image in the feature "
                f"{' or '.join(map(repr, candidates))}{did_you_mean(candidates[0], seen)} (there "
                f"are: {', '.join(seen)}); prepare.image_column must name it"
            )
        refs[image] = _without(ImageRefs(paths, starts, sizes), ~has_image)
    readers: dict[str, ImageReader] = dict.fromkeys(features, PieceReader(folder))
    if not spec.table:
        return Source(own, refs, readers)
    require_key_column(own.column_names, spec, f"the records of {spec.images}")
    keys = texts(own.column(spec.key_column))
    indexes = {image: _present(keys, of_image) for image, of_image in refs.items()}
    table = read_user_table(spec)
    images, unmatched = join(table, spec, indexes)
    return Source(table, images, readers, unmatched)


def is_tfrecord(name: str) -> bool:
    """Whether a file's name is that of a TFRecord file, such as `train.tfrecord-00000-of-00010`."""
    base = name.lower().rpartition("/")[2]
    return ".tfrecord" in base or base.startswith("tfrecord") or base.endswith((".tfrec", ".tfr"))


def _image_features(spec: PrepareSpec) -> dict[str, tuple[str, ...]]:
    """Return by image name the features that may hold it; the first that a record has counts."""
    if spec.image_columns:
        return {name: (name,) for name in spec.image_columns}
    return {"": (spec.image_column,) if spec.image_column else DEFAULT_FEATURES}


def _without(refs: ImageRefs, is_gone: np.ndarray) -> ImageRefs:
    where = pa.array(np.arange(len(refs)), mask=is_gone)
    return ImageRefs(refs.path.take(where), refs.start, refs.size)


def _present(keys: pa.ChunkedArray, refs: ImageRefs) -> Index:
    rows = np.flatnonzero(refs.path.is_valid().to_numpy(zero_copy_only=False))
    return Index(keys.take(pa.array(rows)), refs.take(rows))


class _Damaged(Exception):
    """What is wrong, and at which byte."""

    def __init__(self, byte: int, problem: str) -> None:
        super().__init__(f"{problem} at byte {byte}")


@dataclass
class _File:
    num_records: int
    records: pa.Table
    starts: dict[str, np.ndarray]
    sizes: dict[str, np.ndarray]
    """-1 where a record has no such image."""
    features: set[str]
    left_out: set[str]
    """Features that are no column."""


class _Field(NamedTuple):
    """A field of a protocol buffer: its number, its wire type, and where its value is."""

    number: int
    wire: int
    start: int
    end: int


class _Window:
    """Random reads of a file through a part of it that is in memory."""

    def __init__(self, file: pa.NativeFile, window_bytes: int) -> None:
        self._file, self._window_bytes = file, window_bytes
        self.size = file.size()
        self._start, self._content = 0, b""

    def read(self, start: int, size: int) -> bytes:
        """Return a piece of the file; less where the file ends."""
        first = start - self._start
        if first < 0 or first + size > len(self._content):
            self._content = self._file.read_at(max(size, self._window_bytes), start)
            self._start, first = start, 0
        return self._content[first : first + size]

    def varint(self, start: int, end: int) -> tuple[int, int]:
        """Return a varint and the byte after it."""
        value = 0
        for place, byte in enumerate(self.read(start, min(10, end - start))):
            value |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, start + place + 1
        raise _Damaged(start, "a number does not end")

    def fields(self, start: int, end: int) -> Iterator[_Field]:
        """Yield the fields of a message, whose values are not read."""
        while start < end:
            tag, value = self.varint(start, end)
            number, wire = tag >> 3, tag & 7
            if wire == _BYTES:
                size, value = self.varint(value, end)
                after = value + size
            elif wire == _VARINT:
                after = self.varint(value, end)[1]
            elif wire in (_FIXED32, _FIXED64):
                after = value + (4 if wire == _FIXED32 else 8)
            else:
                raise _Damaged(start, f"a field of unknown kind {wire}")
            if after > end or number == 0:
                raise _Damaged(start, "no tf.train.Example")
            yield _Field(number, wire, value, after)
            start = after


def _read_file(
    folder: Folder, features: dict[str, tuple[str, ...]], spec: PrepareSpec, name: str
) -> _File:
    """Return the table of a file's records and the places of their images."""
    columns = _Columns(spec.key_column if spec.table else None)
    starts: dict[str, list[int]] = {image: [] for image in features}
    sizes: dict[str, list[int]] = {image: [] for image in features}
    image_of = {feature: image for image, names in features.items() for feature in names}
    seen: set[str] = set()
    try:
        with folder.filesystem.open_input_file(folder.locate(name)) as file:
            window = _Window(file, _WINDOW_BYTES[folder.is_local])
            for first, end in _frames(window):
                found: dict[str, tuple[int, int]] = {}
                for feature, value in _features(window, first, end):
                    seen.add(feature)
                    if feature in image_of:
                        if (piece := _image(window, feature, value)) is not None:
                            found[feature] = piece
                    else:
                        columns.add(window, feature, value)
                columns.end_record()
                for image, names in features.items():
                    place = next((found[n] for n in names if n in found), (0, -1))
                    starts[image].append(place[0])
                    sizes[image].append(place[1])
    except _Damaged as error:
        raise JobError(
            f"{folder}/{name} is damaged or no TFRecord file of tf.train.Example: {error}; write "
            "it again"
        ) from error
    except OSError as error:
        raise JobError(f"{folder}/{name} cannot be read: {error}") from error
    num_records = len(next(iter(starts.values())))
    return _File(
        num_records,
        columns.table(),
        {image: np.asarray(values, np.int64) for image, values in starts.items()},
        {image: np.asarray(values, np.int64) for image, values in sizes.items()},
        seen,
        columns.left_out,
    )


def _frames(window: _Window) -> Iterator[tuple[int, int]]:
    """Yield the first byte of each record, and the one after its last."""
    start = 0
    while start < window.size:
        head = window.read(start, 12)
        if len(head) < 12:
            raise _Damaged(start, "a record's head is cut off")
        length, checksum = struct.unpack("<QI", head)
        if masked_crc32c(head[:8]) != checksum:
            if start == 0 and head[:2] in (b"\x1f\x8b", b"\x78\x01", b"\x78\x9c", b"\x78\xda"):
                raise _Damaged(start, "compressed records, which cannot be read one by one,")
            raise _Damaged(start, "a length with a wrong checksum")
        first, end = start + 12, start + 12 + length
        if end + 4 > window.size:
            raise _Damaged(start, f"a record of {length} bytes that is cut off")
        yield first, end
        start = end + 4


def _features(window: _Window, start: int, end: int) -> Iterator[tuple[str, _Field | None]]:
    """Yield name and list of each feature of an Example; None for one that is empty."""
    for features in window.fields(start, end):
        if (features.number, features.wire) != (1, _BYTES):
            raise _Damaged(features.start, "no tf.train.Example")
        for entry in window.fields(features.start, features.end):
            name, value = "", None
            for part in window.fields(entry.start, entry.end):
                if part.number == 1:
                    name = window.read(part.start, part.end - part.start).decode(errors="replace")
                elif part.number == 2:
                    # The lists are alternatives, of which the last counts.
                    for of_kind in window.fields(part.start, part.end):
                        value = of_kind
            yield name, value


def _image(window: _Window, feature: str, value: _Field | None) -> tuple[int, int] | None:
    """Return start and size of a feature's bytes; None for an empty one."""
    if value is None:
        return None
    if value.number != 1:
        raise JobError(f"the feature {feature!r} holds numbers; an image's file is bytes")
    found = [field for field in window.fields(value.start, value.end) if field.number == 1]
    if len(found) > 1:
        raise JobError(
            f"the feature {feature!r} holds {len(found)} images a record; one feature holds one, "
            "and prepare.image_columns names several"
        )
    if not found or found[0].start == found[0].end:
        return None
    return found[0].start, found[0].end - found[0].start


class _Columns:
    """The features of one value a record as columns; others are left out.

    Args:
        only: the one feature to keep, if not all.
    """

    def __init__(self, only: str | None) -> None:
        self._only = only
        self._cells: dict[str, list[bytes | int | float | None]] = {}
        self.left_out: set[str] = set()
        self._tables: list[pa.Table] = []
        self._num_records = 0

    def add(self, window: _Window, feature: str, value: _Field | None) -> None:
        """Take a feature of the record at hand."""
        if feature in self.left_out or (self._only is not None and feature != self._only):
            return
        cells = self._cells.setdefault(feature, [])
        cells += [None] * (self._num_records - len(cells))
        # A name that a record has twice means the last.
        del cells[self._num_records :]
        try:
            cells.append(None if value is None else _scalar(window, value))
        except ValueError:
            self.left_out.add(feature)

    def end_record(self) -> None:
        """Go on to the next record."""
        self._num_records += 1
        if self._num_records == CHUNK_RECORDS:
            self._flush()

    def table(self) -> pa.Table:
        """Return all records."""
        self._flush()
        return stack(self._tables)

    def _flush(self) -> None:
        columns: dict[str, pa.Array] = {}
        for feature, cells in self._cells.items():
            if feature in self.left_out:
                continue
            cells += [None] * (self._num_records - len(cells))
            try:
                columns[feature] = _array(cells)
            except ValueError:
                self.left_out.add(feature)
        self._tables.append(pa.table(columns))
        self._cells, self._num_records = {}, 0


def _array(cells: list[bytes | int | float | None]) -> pa.Array:
    """Return cells of one kind as int64, float32 or text.

    Raises:
        ValueError: if bytes are no UTF-8.
    """
    kinds = {type(cell) for cell in cells} - {type(None)}
    if kinds == {bytes}:
        return pa.array(cells, pa.binary()).cast(pa.string())
    if kinds == {int}:
        return pa.array(cells, pa.int64())
    if kinds == {float}:
        return pa.array(cells, pa.float32())
    if not kinds:
        return pa.nulls(len(cells))
    return pa.array(
        [None if c is None else c.decode() if isinstance(c, bytes) else str(c) for c in cells]
    )


def _scalar(window: _Window, value: _Field) -> bytes | int | float | None:
    """Return the one value of a list, None if it is empty.

    Raises:
        ValueError: if there are several, or it is too long for a cell.
    """
    found: list[bytes | int | float] = []
    for part in window.fields(value.start, value.end):
        if part.number != 1:
            continue
        size = part.end - part.start
        if value.number == 1 and size <= _MAX_TEXT_BYTES:
            found.append(window.read(part.start, size))
        elif value.number == 2 and size == 4:
            found.append(struct.unpack("<f", window.read(part.start, 4))[0])
        elif value.number == 3 and part.wire == _VARINT:
            found.append(_signed(window.varint(part.start, part.end)[0]))
        elif value.number == 3 and 0 < size <= 10:
            number, end = window.varint(part.start, part.end)
            if end != part.end:
                raise ValueError("more than one value")
            found.append(_signed(number))
        elif size:
            raise ValueError("more than one value")
    if len(found) > 1:
        raise ValueError("more than one value")
    return found[0] if found else None


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C = _crc32c_table()


def masked_crc32c(content: bytes) -> int:
    """Return TFRecord's checksum: CRC32C (Castagnoli), rotated right by 15 bits plus a constant."""
    crc = 0xFFFF_FFFF
    for byte in content:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFF_FFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFF_FFFF
