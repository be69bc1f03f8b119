"""Parses TFRecord files of `tf.train.Example` without reading the images in them.

Neither pyarrow nor Ray reads these files without TensorFlow, and TensorFlow reads whole records. A
file is a sequence of frames (length, checksum of the length, record, checksum of the record;
https://www.tensorflow.org/tutorials/load_data/tfrecord), each around a protocol buffer
(https://protobuf.dev/programming-guides/encoding/). The checksums are not verified: those of the
records would require reading all images, and a wrong length shows in the next frame.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

_MAX_TEXT_BYTES = 4096
"""Maximum length of a string that counts as a table cell."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
BYTES_LIST, FLOAT_LIST, INT64_LIST = 1, 2, 3
"""Fields of `tf.train.Feature`."""


class DamagedFile(Exception):
    """Reports a problem in a TFRecord file, and the byte at which it occurs."""

    def __init__(self, byte: int, problem: str) -> None:
        super().__init__(f"{problem} at byte {byte}")


class Field(NamedTuple):
    """A field of a protocol buffer: its number, its wire type, and the bytes of its value."""

    number: int
    wire: int
    start: int
    end: int


class Window:
    """Gives random access to a file through a buffered window."""

    def __init__(self, file: pa.NativeFile, window_bytes: int) -> None:
        self._file, self._window_bytes = file, window_bytes
        self.size = file.size()
        self._start, self._content = 0, b""

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes of the file from `start`, or fewer if the file ends before."""
        first = start - self._start
        if first < 0 or first + size > len(self._content):
            self._content = self._file.read_at(max(size, self._window_bytes), start)
            self._start, first = start, 0
        return self._content[first : first + size]

    def varint(self, start: int, end: int) -> tuple[int, int]:
        """Return a varint and the position of the byte after it."""
        value = 0
        for position, byte in enumerate(self.read(start, min(10, end - start))):
            value |= (byte & 0x7F) << (7 * position)
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, start + position + 1
        raise DamagedFile(start, "unterminated number")

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """Yield the fields of a message without reading their values."""
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
                raise DamagedFile(start, f"field with unknown wire type {wire}")
            if after > end or number == 0:
                raise DamagedFile(start, "not a tf.train.Example")
            yield Field(number, wire, value, after)
            start = after


def read_frames(window: Window) -> Iterator[tuple[int, int]]:
    """Yield the position of each record's first byte, and of the byte after its last."""
    start = 0
    while start < window.size:
        head = window.read(start, 12)
        if len(head) < 12:
            raise DamagedFile(start, "truncated record header")
        (length,) = struct.unpack_from("<Q", head)
        first, end = start + 12, start + 12 + length
        if end + 4 > window.size:
            raise DamagedFile(start, f"truncated record of {length} bytes")
        yield first, end
        start = end + 4


def read_features(window: Window, start: int, end: int) -> Iterator[tuple[str, Field | None]]:
    """Yield the name and the list of each feature of an Example; the list is None if empty."""
    for features in window.fields(start, end):
        if (features.number, features.wire) != (1, _BYTES):
            raise DamagedFile(features.start, "not a tf.train.Example")
        for entry in window.fields(features.start, features.end):
            name, value = "", None
            for part in window.fields(entry.start, entry.end):
                if part.number == 1:
                    name = window.read(part.start, part.end - part.start).decode(errors="replace")
                elif part.number == 2:
                    # The lists are a oneof: the last one counts.
                    for value_list in window.fields(part.start, part.end):
                        value = value_list
            yield name, value


def read_scalar(window: Window, value: Field) -> str | int | float | None:
    """Return the only value of a list, or None if the list is empty.

    Raises:
        ValueError: If there are several values, or the value is too long or not UTF-8.
    """
    scalars: list[str | int | float] = []
    for part in window.fields(value.start, value.end):
        size = part.end - part.start
        if part.number != 1:
            continue
        if value.number == BYTES_LIST and size <= _MAX_TEXT_BYTES:
            scalars.append(window.read(part.start, size).decode())
        elif value.number == FLOAT_LIST and size == 4:
            scalars.append(struct.unpack("<f", window.read(part.start, 4))[0])
        elif value.number == INT64_LIST and 0 < size <= 10:
            number, end = window.varint(part.start, part.end)
            if end != part.end:
                raise ValueError("more than one value")
            scalars.append(number - (1 << 64) if number >> 63 else number)
        elif size:
            raise ValueError("more than one value, or a text that is too long")
    if len(scalars) > 1:
        raise ValueError("more than one value")
    return scalars[0] if scalars else None
