"""Reads the table, a CSV or Parquet file, and assigns roles to its columns.

A missing column or a column with two roles raises an error here; labels.py and row_validation.py
read the cells.
"""

import io
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv, fs

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.config.text import names_text
from ray_jobs.data.batch import KEY, LABEL
from ray_jobs.data.manifest import ImageInfo
from ray_jobs.prepare.number_parsing import is_numeric, parse_numbers
from ray_jobs.storage.folder import split_file

_BRACES = re.compile(r"\{([^{}]*)\}")


def read_table(location: str) -> pa.Table:
    """Read a CSV or Parquet file; CSV cells are read as text, since any cell may be a word.

    Raises:
        JobError: If the file does not exist, cannot be read or has no rows.
    """
    if not location:
        raise JobError("prepare.table is not set; give the path or URI of a CSV or Parquet file")
    folder, name = split_file(location)
    kind = folder.filesystem.get_file_info(folder.locate(name)).type
    if kind != fs.FileType.File:
        problem = "is a folder" if kind == fs.FileType.Directory else "does not exist"
        nearby = [n.rpartition("/")[2] for n in folder.names()] if folder.is_local else []
        raise JobError(f"the table {location} {problem}{did_you_mean(name, nearby)}")
    content = folder.read_bytes(name)
    try:
        table = _read_parquet(content) if content[:4] == b"PAR1" else _read_csv(content)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise JobError(f"the table {location} could not be read: {error}") from error
    table = table.rename_columns([column.strip() for column in table.column_names])
    duplicates = [column for column, n in Counter(table.column_names).items() if n > 1]
    if duplicates:
        raise JobError(
            f"the table {location} has more than one column named {duplicates[0]!r}; rename them"
        )
    if not table.num_rows:
        raise JobError(f"the table {location} has no rows")
    return table


def require_columns(
    table: pa.Table, spec: PrepareSpec, categorical: Sequence[str] = (), *, labelled: bool = True
) -> None:
    """Check that every column named in the spec exists, and that none has two roles.

    The columns of image paths are checked by the source.

    Raises:
        JobError: If a column is missing or has two roles. The message contains the setting, the
            column, and for a missing column the nearest match and the existing columns.
    """
    features = {
        "prepare.numeric_columns": spec.numeric_columns or (),
        "data.categorical": categorical,
    }
    named: dict[str, Sequence[str | None]] = {
        "prepare.key_column": [spec.key_column],
        **features,
        "prepare.number_rules": tuple(spec.number_rules),
    }
    if labelled:
        named |= {
            "prepare.label_column": [spec.label_column],
            "prepare.group_column": [spec.group_column],
            "prepare.split_column": [spec.split_column],
            "prepare.exclude_columns": spec.exclude_columns,
        }
    for setting, columns in named.items():
        for column in columns:
            if column is not None:
                require_column(table.column_names, column, setting)
    if spec.key_column == spec.label_column:
        raise JobError(f"{spec.key_column!r} cannot be both prepare.key_column and label_column")
    for setting, columns in features.items():
        for column in columns:
            for role in ("key_column", "label_column", "split_column"):
                if column == getattr(spec, role):
                    raise JobError(f"{setting} names {column!r}, the {role}; leave it out")
            if column in spec.exclude_columns:
                raise JobError(f"{setting} and prepare.exclude_columns both name {column!r}")
            if list(columns).count(column) > 1:
                raise JobError(f"{setting} names {column!r} twice")
            if column in _shard_columns(spec):
                raise JobError(
                    f"{setting} names {column!r}, which is a reserved column of the shards; rename "
                    "it in the table"
                )
    for column in set(categorical) & set(spec.numeric_columns or ()):
        raise JobError(
            f"prepare.numeric_columns and data.categorical both name {column!r}; remove it from "
            "one of them"
        )
    for name in spec.image_columns:
        if not name or spec.image_columns.count(name) > 1:
            raise JobError(
                f"prepare.image_columns={list(spec.image_columns)} holds an empty or repeated "
                "name; give each image a name of its own"
            )
    if spec.image_columns and spec.image_column:
        raise JobError(
            f"prepare.image_column={spec.image_column!r} is for one image per row and "
            "prepare.image_columns for several; set only one of them"
        )


def require_column(
    names: Sequence[str], column: str, setting: str, owner: str = "the table"
) -> None:
    """Check that a column named in a setting exists."""
    if column not in names:
        raise JobError(
            f"{setting}: {owner} has no column {column!r}{did_you_mean(column, names)} "
            f"(it has: {names_text(names)})"
        )


def find_numeric_columns(
    table: pa.Table, spec: PrepareSpec, categorical: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return `prepare.numeric_columns`, by default all columns of numbers without another role.

    A text column counts as numeric if most of its filled cells are numbers, or if it has a rule.
    A few words among numbers therefore quarantine their rows and do not drop the column.

    Raises:
        JobError: If a column has a reserved name, or there is no column of numbers or words.
    """
    if spec.numeric_columns is not None:
        return spec.numeric_columns
    taken = _other_roles(spec) | set(categorical)
    columns = tuple(
        name
        for name in table.column_names
        if name not in taken and (name in spec.number_rules or _holds_numbers(table.column(name)))
    )
    if not columns and not categorical:
        raise JobError(
            "no numeric column is left to learn from; name some in prepare.numeric_columns, or set "
            "it to [] to learn from images alone"
        )
    for column in columns:
        if column in _shard_columns(spec):
            raise JobError(
                f"the numeric column {column!r} has the name of a reserved column of the shards; "
                "rename it in the table, or add it to prepare.exclude_columns"
            )
    return columns


def parse_path_pattern(spec: PrepareSpec, name: str = "") -> tuple[list[str], list[str]]:
    """Split `prepare.image_pattern` into its columns and the texts before, between and after them.

    Args:
        spec: The `prepare` section.
        name: Name of one of several images, which replaces `{image}`.

    Raises:
        JobError: If a brace is not closed or is empty, or the pattern names no column.
    """
    pattern = spec.image_pattern.replace("{image}", name) if name else spec.image_pattern
    columns = _BRACES.findall(pattern)
    if not columns or not all(columns) or set("{}") & set(_BRACES.sub("", pattern)):
        raise JobError(
            f"prepare.image_pattern={spec.image_pattern!r} must name columns in braces, such as "
            "'{key}.jpg'"
        )
    return [spec.key_column if c == "key" else c for c in columns], _BRACES.split(pattern)[::2]


def _read_parquet(content: bytes) -> pa.Table:
    file = pq.ParquetFile(io.BytesIO(content))
    # Skip embedded images, embeddings and the like.
    columns = [
        f.name
        for f in file.schema_arrow
        if not (pa.types.is_nested(f.type) or pa.types.is_binary(f.type))
    ]
    return file.read(columns=columns)


def _read_csv(content: bytes) -> pa.Table:
    if content[:2] == b"\x1f\x8b":
        content = pa.CompressedInputStream(pa.BufferReader(content), "gzip").read()
    if not content.strip():
        raise pa.ArrowInvalid("it is empty")
    delimiter = "\t" if b"\t" in content.split(b"\n", 1)[0] else ","
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with csv.open_csv(io.BytesIO(content), parse_options=parse) as reader:
        names = reader.schema.names
    convert = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    return csv.read_csv(io.BytesIO(content), parse_options=parse, convert_options=convert)


def _shard_columns(spec: PrepareSpec) -> tuple[str, ...]:
    return (KEY, *ImageInfo.of(spec).columns, LABEL)


def _other_roles(spec: PrepareSpec) -> set[str]:
    roles = [spec.key_column, spec.label_column, spec.group_column, spec.split_column]
    paths = [spec.image_column, *spec.image_columns]
    if not spec.image_column:
        paths += parse_path_pattern(spec, next(iter(spec.image_columns), ""))[0]
    return {role for role in [*roles, *paths, *spec.exclude_columns] if role is not None}


def _holds_numbers(column: pa.ChunkedArray) -> bool:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return is_numeric(column.type) or pa.types.is_boolean(column.type)
    values, is_invalid = parse_numbers(column)
    return int((~np.isnan(values)).sum()) > int(is_invalid.sum())
