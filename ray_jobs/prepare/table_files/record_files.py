"""Reads Excel workbooks, and JSON objects as lines or in an array."""

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from ray_jobs.config.text import names_text
from ray_jobs.prepare.table_files.file_format import RawFile
from ray_jobs.prepare.table_files.record_table import RecordTable
from ray_jobs.prepare.table_files.text_encoding import detect_encoding


def read_json(file: RawFile) -> tuple[pa.Table, tuple[str, ...]]:
    """Return one row per JSON object; see `RecordTable` for lists and objects.

    Raises:
        ValueError: If a line is not a JSON object; the message has its number.
    """
    records = RecordTable()
    head = file.head()
    with file.open() as stream, io.TextIOWrapper(stream, detect_encoding(head)) as text:
        is_array = head.lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"[")
        for number, line in enumerate([text.read()] if is_array else text, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                for record in value if isinstance(value, list) else [value]:
                    if not isinstance(record, dict):
                        raise ValueError("not an object")
                    records.append(record)
            except ValueError as error:
                raise ValueError(
                    f"line {number:,}: {error}; write one JSON object per line, or one array of "
                    "objects"
                ) from error
    table = records.to_table()
    return table, left_out_note([n for n in records.names if n not in table.column_names])


def left_out_note(names: list[str]) -> tuple[str, ...]:
    """Return a note on columns whose cells are neither numbers nor words."""
    return (f"left out lists, objects and bytes: {names_text(names)}",) if names else ()


def read_xlsx(file: RawFile) -> tuple[pa.Table, tuple[str, ...]]:
    """Return the rows of the first visible sheet that is not empty, and notes on its reading.

    Raises:
        ValueError: If there is none, or a row has more cells than the header.
    """
    from openpyxl import load_workbook

    sheets = load_workbook(file.read(), read_only=True, data_only=True).worksheets
    for sheet in sheets:
        # Some programs write wrong dimensions, and openpyxl would then skip cells.
        sheet.reset_dimensions()
        rows = _filled_rows(sheet.iter_rows(values_only=True))
        _, header = next(rows, (0, []))
        if sheet.sheet_state != "visible" or not header:
            continue
        records = RecordTable()
        for number, row in rows:
            if len(row) > len(header):
                raise ValueError(
                    f"row {number:,} of sheet {sheet.title!r} has {len(row)} cells, but the header "
                    f"has {len(header)}; correct the row, or delete the rows above the header"
                )
            row += [None] * (len(header) - len(row))
            records.append({str(i): cell for i, cell in enumerate(row)})
        table = records.to_table()
        if not table.num_rows:
            table = pa.table({str(i): pa.array([], pa.string()) for i in range(len(header))})
        table = table.rename_columns(["" if name is None else str(name) for name in header])
        notes = [f"sheet {sheet.title!r} of {len(sheets)}"] if len(sheets) > 1 else []
        if empty := [f.name for f in table.schema if f.name and pa.types.is_null(f.type)]:
            notes.append(
                f"no values in {names_text(empty)}; if these are formulas, save the file in Excel"
            )
        return table, tuple(notes)
    raise ValueError("it is empty")


def _filled_rows(rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, list[Any]]]:
    """Yield number and cells of each row that is not empty, without empty cells at its end."""
    for number, row in enumerate(rows, 1):
        cells = list(row)
        while cells and cells[-1] in (None, ""):
            cells.pop()
        if cells:
            yield number, cells
