"""The table: CSV or Parquet → an Arrow table, and which of its columns is what.

Enters: a file by path or URI.  Leaves: its columns, and those to learn from.

What is wrong with a whole column (it is missing, or has two roles) is an error here; labels.py and
cells.py read the columns. Imports neither Ray nor TensorFlow.
"""

# pyarrow makes the functions of its compute module when it is imported, unseen by pyright.
# pyright: reportAttributeAccessIssue=false

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
from ray_jobs.data.batch import KEY, LABEL
from ray_jobs.data.manifest import ImageInfo
from ray_jobs.prepare.number_parsing import is_number, numbers_of, texts
from ray_jobs.storage.folder import split_file

_BRACES = re.compile(r"\{([^{}]*)\}")


def read_table(location: str) -> pa.Table:
    """Return a CSV or Parquet file; the cells of a CSV stay text, since one may be no number.

    Raises:
        JobError: if there is no such file, it cannot be read, or it has no rows.
    """
    if not location:
        raise JobError("prepare.table is not set: give the path or URI of a CSV or Parquet file")
    folder, name = split_file(location)
    kind = folder.filesystem.get_file_info(folder.locate(name)).type
    if kind != fs.FileType.File:
        what = "is a folder" if kind == fs.FileType.Directory else "does not exist"
        near = [n.rpartition("/")[2] for n in folder.names()] if folder.is_local else []
        raise JobError(f"the table {location} {what}{did_you_mean(name, near)}")
    content = folder.read_bytes(name)
    try:
        table = _read_parquet(content) if content[:4] == b"PAR1" else _read_csv(content)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise JobError(f"the table {location} could not be read: {error}") from error
    table = table.rename_columns([column.strip() for column in table.column_names])
    doubled = [column for column, n in Counter(table.column_names).items() if n > 1]
    if doubled:
        raise JobError(f"the table {location} has more than one column named {doubled[0]!r}")
    if not table.num_rows:
        raise JobError(f"the table {location} has no rows")
    return table


def require_columns(
    table: pa.Table, spec: PrepareSpec, categorical: Sequence[str] = (), *, labelled: bool = True
) -> None:
    """Check that every column that the spec names is there, and none has two roles.

    Where images are is for the source to check.

    Raises:
        JobError: naming the setting, the column, the nearest match and the columns there are.
    """
    named: dict[str, Sequence[str | None]] = {
        "prepare.key_column": [spec.key_column],
        "prepare.numeric_columns": spec.numeric_columns or (),
        "prepare.number_rules": tuple(spec.number_rules),
        "data.categorical": categorical,
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
                require_column(table, column, setting)
    if spec.key_column == spec.label_column:
        raise JobError(f"{spec.key_column!r} cannot be both prepare.key_column and label_column")
    own = (KEY, *ImageInfo.of(spec).columns, LABEL)
    learnt = {
        "prepare.numeric_columns": spec.numeric_columns or (),
        "data.categorical": categorical,
    }
    for setting, columns in learnt.items():
        for column in columns:
            for role in ("key_column", "label_column", "split_column"):
                if column == getattr(spec, role):
                    raise JobError(f"{setting} names {column!r}, the {role}; leave it out")
            if column in spec.exclude_columns:
                raise JobError(f"{setting} and prepare.exclude_columns both name {column!r}")
            if list(columns).count(column) > 1:
                raise JobError(f"{setting} names {column!r} twice")
            if column in own:
                raise JobError(
                    f"{setting} names {column!r}, which is the name of one of the shards' own "
                    "columns; rename it in the table"
                )
    for column in set(categorical) & set(spec.numeric_columns or ()):
        raise JobError(
            f"prepare.numeric_columns and data.categorical both name {column!r}; a column holds "
            "numbers or words"
        )
    for name in spec.image_columns:
        if not name or spec.image_columns.count(name) > 1:
            raise JobError(
                f"prepare.image_columns={list(spec.image_columns)} must be names, each once"
            )
    if spec.image_columns and spec.image_column:
        raise JobError(
            f"prepare.image_column={spec.image_column!r} is for one image a row and "
            "prepare.image_columns for several; keep one of them"
        )


def require_column(table: pa.Table, column: str, setting: str) -> None:
    """Check that a column that a setting names is there.

    Raises:
        JobError: naming the setting, the column, the nearest match and the columns there are.
    """
    if column not in table.column_names:
        raise JobError(
            f"{setting}: the table has no column {column!r}"
            f"{did_you_mean(column, table.column_names)} (it has: {', '.join(table.column_names)})"
        )


def find_numeric_columns(
    table: pa.Table, spec: PrepareSpec, categorical: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the columns to learn from: those named, or all of numbers that have no other role.

    A column of a CSV is one of numbers if more than half of its filled cells are, or if there is a
    rule for it. So a few words among numbers set rows aside, and do not make the column disappear.

    Raises:
        JobError: if a name is one of the shards' own, or nothing but images is left unawares.
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
            "no column of numbers is left to learn from; name some in prepare.numeric_columns, "
            "or make it empty to learn from images alone"
        )
    for column in columns:
        if column in (KEY, *ImageInfo.of(spec).columns, LABEL):
            raise JobError(
                f"the numeric column {column!r} has the name of one of the shards' own columns; "
                "rename it in the table, or put it into prepare.exclude_columns"
            )
    return columns


def path_pattern(spec: PrepareSpec, name: str = "") -> tuple[list[str], list[str]]:
    """Return the image pattern as columns, and the texts before, between and after them.

    Args:
        spec: with the pattern.
        name: of one of several images, which `{image}` stands for.

    Raises:
        JobError: if a brace is not closed or holds no name, or no column is named.
    """
    pattern = spec.image_pattern.replace("{image}", name) if name else spec.image_pattern
    columns = _BRACES.findall(pattern)
    if not columns or not all(columns) or set("{}") & set(_BRACES.sub("", pattern)):
        raise JobError(
            f"prepare.image_pattern={spec.image_pattern!r} must name columns in braces, such as "
            "'{key}.jpg'"
        )
    return [spec.key_column if c == "key" else c for c in columns], _BRACES.split(pattern)[::2]


def texts_of(column: pa.ChunkedArray) -> pa.StringArray:
    """Return cells as text without spaces around it, whole numbers without `.0`, null if empty.

    Raises:
        JobError: if the column holds something that is no text, such as lists.
    """
    return texts(column).combine_chunks()


def _read_parquet(content: bytes) -> pa.Table:
    file = pq.ParquetFile(io.BytesIO(content))
    # Tables that carry their own pictures, embeddings or the like need not be read whole.
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


def _other_roles(spec: PrepareSpec) -> set[str]:
    roles = [spec.key_column, spec.label_column, spec.group_column, spec.split_column]
    paths = [spec.image_column, *spec.image_columns]
    if not spec.image_column:
        paths += path_pattern(spec, next(iter(spec.image_columns), ""))[0]
    return {role for role in [*roles, *paths, *spec.exclude_columns] if role is not None}


def _holds_numbers(column: pa.ChunkedArray) -> bool:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return is_number(column.type) or pa.types.is_boolean(column.type)
    values, is_text = numbers_of(column)
    return int((~np.isnan(values)).sum()) > int(is_text.sum())
