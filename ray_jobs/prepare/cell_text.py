"""Reads table cells as text, with one spelling per value and null for an empty cell.

Columns of text are `large_string`: `string` has 32-bit offsets, and the keys, paths or words of a
large table can exceed 2 GiB.
"""

# pyright: reportAttributeAccessIssue=false

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError

TEXT = pa.large_string()

MISSING_LABELS = ("nan", "-nan", "na", "n/a", "#n/a", "<na>", "null")
"""Labels, in lower case, that count as missing, in addition to empty cells."""
MISSING_NUMBERS = (*MISSING_LABELS, "none")
"""Numbers, in lower case, that count as missing. `MISSING_LABELS` lacks `none`, since a class may
have this name."""


def column_text(column: pa.ChunkedArray) -> pa.LargeStringArray:
    """Return the cells as text without surrounding spaces, whole numbers without `.0`.

    Empty cells and NaN are null. Words such as `NA` are kept, since a key or a category may have
    this name.

    Raises:
        JobError: If the column holds something other than text and numbers, such as lists.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        if pa.types.is_string(kind.value_type):
            # Decoding repeats the words and may need more than 2 GiB.
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
        raise JobError(
            f"a column of type {column.type} cannot be read as text: {error}; store text or numbers"
        ) from error
    cells = pc.if_else(pc.equal(cells, ""), None, cells)
    # pandas writes whole numbers as 1.0 in a column that has missing cells.
    if pc.all(pc.match_substring_regex(cells, r"^-?[0-9]+\.0$")).as_py():
        cells = pc.replace_substring_regex(cells, r"\.0$", "")
    return cells


def first_rows(texts: pa.LargeStringArray, among: pa.LargeStringArray) -> np.ndarray:
    """Return the first row of each text among other texts: int64, -1 for null and unknown texts."""
    rows = pc.index_in(texts, value_set=among, skip_nulls=True)
    return rows.fill_null(-1).to_numpy().astype(np.int64)


def label_text(text: str) -> str | None:
    """Return the normalized spelling of a label, such as `true` for `True` and `1` for `1.0`.

    Returns None for a label that counts as missing.
    """
    if text.lower() in MISSING_LABELS:
        return None
    if text.lower() in ("true", "false"):
        return text.lower()
    return re.sub(r"^([+-]?[0-9]+)\.0+$", r"\1", text)
