"""Hugging Face's ImageFolder → a `Source`.

Enters: a folder of images with `metadata.csv`, `.jsonl` or `.parquet` beside them, or of one folder
a class; either may stand in folders named train, validation and test.  Leaves: a row an image.

https://huggingface.co/docs/datasets/image_dataset. Imports neither Ray nor TensorFlow.
"""

# pyarrow makes the functions of its compute module when it is imported, unseen by pyright.
# pyright: reportAttributeAccessIssue=false

import json
import posixpath
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS, PrepareSpec, Split
from ray_jobs.prepare.number_parsing import texts
from ray_jobs.prepare.sources.containers import CHUNK_RECORDS, PieceReader, stack, table_of_records
from ray_jobs.prepare.sources.refs import ImageReader, ImageRefs, Source
from ray_jobs.storage.folder import Folder

FILE_NAME = "file_name"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".avif", ".ppm"
)  # fmt: skip
SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
DEFAULT_SPLIT_COLUMN = "split"


def open_source(spec: PrepareSpec, categorical: Sequence[str], labelled: bool) -> Source:
    """Return the rows that the metadata names, or one for each image in its class's folder.

    The key is the image's path below the folder, unless the metadata has the key column. Where all
    folders are named after splits there is a column `split` (or `prepare.split_column`); where all
    three splits are there, rows stay in them. Several images a row are columns `front_file_name`
    or `front`.

    Raises:
        JobError: if the folder is none, its metadata cannot be read or names no image that is
            there, or there are no images.
    """
    if spec.table:
        raise JobError(
            "an ImageFolder's table is its own metadata; leave prepare.table out, or set "
            "prepare.source folder"
        )
    folder = Folder(spec.images)
    if folder.filesystem.get_file_info(folder.path).type != fs.FileType.Directory:
        raise JobError(f"prepare.images={spec.images!r}: there is no folder {folder}")
    names = [name for name in folder.names() if not _is_hidden(name)]
    metadata = [name for name in names if PurePosixPath(name).name in METADATA]
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise JobError(f"prepare.images={spec.images!r}: there are no images in {folder}")
    has_splits = all(_split_of(name) for name in metadata or images)
    if metadata:
        source = _from_metadata(folder, metadata, names, images, has_splits, spec)
    else:
        source = _from_folders(folder, images, has_splits, spec)
    if {_split_of(name) for name in metadata or images} == set(SPLITS):
        source = replace(source, split_column=spec.split_column or DEFAULT_SPLIT_COLUMN)
    return source


def _from_metadata(
    folder: Folder,
    metadata: Sequence[str],
    names: Sequence[str],
    images: Sequence[str],
    has_splits: bool,
    spec: PrepareSpec,
) -> Source:
    image_names = spec.image_columns or ("",)
    parts = []
    for name in metadata:
        part = _read_metadata(folder, name)
        parent = posixpath.dirname(name)
        columns = [_path_column(part, image, spec, f"{folder}/{name}") for image in image_names]
        for image, column in zip(image_names, columns, strict=True):
            part = part.append_column(_internal(image), _below(parent, part.column(column)))
        if has_splits:
            part = _with_split(part, [_split_of(name)] * part.num_rows, spec)
        parts.append(part)
    table = stack(parts)
    known = pa.array(names, pa.string())
    paths = {image: table.column(_internal(image)).combine_chunks() for image in image_names}
    table = table.drop_columns([_internal(image) for image in image_names])
    if spec.key_column not in table.column_names:
        # The path is the key, so that files of one name in two folders are two.
        table = table.append_column(spec.key_column, paths[image_names[0]])
    is_there = {image: pc.is_in(path, value_set=known) for image, path in paths.items()}
    if not any(pc.any(there).as_py() for there in is_there.values()):
        example = next(iter(paths.values())).drop_null().slice(0, 1).to_pylist()
        raise JobError(
            f"{folder}/{metadata[0]} names no image that is there: {example[0] if example else ''} "
            f"is not in {folder}, {images[0]} is"
        )
    refs = {
        image: ImageRefs(pc.if_else(is_there[image], path, None)) for image, path in paths.items()
    }
    named = pa.chunked_array(list(paths.values()))
    listed = pa.array(images, pa.string())
    unmatched = listed.filter(pc.invert(pc.is_in(listed, value_set=named)))
    problem = "the metadata does not name it"
    readers: dict[str, ImageReader] = dict.fromkeys(refs, PieceReader(folder, in_containers=False))
    return Source(
        table, refs, readers, tuple((p, "no_record", problem) for p in unmatched.to_pylist())
    )


def _from_folders(
    folder: Folder, images: Sequence[str], has_splits: bool, spec: PrepareSpec
) -> Source:
    if spec.image_columns:
        raise JobError("prepare.image_columns needs an ImageFolder with metadata")
    depth = 1 if has_splits else 0
    labels = [path.split("/")[depth] if path.count("/") > depth else None for path in images]
    if not any(labels):
        raise JobError(
            f"{folder} holds images, and neither metadata ({', '.join(METADATA)}) nor a folder for "
            "each class; give prepare.table"
        )
    paths = pa.array(images, pa.string())
    table = pa.table({spec.key_column: paths, spec.label_column: pa.array(labels, pa.string())})
    if has_splits:
        table = _with_split(table, [_split_of(path) for path in images], spec)
    return Source(table, {"": ImageRefs(paths)}, {"": PieceReader(folder, in_containers=False)})


def _read_metadata(folder: Folder, name: str) -> pa.Table:
    if not name.endswith(".jsonl"):
        from ray_jobs.prepare.table import read_table

        parent, _, base = name.rpartition("/")
        return read_table(f"{(folder / parent if parent else folder).uri}/{base}")
    tables, records = [], []
    for number, line in enumerate(folder.read_bytes(name).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            raise JobError(f"{folder}/{name}, line {number} cannot be read: {error}") from error
        records.append(record)
        if len(records) == CHUNK_RECORDS:
            tables.append(table_of_records(records))
            records = []
    if records:
        tables.append(table_of_records(records))
    if not tables:
        raise JobError(f"{folder}/{name} has no rows")
    return stack(tables)


def _path_column(table: pa.Table, image: str, spec: PrepareSpec, what: str) -> str:
    """Return the column with the paths of an image."""
    choices = [image, f"{image}_{FILE_NAME}"] if image else [spec.image_column or FILE_NAME]
    for column in choices:
        if column in table.column_names:
            return column
    raise JobError(
        f"{what} has no column {' or '.join(map(repr, choices))}"
        f"{did_you_mean(choices[-1], table.column_names)} (it has: "
        f"{', '.join(table.column_names)})"
    )


def _internal(image: str) -> str:
    """Return a column's name that no user's column has."""
    return f"\0path {image}"


def _below(parent: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return paths below the source's folder, given those below the metadata's folder."""
    paths = pc.replace_substring_regex(texts(column), r"^(?:\./+)+", "")
    if not parent:
        return paths
    return pc.binary_join_element_wise(pa.scalar(parent), paths, "/")


def _with_split(table: pa.Table, splits: Sequence[Split | None], spec: PrepareSpec) -> pa.Table:
    column = spec.split_column or DEFAULT_SPLIT_COLUMN
    if column in table.column_names:
        return table
    return table.append_column(column, pa.array(splits, pa.string()))


def _split_of(name: str) -> Split | None:
    """Return the split that the first folder of a path is named after."""
    first, slash, _ = name.partition("/")
    return SPLIT_FOLDERS.get(first.lower()) if slash else None


def _is_hidden(name: str) -> bool:
    return PurePosixPath(name).name.startswith(".")
