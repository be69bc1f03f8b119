"""Reads Hugging Face's ImageFolder.

Input: a folder of images with `metadata.csv`, `.jsonl` or `.parquet`, or with one folder per class;
either may be in folders named train, validation and test. Output: one row per image.

Format: https://huggingface.co/docs/datasets/image_dataset
"""

# pyright: reportAttributeAccessIssue=false

import posixpath
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.text import names_text
from ray_jobs.prepare.cell_text import TEXT, column_text
from ray_jobs.prepare.given_splits import split_named
from ray_jobs.prepare.sources.byte_range_reader import ByteRangeReader
from ray_jobs.prepare.sources.image_resolver import find_images, join_problems
from ray_jobs.prepare.sources.source import ImageRefs, Source
from ray_jobs.prepare.sources.source_files import (
    IMAGE_SUFFIXES,
    Walk,
    open_location,
    require_folder,
)
from ray_jobs.prepare.table_files import open_table
from ray_jobs.prepare.table_files.record_table import stack
from ray_jobs.storage.folder import Folder

FILE_NAME = "file_name"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
DEFAULT_SPLIT_COLUMN = "split"


def open_source(spec: PrepareSpec) -> Source:
    """Return the rows that the metadata names, or one row per image in the folder of its class.

    The key is the image's path below the folder, unless the metadata has the key column. If all
    folders are named after splits, or one is named train and another after another split, rows keep
    the split of their folder, in a column `split` (or `prepare.split_column`). Several images per
    row are named in columns such as `front_file_name` or `front`.
    """
    if spec.table:
        raise JobError(
            "the table of an ImageFolder is its own metadata; leave prepare.table out, or set "
            "prepare.source=folder"
        )
    folder, patterns = open_location(spec.images)
    require_folder(folder, spec.images)
    walk = Walk(folder, patterns)
    names = walk.names()
    metadata = [name for name in names if PurePosixPath(name).name in METADATA]
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise JobError(f"prepare.images={spec.images!r}: there are no images in {folder}")
    folders = {_first_folder(name) for name in metadata or images}
    splits = {split_named(name) for name in folders}
    has_splits = None not in splits or (len(splits - {None}) > 1 and "train" in splits)
    if metadata:
        source = _from_metadata(folder, metadata, names, images, has_splits, spec)
    else:
        source = _from_folders(folder, images, has_splits, spec)
    if has_splits and not spec.split_keys:
        column = spec.split_column or DEFAULT_SPLIT_COLUMN
        source = replace(source, settings={"split_column": column})
    return replace(source, notes=(*walk.notes, *source.notes))


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
    notes: list[str] = []
    for name in metadata:
        parent, _, base = name.rpartition("/")
        table, table_notes = open_table(
            f"{(folder / parent if parent else folder).uri}/{base}", spec.number_rules
        )
        notes += table_notes
        for image in image_names:
            column = _path_column(table, image, spec, f"{folder}/{name}")
            parts[image].append(_below(posixpath.dirname(name), table.column(column)))
        if has_splits:
            table = _with_split(table, [name] * table.num_rows, spec)
        tables.append(table)
    table = stack(tables)
    paths = {image: pa.concat_arrays(arrays) for image, arrays in parts.items()}
    if spec.key_column not in table.column_names:
        # Paths, so that files with the same name in different folders have different keys.
        table = table.append_column(spec.key_column, paths[image_names[0]])
    existing = pa.array(names, TEXT)
    found = {image: find_images(path, folder, lambda: existing) for image, path in paths.items()}
    refs = {image: ImageRefs(of_image.files) for image, of_image in found.items()}
    named = pa.chunked_array([of_image.files for of_image in found.values()])
    listed = pa.array(images, TEXT)
    quarantined, guesses = join_problems(found)
    unmatched = listed.filter(pc.invert(pc.is_in(listed, value_set=named))).to_pylist()
    detail = "the metadata does not name it"
    return Source(
        table,
        refs,
        dict.fromkeys(refs, ByteRangeReader(folder)),
        tuple((path, "no_record", detail) for path in unmatched),
        quarantined,
        notes=(*dict.fromkeys(notes), *guesses),
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
        table = _with_split(table, images, spec)
    return Source(table, {"": ImageRefs(paths)}, {"": ByteRangeReader(folder)})


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
    """Return paths below the source's folder, given paths below the metadata's folder.

    Absolute paths and URIs stay as they are.
    """
    paths = pc.replace_substring_regex(column_text(column), r"^(?:\./+)+", "")
    if not parent:
        return paths
    below = pc.binary_join_element_wise(pa.scalar(parent, TEXT), paths, pa.scalar("/", TEXT))
    is_absolute = pc.match_substring_regex(
        paths, r"^(?:~[^/]*/|(?:[A-Za-z][A-Za-z0-9+.-]*:)?[/\\])"
    )
    return pc.if_else(is_absolute, paths, below)


def _with_split(table: pa.Table, paths: Sequence[str], spec: PrepareSpec) -> pa.Table:
    """Append a column with the split of each path, or with its folder if that names none."""
    column = spec.split_column or DEFAULT_SPLIT_COLUMN
    if column in table.column_names or spec.split_keys:
        return table
    folders = map(_first_folder, paths)
    return table.append_column(column, pa.array([split_named(f) or f for f in folders], TEXT))


def _first_folder(name: str) -> str:
    """Return the first folder of a path, or an empty text."""
    first, slash, _ = name.partition("/")
    return first if slash else ""
