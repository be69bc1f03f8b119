"""Builds one table from the tables or JSON records of several files."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_jobs.prepare.cell_text import TEXT

CHUNK_RECORDS = 8192
"""Maximum number of records held as Python objects while a file is indexed."""
WORD_SEPARATOR = ";"
"""Separator of words, such as the paths of a row's images, that a file stores as a list."""


class RecordTable:
    """Collects JSON records as Arrow tables, so that few of them are Python objects at a time."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        """Names in the records so far, also of columns that are left out."""
        self._tables: list[pa.Table] = []
        self._records: list[Mapping[str, object]] = []

    def append(self, record: Mapping[str, object]) -> None:
        """Add a record, which may still change until the next one is added."""
        if len(self._records) >= CHUNK_RECORDS:
            self._flush()
        self._records.append(record)

    def to_table(self) -> pa.Table:
        """Return all records; lists of words become text, others and objects are left out."""
        self._flush()
        return stack(self._tables)

    def _flush(self) -> None:
        columns: dict[str, pa.Array] = {}
        for name in dict.fromkeys(name for record in self._records for name in record):
            self.names[name] = None
            cells = [_joined(record.get(name)) for record in self._records]
            if not any(isinstance(cell, list | dict) for cell in cells):
                columns[name] = _array_of_cells(cells)
        self._tables.append(pa.table(columns))
        self._records = []


def stack(tables: Iterable[pa.Table]) -> pa.Table:
    """Concatenate the rows of tables; a column that a table lacks is null in its rows.

    A column of integers in one table and fractions in another becomes fractions. A column of text
    in one and another type in another becomes text.
    """
    tables = list(tables)
    kinds: dict[str, set[pa.DataType]] = {}
    for field in (field for table in tables for field in table.schema):
        kinds.setdefault(field.name, set()).add(field.type)
    mixed: set[str] = set()
    for name, of_name in kinds.items():
        try:
            pa.unify_schemas([pa.schema([("", k)]) for k in of_name], promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid):
            mixed.add(name)
    as_text = [
        table.cast(pa.schema([(f.name, TEXT if f.name in mixed else f.type) for f in table.schema]))
        for table in tables
    ]
    return pa.concat_tables(as_text, promote_options="permissive")


def _joined(cell: object) -> object:
    """Return a list of words as one text, an empty list as a missing cell, others as they are."""
    if isinstance(cell, list) and all(isinstance(word, str) for word in cell):
        return WORD_SEPARATOR.join(cell) or None
    return cell


def _array_of_cells(cells: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(cells)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        as_text = {True: "true", False: "false"}
        return pa.array(
            [None if c is None else as_text[c] if isinstance(c, bool) else str(c) for c in cells],
            TEXT,
        )
