"""Reads WebDataset: tar shards in which files belong together by name.

Input: `photos/shard-{000..012}.tar`, a folder or a glob, and a table that is joined by key; without
a table, the `.json` and `.cls` of each sample. Output: the position of each image in its tar; image
bytes are not read.

As in the webdataset library, a sample's key is the path of a file in the tar up to the first dot of
its last part, and the rest after that dot is the file's extension.
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
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.text import names_text
from ray_jobs.prepare.cell_text import TEXT
from ray_jobs.prepare.sources.byte_range_reader import ByteRangeReader
from ray_jobs.prepare.sources.key_join import ImageIndex, join_images, read_keyed_table
from ray_jobs.prepare.sources.source import ImageRefs, Source, repeat_paths
from ray_jobs.prepare.sources.source_files import find_files, map_in_threads
from ray_jobs.prepare.table_files.record_table import RecordTable, stack
from ray_jobs.storage.folder import Folder

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "dcm", "dicom")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_BUFFER_BYTES = {True: 16 << 10, False: 64 << 10}
"""Buffer size, keyed by whether the files are local. Small images are skipped inside the buffer.
Large ones need a seek to the next header, and remote storage another request."""
_MAX_RECORD_BYTES = 16 << 20
_MAX_EXTENSIONS = 20
"""Maximum number of a tar's extensions to list in an error message."""


def open_source(spec: PrepareSpec, may_find: bool = True) -> Source:
    """Return the samples of the tars in `prepare.images`.

    The image is the file with an image extension, or with the extension `prepare.image_column`;
    `prepare.image_columns` names several, such as `front` for `.front.jpg` or `.front`. If
    `may_find`, the key column of `prepare.table` is found by the keys of the samples.
    """
    folder, names, notes = find_files(spec.images, is_tar, "tar files")
    # None stands for any extension of images.
    wanted = {name: name for name in spec.image_columns} or {"": spec.image_column}
    extensions = {image: e.lower().lstrip(".") if e else None for image, e in wanted.items()}
    tars = map_in_threads(partial(_read_tar, folder, extensions, spec), names)
    indexes: dict[str, ImageIndex] = {}
    for image, extension in extensions.items():
        keys = pa.concat_arrays([tar.keys[image] for tar in tars])
        spans = np.concatenate([tar.spans[image] for tar in tars])
        if not len(keys):
            what = f"files .{extension}" if extension else f"images ({', '.join(IMAGE_EXTENSIONS)})"
            seen = {f".{e}" for tar in tars for e in tar.extensions}
            raise JobError(
                f"the tar files of prepare.images={spec.images!r} hold no {what} (extensions seen: "
                f"{names_text(sorted(seen))}); set prepare.image_column to the images' extension"
            )
        paths = repeat_paths(names, [len(tar.keys[image]) for tar in tars])
        indexes[image] = ImageIndex(keys, ImageRefs(paths, spans[:, 0], spans[:, 1]))
    if spec.table:
        keys = next(iter(indexes.values())).keys
        table, table_notes, found = read_keyed_table(spec, keys if may_find else None)
    else:
        table, table_notes, found = stack(tar.records for tar in tars), (), {}
    spec = spec.model_copy(update=found)
    images, unmatched = join_images(table, spec, indexes)
    readers = dict.fromkeys(indexes, ByteRangeReader(folder))
    notes = (*table_notes, *notes)
    return Source(table, images, readers, unmatched, settings=found, notes=notes)


def is_tar(name: str) -> bool:
    """Return whether a file name is that of a tar."""
    return name.lower().endswith(TAR_SUFFIXES)


@dataclass
class _TarIndex:
    keys: dict[str, pa.LargeStringArray]
    """Keys of the images, by image name."""
    spans: dict[str, np.ndarray]
    """Start and size of the images: int64 (number of images, 2), by image name."""
    records: pa.Table
    extensions: set[str]


def _find_image(extension: str, extensions: dict[str, str | None]) -> str | None:
    """Return the name of the image with this file extension, None if it is not an image."""
    stem, _, last = extension.rpartition(".")
    for name, wanted in extensions.items():
        if wanted is None:
            is_image = extension in IMAGE_EXTENSIONS
        else:
            is_image = extension == wanted or (last in IMAGE_EXTENSIONS and stem == wanted)
        if is_image:
            return name
    return None


def _read_tar(
    folder: Folder, extensions: dict[str, str | None], spec: PrepareSpec, name: str
) -> _TarIndex:
    """Return the positions of a tar's images, and its records unless there is a table."""
    images: dict[str, list[_Member]] = {image: [] for image in extensions}
    records = RecordTable()
    record: dict[str, Any] = {}
    extension_of: dict[tuple[str, str], str] = {}
    seen: set[str] = set()
    with folder.filesystem.open_input_file(folder.locate(name)) as raw:
        contents = () if spec.table else ("json", "cls")
        for member in _read_members(raw, folder, name, contents):
            if len(seen) < _MAX_EXTENSIONS:
                seen.add(member.extension)
            image = _find_image(member.extension, extensions)
            if image is not None:
                extension = extension_of.setdefault((image, member.key), member.extension)
                if extension != member.extension:
                    raise JobError(
                        f"{folder}/{name}: the sample {member.key!r} has the images .{extension} "
                        f"and .{member.extension}; set prepare.image_column to one extension, or "
                        "prepare.image_columns to all of them"
                    )
                images[image].append(member)
            if not spec.table and (image is not None or member.content is not None):
                # The files of one sample are consecutive in a tar.
                if record.get(spec.key_column) != member.key:
                    record = {}
                    records.append(record)
                record |= _read_fields(member, spec, f"{folder}/{name}")
    return _TarIndex(
        keys={i: pa.array([m.key for m in members], TEXT) for i, members in images.items()},
        spans={
            i: np.array([(m.start, m.size) for m in members], np.int64).reshape(-1, 2)
            for i, members in images.items()
        },
        records=records.to_table(),
        extensions=seen,
    )


class _Member(NamedTuple):
    """A file of a sample in a tar."""

    key: str
    extension: str
    start: int
    size: int
    content: bytes | None


def _read_members(
    raw: pa.NativeFile, folder: Folder, name: str, contents: Sequence[str]
) -> Iterator[_Member]:
    """Yield the files in a tar, with the content of those that have one of the given extensions."""
    size = raw.size()
    # Python's buffer keeps its content when a seek stays inside it.
    with io.BufferedReader(raw, _BUFFER_BYTES[folder.is_local]) as stream:  # type: ignore[arg-type]
        if stream.peek(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7z")):
            raise JobError(
                f"{folder}/{name} is compressed, so its images cannot be read one by one; "
                "decompress it (compression hardly shrinks images)"
            )
        try:
            tar = tarfile.TarFile(fileobj=stream, mode="r")
            while (member := tar.next()) is not None:
                # Otherwise tarfile would keep all members.
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
            # tarfile treats an invalid header as the end of the tar.
            stream.seek(tar.offset)
            if stream.read(512).strip(b"\0"):
                raise tarfile.ReadError(f"no valid header at byte {tar.offset}")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise JobError(f"{folder}/{name} is damaged: {error}; recreate the file") from error


def _key_and_extension(path: str) -> tuple[str, str] | None:
    """Return the key and the extension in lower case of a sample's file; None for other files."""
    while path.startswith("./"):
        path = path[2:]
    parent, slash, base = path.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{parent}{slash}{stem}", extension.lower()) if stem and dot else None


def _read_fields(member: _Member, spec: PrepareSpec, file: str) -> dict[str, Any]:
    """Return what a file adds to its sample's record: the key, and any label or JSON fields."""
    fields: dict[str, Any] = {}
    if member.content is not None:
        try:
            text = member.content.decode()
            is_label = member.extension == "cls"
            fields = {spec.label_column: text.strip()} if is_label else json.loads(text)
            if not isinstance(fields, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            name = f"{member.key}.{member.extension}"
            raise JobError(f"{file}: {name} cannot be read: {error}") from error
    fields[spec.key_column] = member.key
    return fields
