"""Recognises what a file is by its first bytes, whatever its name says, and unpacks it."""

import io
import lzma
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from ray_jobs.config.errors import JobError
from ray_jobs.config.text import names_text

Format = Literal["parquet", "xlsx", "json", "csv"]

HEAD_BYTES = 1 << 20
TABLE_NAME = re.compile(
    r"\.(csv|tsv|tab|parquet|parq|pq|jsonl|ndjson|json|xlsx)(\.(gz|bz2|xz|zst|lz4|zip))?$", re.I
)
_CODECS = {
    rb"\x1f\x8b": "gzip",
    rb"BZh[1-9]1AY&SY": "bz2",
    rb"\xfd7zXZ\0": "xz",
    rb"\(\xb5/\xfd": "zstd",
    rb'\x04"M\x18': "lz4",
}
_NO_TABLE = {
    rb"\xd0\xcf\x11\xe0": "an old or protected Excel workbook; save it as .xlsx without a password",
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`",
    rb"(?i:\s*<(!doctype|html|head|body|\?xml|!--))": "a web page or XML, perhaps a login or error "
    "page; download the file itself",
    rb"Rar!|7z\xbc\xaf|.{257}ustar[\0 ]": "an archive; unpack it, and give the table in it",
}
_JSON = rb"\{\s*[\"}]|\[\s*[{\]]"


@dataclass(frozen=True)
class RawFile:
    """A file, perhaps inside another one, that can be read from its start several times."""

    name: str
    """Location, for error messages."""
    open: Callable[[], pa.NativeFile]

    def head(self) -> bytes:
        """Return the first bytes."""
        with self.open() as stream:
            return stream.read(HEAD_BYTES)

    def read(self) -> pa.BufferReader:
        """Return the content, for formats that need random access."""
        with self.open() as stream:
            return pa.BufferReader(stream.read())


def unpack(file: RawFile) -> tuple[RawFile, Format]:
    """Return the table inside compressed files and archives, and its format.

    Raises:
        JobError: If the file is no table, or an archive holds none or several.
    """
    head = file.head()
    for magic, description in _NO_TABLE.items():
        if re.match(magic, head, re.S):
            raise JobError(f"the table {file.name} is {description}")
    for magic, codec in _CODECS.items():
        if re.match(magic, head):
            return unpack(RawFile(file.name, partial(_decompress, file, codec)))
    if head.startswith(b"PK\x03\x04"):
        return _open_zip(file)
    if head.startswith(b"PAR1"):
        return file, "parquet"
    # Byte order marks and the zeros of UTF-16.
    if not re.match(_JSON, head.lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").replace(b"\0", b"")):
        return file, "csv"
    return file, "json"


def _decompress(file: RawFile, codec: str) -> pa.NativeFile:
    if codec == "xz":
        return _native(lzma.LZMAFile(file.open()))
    return pa.CompressedInputStream(file.open(), codec)


def _open_zip(file: RawFile) -> tuple[RawFile, Format]:
    archive = zipfile.ZipFile(file.read())
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    if "xl/workbook.xml" in names:
        return file, "xlsx"
    # macOS adds hidden files.
    names = [n for n in names if not re.search(r"(^|/)(\.|__MACOSX/)", n)]
    tables = [name for name in names if TABLE_NAME.search(name)]
    if len(tables) != 1:
        raise JobError(
            f"{file.name} must hold one table, but is an archive or document of "
            f"{names_text((tables or names)[:5])}, …; give the table itself"
        )
    return unpack(RawFile(f"{file.name}/{tables[0]}", lambda: _native(archive.open(tables[0]))))


def _native(stream: Any) -> pa.NativeFile:
    return pa.PythonFile(io.BufferedReader(stream, HEAD_BYTES), mode="r")
