"""Reads table cells as text, with one spelling per value and null for an empty cell.

Columns of text are `large_string`: `string` has 32-bit offsets, and the keys, paths or words of a
large table can exceed 2 GiB.
"""

# pyright: reportAttributeAccessIssue=false

import re

import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError

TEXT = pa.large_string()

MISSING_LABELS = ("nan", "-nan", "na", "n/a", "#n/a", "<na>", "null")
"""Labels, in lower case, that count as missing, in addition to empty cells."""
MISSING_NUMBERS = (*MISSING_LABELS, "none")
"""The same for numbers. A class, by contrast, may be called `none`."""


def column_text(column: pa.ChunkedArray) -> pa.LargeStringArray:
    """Return the cells as text without surrounding spaces, whole numbers without `.0`.

    Empty cells and NaN are null. Words such as `NA` are kept, since a key or a category may be
    called so.

    Raises:
        JobError: If the column holds something other than text and numbers, such as lists.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        if pa.types.is_string(kind.value_type):
            # Decoding repeats the words, which may take more than 2 GiB.
            kind = pa.dictionary(kind.index_type, TEXT)
        column = pc.cast(pc.cast(column, kind), kind.value_type)
    if pa.types.is_floating(column.type):
        column = pc.cast(column, pa.float64())
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**63))
        integers = pc.cast(pc.cast(pc.if_else(whole, column, None), pa.int64()), TEXT)
        column = pc.coalesce(integers, pc.cast(column, TEXT))
    try:
        cells = pc.utf8_trim_whitespace(pc.cast(column, TEXT).combine_chunks())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise JobError(f"a column of type {column.type} cannot be read as text: {error}") from error
    cells = pc.if_else(pc.equal(cells, ""), None, cells)
    # pandas writes whole numbers as 1.0 in a column that has missing cells.
    if pc.all(pc.match_substring_regex(cells, r"^-?[0-9]+\.0$")).as_py():
        cells = pc.replace_substring_regex(cells, r"\.0$", "")
    return cells


def label_text(text: str) -> str | None:
    """Return the one spelling of a label, such as `true` for `True` and `1` for `1.0`.

    A label that counts as missing gives None.
    """
    if text.lower() in MISSING_LABELS:
        return None
    if text.lower() in ("true", "false"):
        return text.lower()
    return re.sub(r"^([+-]?[0-9]+)\.0+$", r"\1", text)
