"""Reads the table in one file, or in the files of a folder or glob."""

# pyright: reportAttributeAccessIssue=false

import re
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import EmptyTableError, JobError
from ray_jobs.config.text import count_text, names_text
from ray_jobs.prepare.number_parsing import parse_numbers
from ray_jobs.prepare.table_files.csv_files import read_csv
from ray_jobs.prepare.table_files.file_format import TABLE_NAME, Format, RawFile, unpack
from ray_jobs.prepare.table_files.record_files import left_out_note, read_json, read_xlsx
from ray_jobs.prepare.table_files.record_table import WORD_SEPARATOR, stack
from ray_jobs.storage.folder import Folder, expand_braces, glob_regex, split_file, split_glob

_BUFFER_BYTES = 8 << 20
_COMMA = r"^\s*[+−-]?[0-9]*,[0-9]+(?:[eE][+-]?[0-9]+)?\s*$"
_THOUSANDS = r"^\s*[+−-]?[1-9][0-9]{0,2},[0-9]{3}\s*$"
_MIN_CLEAR_FRACTION = 0.05

Rows = tuple[pa.Table, tuple[str, ...]]


class TableFile(NamedTuple):
    """A table, and notes on how its files were understood."""

    table: pa.Table
    notes: tuple[str, ...]


def open_table(location: str, ruled: Collection[str] = ()) -> TableFile:
    """Read a table, which may have no rows.

    Args:
        location: Path or URI of a CSV, Parquet, JSON or Excel file, also compressed, or of a folder
            or glob of such files with the same columns.
        ruled: Columns with a rule in `prepare.number_rules`, whose decimal commas are left to it.

    Raises:
        EmptyTableError: If the table has no columns, such as `[]` in a JSON file.
        JobError: If there is no file, a file cannot be read, columns have the same name, or files
            have different columns.
    """
    if not location:
        raise JobError("prepare.table is not set; give the path or URI of a table")
    files = _find_files(location)
    parts = [_read_file(file) for file in files]
    notes = [note for _, of_part in parts for note in of_part]
    tables = [table for table, _ in parts]
    for file, table in zip(files, tables, strict=True):
        if difference := set(table.column_names) ^ set(tables[0].column_names):
            raise JobError(
                f"the tables {files[0].name} and {file.name} have different columns: "
                f"{names_text(sorted(difference))} only in one of them; make them equal, or give a "
                "glob that excludes one"
            )
    if len(files) > 1:
        notes.insert(0, f"{len(files)} parts")
    table = stack(tables) if len(tables) > 1 else tables[0]
    if not table.num_columns:
        raise EmptyTableError(f"the table {location} has no columns")
    table, converted = _replace_decimal_commas(table, ruled)
    if converted:
        notes.append(f"decimal commas in {names_text(converted)}")
    return TableFile(table, tuple(f"table: {note}" for note in dict.fromkeys(notes)))


def _find_files(location: str) -> list[RawFile]:
    base, pattern = split_glob(location)
    if pattern is None:
        folder, name = split_file(location.rstrip("/"))
        kind = folder.filesystem.get_file_info(folder.locate(name)).type
        if kind == fs.FileType.File:
            return [_raw_file(folder, name, location)]
        if kind != fs.FileType.Directory:
            selector = fs.FileSelector(folder.path, allow_not_found=True)
            nearby = folder.filesystem.get_file_info(selector) if folder.is_local else []
            suggestion = did_you_mean(name, [info.base_name for info in nearby])
            raise JobError(f"the table {location} does not exist{suggestion}")
        folder = Folder(location)
        matches: list[Callable[[str], object]] = [TABLE_NAME.search]
    else:
        folder = Folder(base)
        matches = [re.compile(glob_regex(each)).fullmatch for each in expand_braces(pattern)]
    shown = [name for name in folder.names() if not re.search(r"(^|/)[._]", name)]
    names = [name for name in shown if any(match(name) for match in matches)]
    if not names and pattern is None:
        # Spark and Hadoop also write parts without a suffix.
        names = [name for name in shown if re.search(r"(^|/)part-[^.]*$", name)]
    if not names:
        raise JobError(
            f"the table {location} is a folder or glob without CSV, Parquet, JSON or Excel files; "
            "give their folder, or a glob that matches them"
        )
    return [_raw_file(folder, name, f"{folder}/{name}") for name in names]


def _raw_file(folder: Folder, name: str, location: str) -> RawFile:
    path = folder.locate(name)
    # pyarrow would otherwise decompress by suffix.
    options = {"compression": None, "buffer_size": None if folder.is_local else _BUFFER_BYTES}
    return RawFile(location, partial(folder.filesystem.open_input_stream, path, **options))


def _read_file(file: RawFile) -> Rows:
    try:
        file, kind = unpack(file)
        table, notes = _READERS[kind](file)
    except JobError:
        raise
    # zipfile, lzma and openpyxl raise errors of many kinds for damaged files.
    except Exception as error:
        raise JobError(f"the table {file.name} could not be read: {error}") from error
    table, dropped = _drop_empty(_with_unique_names(table, file.name))
    return table, (*notes, *dropped)


def _with_unique_names(table: pa.Table, location: str) -> pa.Table:
    """Return a table with stripped names; the second and later empty ones become positions."""
    names = [name.strip() for name in table.column_names]
    first = names.index("") if "" in names else 0
    names = [n or ("" if i == first else f"column {i + 1}") for i, n in enumerate(names)]
    for name, count in Counter(names).items():
        if count > 1:
            positions = [str(i) for i, each in enumerate(names, 1) if each == name]
            raise JobError(
                f"the table {location} has more than one column named {name!r}: columns "
                f"{' and '.join(positions)}, counted from 1; rename them"
            )
    return table.rename_columns(names)


def _drop_empty(table: pa.Table) -> Rows:
    """Drop empty columns without a name, and rows of empty texts."""
    notes: list[str] = []
    unnamed = [n for n in table.column_names if re.fullmatch(r"|column [0-9]+", n)]
    if empty := [n for n in unnamed if pc.all(_is_empty(table.column(n))).as_py()]:
        table = table.drop_columns(empty)
        notes.append(f"dropped {count_text(len(empty), 'empty column')} without a name")
    is_empty = None
    for column in table.columns:
        is_empty = pc.and_(_is_empty(column), True if is_empty is None else is_empty)
        if not pc.any(is_empty).as_py():
            return table, tuple(notes)
    if table.num_rows:
        notes.append(f"skipped {count_text(pc.sum(is_empty).as_py(), 'empty row')}")
        table = table.filter(pc.invert(is_empty))
    return table, tuple(notes)


def _is_empty(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not _is_text(column):
        return pc.and_(pc.is_null(column), pa.types.is_null(column.type))
    return pc.fill_null(pc.equal(pc.binary_length(column), 0), False)


def _replace_decimal_commas(table: pa.Table, ruled: Collection[str]) -> tuple[pa.Table, list[str]]:
    """Return the table with decimal points, and the changed columns.

    A column changes if all of its cells with a comma are numbers, and at least 5% of them cannot be
    thousands: `1,5`, `0,125` and `1,2345` cannot, but `1,234` can. It must have no number with a
    point, and fewer words than numbers.
    """
    changed: list[str] = []
    for i, name in enumerate(table.column_names):
        column = table.column(i)
        if name not in ruled and _has_decimal_commas(column):
            table = table.set_column(i, name, pc.replace_substring(column, ",", "."))
            changed.append(name)
    return table, changed


def _has_decimal_commas(column: pa.ChunkedArray) -> bool:
    if not _is_text(column):
        return False
    # The first cells are enough to recognise most text.
    for part in (column[:1000], column):
        has_comma = pc.fill_null(pc.match_substring(part, ","), False)
        cells = part.filter(has_comma)
        if pc.all(pc.match_substring_regex(cells, _COMMA)).as_py() is False:
            return False
    if not len(cells):
        return False
    others = column.filter(pc.invert(has_comma))
    numbers, is_word = parse_numbers(others)
    return bool(
        1 - pc.mean(pc.match_substring_regex(cells, _THOUSANDS)).as_py() >= _MIN_CLEAR_FRACTION
        and not pc.any(pc.match_substring_regex(others, r"[0-9]\.[0-9]")).as_py()
        and is_word.sum() < len(cells) + np.isfinite(numbers).sum()
    )


def _is_text(column: pa.ChunkedArray) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _read_parquet(file: RawFile) -> Rows:
    parquet = pq.ParquetFile(file.read())
    # Embedded images, embeddings and the like.
    lists = [f.name for f in parquet.schema_arrow if _is_list_of_words(f.type)]
    left_out = [
        f.name
        for f in parquet.schema_arrow
        if (pa.types.is_nested(f.type) and f.name not in lists) or pa.types.is_binary(f.type)
        or pa.types.is_large_binary(f.type)
    ]  # fmt: skip
    columns = [name for name in parquet.schema_arrow.names if name not in left_out]
    table = parquet.read(columns=columns)
    for name in lists:
        words = pc.binary_join(table.column(name), WORD_SEPARATOR)
        table = table.set_column(table.column_names.index(name), name, words)
    return table, left_out_note(left_out)


def _is_list_of_words(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and (
        pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)
    )


_READERS: dict[Format, Callable[[RawFile], Rows]] = {
    "parquet": _read_parquet,
    "xlsx": read_xlsx,
    "json": read_json,
    "csv": read_csv,
}
