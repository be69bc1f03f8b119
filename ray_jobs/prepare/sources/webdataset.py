"""WebDataset: tar shards whose files belong together by their names → a `Source`.

Enters: `photos/shard-{000..012}.tar`, a folder or a glob, and a table joined by key; without one
each sample's own `.json` and `.cls`.  Leaves: places in the tars; pixels are not read.

A sample's key is a file's path in the tar up to the first dot of its last part, and what follows
that dot is the file's extension, as in the webdataset library. Imports neither Ray nor TensorFlow.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.prepare.sources.containers import (
    CHUNK_RECORDS,
    Index,
    PieceReader,
    find_files,
    in_threads,
    join,
    read_user_table,
    stack,
    table_of_records,
)
from ray_jobs.prepare.sources.refs import ImageReader, ImageRefs, Source
from ray_jobs.storage.folder import Folder

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_BUFFER_BYTES = {True: 16 << 10, False: 64 << 10}
"""By whether the files are local. Small images are skipped inside a buffer, large ones by a seek
to the next header, which is another request to a remote storage."""
_MAX_RECORD_BYTES = 16 << 20


def open_source(spec: PrepareSpec, categorical: Sequence[str], labelled: bool) -> Source:
    """Return the samples of the tars that `prepare.images` names.

    The image is the file with an image's extension, or with the extension that
    `prepare.image_column` names; `prepare.image_columns` names several, as `front` for `.front.jpg`
    or `.front`. All columns are kept, whatever the label and the categories are.

    Raises:
        JobError: if a tar is missing, compressed or damaged, no image is found, or a sample has
            several and it is not said which is meant.
    """
    folder, names = find_files(spec.images, is_tar, "tar files")
    images = _ImageNames(spec)
    own_records = not spec.table
    tars = in_threads(partial(_read_tar, folder, images, own_records, spec), names)
    indexes = {image: _stack_indexes([tar.images[image] for tar in tars]) for image in images.names}
    for image, index in indexes.items():
        if not len(index.keys):
            seen = ", ".join(sorted({f".{e}" for tar in tars for e in tar.extensions})) or "none"
            raise JobError(
                f"the tar files of prepare.images={spec.images!r} hold no {images.describe(image)} "
                f"(extensions seen: {seen}); set prepare.image_column to the images' extension"
            )
    table = stack(tar.records for tar in tars) if own_records else read_user_table(spec)
    refs, unmatched = join(table, spec, indexes)
    readers: dict[str, ImageReader] = dict.fromkeys(indexes, PieceReader(folder))
    return Source(table, refs, readers, unmatched)


def is_tar(name: str) -> bool:
    """Whether a file's name is that of a tar."""
    return name.lower().endswith(TAR_SUFFIXES)


class _ImageNames:
    """Which file of a sample is which image."""

    def __init__(self, spec: PrepareSpec) -> None:
        self.names = spec.image_columns or ("",)
        self._wanted = [name.lower().lstrip(".") for name in self.names]
        self._any = not spec.image_columns and not spec.image_column
        if not spec.image_columns and spec.image_column:
            self._wanted = [spec.image_column.lower().lstrip(".")]

    def find(self, extension: str) -> str | None:
        """Return the name of the image that a file with this extension is; None for no image."""
        if self._any:
            return "" if extension in IMAGE_EXTENSIONS else None
        stem, _, last = extension.rpartition(".")
        for name, wanted in zip(self.names, self._wanted, strict=True):
            if extension == wanted or (last in IMAGE_EXTENSIONS and stem == wanted):
                return name
        return None

    def describe(self, name: str) -> str:
        """Return what an error calls such files."""
        if self._any:
            return f"images ({', '.join(IMAGE_EXTENSIONS)})"
        return f"files .{self._wanted[self.names.index(name)]}"


class _Pieces:
    """The images of one name in one tar, while it is read."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.starts: list[int] = []
        self.sizes: list[int] = []

    def index(self, name: str) -> Index:
        """Return the images compactly."""
        return Index(
            pa.chunked_array([pa.array(self.keys, pa.string())]),
            ImageRefs(
                pa.repeat(pa.scalar(name), len(self.keys)),
                np.array(self.starts, np.int64),
                np.array(self.sizes, np.int64),
            ),
        )


@dataclass
class _Tar:
    images: dict[str, Index]
    records: pa.Table
    extensions: set[str]


def _read_tar(
    folder: Folder, images: _ImageNames, own_records: bool, spec: PrepareSpec, name: str
) -> _Tar:
    """Return the places of a tar's images, and its records if they are wanted."""
    pieces = {image: _Pieces() for image in images.names}
    found = _Records(spec) if own_records else None
    extensions: dict[str, str] = {}
    seen: set[str] = set()
    with folder.filesystem.open_input_file(folder.locate(name)) as raw:
        contents = ("json", "cls") if own_records else ()
        for member in _members(raw, folder, name, contents):
            if len(seen) < 20:
                seen.add(member.extension)
            image = images.find(member.extension)
            if image is not None:
                before = extensions.setdefault(f"{image}\n{member.key}", member.extension)
                if before != member.extension:
                    raise JobError(
                        f"{folder}/{name}: the sample {member.key!r} has the images .{before} and "
                        f".{member.extension}; say in prepare.image_column which extension is "
                        "meant, or name all of them in prepare.image_columns"
                    )
                pieces[image].keys.append(member.key)
                pieces[image].starts.append(member.start)
                pieces[image].sizes.append(member.size)
            if found is not None and (image is not None or member.content is not None):
                found.add(member, f"{folder}/{name}")
    indexes = {image: of_image.index(name) for image, of_image in pieces.items()}
    return _Tar(indexes, found.table() if found else pa.table({}), seen)


def _stack_indexes(indexes: Sequence[Index]) -> Index:
    refs = [index.refs for index in indexes]
    return Index(
        pa.chunked_array([chunk for index in indexes for chunk in index.keys.chunks], pa.string()),
        ImageRefs(
            pa.concat_arrays([each.path for each in refs]),
            np.concatenate([each.start for each in refs if each.start is not None]),
            np.concatenate([each.size for each in refs if each.size is not None]),
        ),
    )


class _Member(NamedTuple):
    """A file of a sample in a tar."""

    key: str
    extension: str
    start: int
    size: int
    content: bytes | None


def _members(
    raw: pa.NativeFile, folder: Folder, name: str, contents: Sequence[str]
) -> Iterator[_Member]:
    """Yield the files in a tar; the contents of some extensions are read, the others skipped."""
    size = raw.size()
    # Python's own buffer keeps what it holds when a seek stays inside it.
    with io.BufferedReader(raw, _BUFFER_BYTES[folder.is_local]) as stream:  # type: ignore[arg-type]
        if stream.peek(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7z")):
            raise JobError(
                f"{folder}/{name} is compressed, so that its images cannot be read one by one; "
                "uncompress it (images hardly shrink by it)"
            )
        try:
            tar = tarfile.TarFile(fileobj=stream, mode="r")
            while (member := tar.next()) is not None:
                # It would keep all of them.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                start = member.offset_data
                if start + member.size > size:
                    raise tarfile.ReadError(f"{member.name} ends after the file")
                split = _key_and_extension(member.name) if member.isreg() else None
                if split and not member.issparse():
                    content = None
                    if split[1] in contents:
                        if member.size > _MAX_RECORD_BYTES:
                            raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                        stream.seek(start)
                        content = stream.read(member.size)
                    yield _Member(*split, start, member.size, content)
            # A header that is none ends tarfile's reading as if the tar ended there.
            stream.seek(tar.offset)
            if stream.read(512).strip(b"\0"):
                raise tarfile.ReadError(f"there is no header at byte {tar.offset}")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise JobError(f"{folder}/{name} is damaged: {error}; write it again") from error


def _key_and_extension(path: str) -> tuple[str, str] | None:
    """Return a sample's key and a file's extension in small letters; None for no sample's file."""
    while path.startswith("./"):
        path = path[2:]
    parent, slash, base = path.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{parent}{slash}{stem}", extension.lower()) if stem and dot else None


class _Records:
    """The samples of one tar as rows: the fields of `.json`, the label of `.cls`, the key."""

    def __init__(self, spec: PrepareSpec) -> None:
        self._spec = spec
        self._tables: list[pa.Table] = []
        self._records: list[dict[str, Any]] = []
        self._last: tuple[str, dict[str, Any]] | None = None

    def add(self, member: _Member, where: str) -> None:
        """Take a file of a sample; the files of one stand together in a tar."""
        if self._last is None or self._last[0] != member.key:
            if len(self._records) >= CHUNK_RECORDS:
                self._flush()
            self._last = member.key, {}
            self._records.append(self._last[1])
        record = self._last[1]
        if member.content is not None:
            try:
                text = member.content.decode()
                if member.extension == "cls":
                    record[self._spec.label_column] = text.strip()
                else:
                    record |= _fields(text)
            except ValueError as error:
                name = f"{member.key}.{member.extension}"
                raise JobError(f"{where}: {name} cannot be read: {error}") from error
        record[self._spec.key_column] = member.key

    def table(self) -> pa.Table:
        """Return all rows."""
        self._flush()
        return stack(self._tables)

    def _flush(self) -> None:
        self._tables.append(table_of_records(self._records))
        self._records = []


def _fields(text: str) -> dict[str, Any]:
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    return fields
