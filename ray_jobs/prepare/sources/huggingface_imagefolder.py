"""Reads Hugging Face's ImageFolder.

Input: a folder of images with `metadata.csv`, `.jsonl` or `.parquet`, or with one folder per class;
either may be in folders named train, validation and test. Output: one row per image.

Format: https://huggingface.co/docs/datasets/image_dataset
"""

# pyright: reportAttributeAccessIssue=false

import json
import posixpath
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS, PrepareSpec, Split
from ray_jobs.config.text import names_text
from ray_jobs.prepare.cell_text import TEXT, column_text
from ray_jobs.prepare.sources.byte_range_reader import ByteRangeReader
from ray_jobs.prepare.sources.record_table import RecordTable, stack
from ray_jobs.prepare.sources.source import ImageRefs, Source
from ray_jobs.prepare.sources.source_files import open_folder
from ray_jobs.prepare.table import read_table
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


def open_source(spec: PrepareSpec) -> Source:
    """Return the rows that the metadata names, or one row per image in the folder of its class.

    The key is the image's path below the folder, unless the metadata has the key column. If all
    folders are named after splits, there is a column `split` (or `prepare.split_column`); if all
    three splits are present, rows keep their split. Several images per row are named in columns
    such as `front_file_name` or `front`.
    """
    if spec.table:
        raise JobError(
            "the table of an ImageFolder is its own metadata; leave prepare.table out, or set "
            "prepare.source=folder"
        )
    folder = open_folder(spec.images)
    names = [name for name in folder.names() if not PurePosixPath(name).name.startswith(".")]
    metadata = [name for name in names if PurePosixPath(name).name in METADATA]
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise JobError(f"prepare.images={spec.images!r}: there are no images in {folder}")
    splits = [_split_of(name) for name in metadata or images]
    if metadata:
        source = _from_metadata(folder, metadata, names, images, all(splits), spec)
    else:
        source = _from_folders(folder, images, all(splits), spec)
    if set(splits) == set(SPLITS):
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
    tables: list[pa.Table] = []
    parts: dict[str, list[pa.LargeStringArray]] = {image: [] for image in image_names}
    for name in metadata:
        table = _read_metadata(folder, name)
        for image in image_names:
            column = _path_column(table, image, spec, f"{folder}/{name}")
            parts[image].append(_below(posixpath.dirname(name), table.column(column)))
        if has_splits:
            table = _with_split(table, [_split_of(name)] * table.num_rows, spec)
        tables.append(table)
    table = stack(tables)
    paths = {image: pa.concat_arrays(arrays) for image, arrays in parts.items()}
    if spec.key_column not in table.column_names:
        # Paths, so that files with the same name in different folders have different keys.
        table = table.append_column(spec.key_column, paths[image_names[0]])
    existing = pa.array(names, TEXT)
    refs = {
        image: ImageRefs(pc.if_else(pc.is_in(path, value_set=existing), path, None))
        for image, path in paths.items()
    }
    if not any(of_image.has_image.any() for of_image in refs.values()):
        example = next(iter(paths.values())).drop_null().slice(0, 1).to_pylist()
        raise JobError(
            f"{folder}/{metadata[0]} names no existing image: {example[0] if example else ''} is "
            f"not in {folder}, but {images[0]} is; correct the paths in the metadata"
        )
    named = pa.chunked_array(list(paths.values()))
    listed = pa.array(images, TEXT)
    unmatched = listed.filter(pc.invert(pc.is_in(listed, value_set=named))).to_pylist()
    detail = "the metadata does not name it"
    return Source(
        table,
        refs,
        dict.fromkeys(refs, ByteRangeReader(folder)),
        tuple((path, "no_record", detail) for path in unmatched),
    )


def _from_folders(
    folder: Folder, images: Sequence[str], has_splits: bool, spec: PrepareSpec
) -> Source:
    if spec.image_columns:
        raise JobError(
            f"prepare.image_columns needs an ImageFolder with metadata, but {folder} has none; add "
            f"{METADATA[0]}, or leave prepare.image_columns out"
        )
    depth = 1 if has_splits else 0
    labels = [path.split("/")[depth] if path.count("/") > depth else None for path in images]
    if not any(labels):
        raise JobError(
            f"{folder} holds images, but neither metadata ({', '.join(METADATA)}) nor a folder per "
            "class; set prepare.table"
        )
    paths = pa.array(images, TEXT)
    table = pa.table({spec.key_column: paths, spec.label_column: pa.array(labels, TEXT)})
    if has_splits:
        table = _with_split(table, [_split_of(path) for path in images], spec)
    return Source(table, {"": ImageRefs(paths)}, {"": ByteRangeReader(folder)})


def _read_metadata(folder: Folder, name: str) -> pa.Table:
    if not name.endswith(".jsonl"):
        parent, _, base = name.rpartition("/")
        return read_table(f"{(folder / parent if parent else folder).uri}/{base}")
    records = RecordTable()
    for number, line in enumerate(folder.read_bytes(name).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise JobError(f"{folder}/{name}, line {number} cannot be read: {error}") from error
        records.append(record)
    table = records.to_table()
    if not table.num_rows:
        raise JobError(f"{folder}/{name} has no rows")
    return table


def _path_column(table: pa.Table, image: str, spec: PrepareSpec, file: str) -> str:
    """Return the column with the paths of an image."""
    choices = [image, f"{image}_{FILE_NAME}"] if image else [spec.image_column or FILE_NAME]
    for column in choices:
        if column in table.column_names:
            return column
    raise JobError(
        f"{file} has no column {' or '.join(map(repr, choices))}"
        f"{did_you_mean(choices[-1], table.column_names)} (it has: "
        f"{names_text(table.column_names)})"
    )


def _below(parent: str, column: pa.ChunkedArray) -> pa.LargeStringArray:
    """Return paths below the source's folder, given paths below the metadata's folder."""
    paths = pc.replace_substring_regex(column_text(column), r"^(?:\./+)+", "")
    if not parent:
        return paths
    return pc.binary_join_element_wise(pa.scalar(parent, TEXT), paths, pa.scalar("/", TEXT))


def _with_split(table: pa.Table, splits: Sequence[Split | None], spec: PrepareSpec) -> pa.Table:
    column = spec.split_column or DEFAULT_SPLIT_COLUMN
    if column in table.column_names:
        return table
    return table.append_column(column, pa.array(splits, TEXT))


def _split_of(name: str) -> Split | None:
    """Return the split named by the first folder of a path, if there is one."""
    first, slash, _ = name.partition("/")
    return SPLIT_FOLDERS.get(first.lower()) if slash else None
