"""Rewrites decimal commas in columns of numbers, such as `1,5`, as decimal points."""

# pyright: reportAttributeAccessIssue=false

import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.prepare.cell_text import MISSING_NUMBERS

_COMMA = r"^\s*[+−-]?[0-9]*,[0-9]+(?:[eE][+-]?[0-9]+)?\s*$"
_THOUSANDS = r"^\s*[+−-]?[1-9][0-9]{0,2},[0-9]{3}\s*$"
_WHOLE = r"^\s*[+−-]?[0-9]+\s*$"
_MISSING = rf"(?i)^\s*(?:{'|'.join(MISSING_NUMBERS)})?\s*$"
_MIN_CLEAR_FRACTION = 0.05


def replace_decimal_commas(table: pa.Table) -> tuple[pa.Table, list[str]]:
    """Return the table with decimal points, and the changed columns.

    A column changes if all of its cells with a comma are numbers, and at least 5% of them cannot be
    thousands: `1,5`, `0,125` and `1,2345` cannot, but `1,234` can. It must have no number with a
    point, and fewer words than numbers.
    """
    changed: list[str] = []
    for i, name in enumerate(table.column_names):
        column = table.column(i)
        if _has_decimal_commas(column):
            table = table.set_column(i, name, pc.replace_substring(column, ",", "."))
            changed.append(name)
    return table, changed


def _has_decimal_commas(column: pa.ChunkedArray) -> bool:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return False
    # The first cells are enough to recognise most text.
    for part in (column[:1000], column):
        has_comma = pc.fill_null(pc.match_substring(part, ","), False)
        cells = part.filter(has_comma)
        if _count(cells, _COMMA) < len(cells):
            return False
    if not len(cells):
        return False
    num_clear = len(cells) - _count(cells, _THOUSANDS)
    others = column.filter(pc.invert(has_comma)).drop_null()
    num_words = len(others) - _count(others, _WHOLE) - _count(others, _MISSING)
    return (
        num_clear >= _MIN_CLEAR_FRACTION * len(cells)
        and _count(others, r"[0-9]\.[0-9]") == 0
        and num_words < len(cells) + _count(others, _WHOLE)
    )


def _count(cells: pa.ChunkedArray, pattern: str) -> int:
    return pc.sum(pc.match_substring_regex(cells, pattern)).as_py() or 0
