"""Reads table cells as text, with one spelling per value and null for an empty cell.

`column_text` reads each cell by itself. `role_text` also applies the rule of a column, which
`prepare` chooses once and stores, so that a value has one text in CSV, Parquet and Excel files.

Columns of text are `large_string`: `string` has 32-bit offsets, and the keys, paths or words of a
large table can exceed 2 GiB.
"""

# pyright: reportAttributeAccessIssue=false

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec, TextRule

TEXT = pa.large_string()

MISSING_LABELS = ("nan", "-nan", "na", "n/a", "#n/a", "<na>", "null")
"""Labels, in lower case, that count as missing, in addition to empty cells."""
MISSING_NUMBERS = (*MISSING_LABELS, "none")
"""Numbers, in lower case, that count as missing. `MISSING_LABELS` lacks `none`, since a class may
have this name."""
MISSING_WORDS = (
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
    "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
)  # fmt: skip
"""Words that count as missing in groups, splits and categories: those that pandas reads as missing,
which a Parquet file written by pandas therefore cannot contain."""
TRUE_WORDS = ("true", "yes", "t", "y", "on")
FALSE_WORDS = ("false", "no", "f", "n", "off")

_INTEGER = r"^(?:\+|(-))?0*([0-9]+)(?:\.0*)?$"
_PLAIN_NUMBER = r"^-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?$"
_DECIMAL = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?$"


def role_text(
    table: pa.Table, name: str, spec: PrepareSpec, keep_words: bool = False
) -> pa.LargeStringArray:
    """Return the cells of a column by its rule in `prepare.text_rules`, else by `find_text_rule`.

    Args:
        table: The table with the column.
        name: Name of the column.
        spec: The `prepare` section.
        keep_words: Whether words such as `NA` are values, as in keys, and not missing.
    """
    column = table.column(name)
    cells = column_text(column)
    if not keep_words:
        cells = pc.if_else(pc.is_in(cells, pa.array(MISSING_WORDS, TEXT)), None, cells)
    return apply_text_rule(cells, spec.text_rules.get(name) or find_text_rule(column))


def find_text_rule(column: pa.ChunkedArray) -> TextRule:
    """Return the rule under which equal cells of a column have the same text in every format."""
    if pa.types.is_boolean(column.type):
        return "boolean"
    if not _is_text(column.type):
        return "number"
    cells = column_text(column)
    cells = cells.filter(pc.invert(pc.is_in(cells, pa.array(MISSING_WORDS, TEXT)))).drop_null()
    lower = pc.utf8_lower(cells)
    if not len(lower):
        return "text"
    booleans = {*TRUE_WORDS, *FALSE_WORDS, "1", "0"}
    # The first cells are enough to recognise most text.
    if booleans.issuperset(lower[:1000].unique().to_pylist()):
        words = set(lower.unique().to_pylist())
        if words <= booleans and not words <= {"1", "0"}:
            return "boolean"
    if _all_match(lower[:1], _DECIMAL):
        if _all_match(lower, _PLAIN_NUMBER):
            return "number"
        width = pc.utf8_length(lower[0]).as_py()
        is_padded = _all_match(lower, "^[0-9]+$") and pc.all(pc.equal(pc.utf8_length(lower), width))
        if is_padded and pc.is_valid(is_padded) and width < 100:
            return f"digits_{width}"
        return "number" if _all_match(lower, _INTEGER) else "text"
    return "text"


def apply_text_rule(cells: pa.LargeStringArray, rule: TextRule) -> pa.LargeStringArray:
    """Return the cells of `column_text` as the rule reads them; cells that it cannot read stay."""
    if rule == "text":
        return cells
    lower = pc.utf8_lower(cells)
    integers = pc.replace_substring_regex(lower, _INTEGER, r"\1\2")
    is_integer = pc.match_substring_regex(lower, _INTEGER)
    if rule == "boolean":
        is_true = pc.is_in(integers, pa.array(["1", *TRUE_WORDS], TEXT))
        is_false = pc.is_in(integers, pa.array(["0", *FALSE_WORDS], TEXT))
        return pc.case_when(pc.make_struct(is_true, is_false), "true", "false", cells)
    if rule.startswith("digits_"):
        padded = pc.utf8_lpad(integers, int(rule.removeprefix("digits_")), "0")
        return pc.if_else(pc.match_substring_regex(integers, "^[0-9]+$"), padded, cells)
    is_decimal = pc.and_not(pc.match_substring_regex(lower, _DECIMAL), is_integer)
    decimals = pc.cast(pc.if_else(is_decimal, lower, None), pa.float64())
    return pc.case_when(
        pc.make_struct(is_integer, is_decimal, pc.equal(lower, "true"), pc.equal(lower, "false")),
        pc.if_else(pc.equal(integers, "-0"), "0", integers), _float_text(decimals), "1", "0", cells,
    )  # fmt: skip


def column_text(column: pa.ChunkedArray) -> pa.LargeStringArray:
    """Return each cell as text without surrounding spaces, whole floats without `.0`.

    Non-breaking spaces become spaces, and characters have their composed Unicode form (NFC). Empty
    cells and NaN are null. Words such as `NA` are kept, since a key may have this name.

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
        column = _float_text(column)
    try:
        cells = pc.cast(column, TEXT).combine_chunks()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise JobError(
            f"a column of type {column.type} cannot be read as text: {error}; store text or numbers"
        ) from error
    if pa.types.is_decimal(column.type):
        cells = pc.replace_substring_regex(cells, r"(\.[0-9]*?)0+$", r"\1")
        cells = pc.replace_substring_regex(cells, r"\.$", "")
    if pa.types.is_timestamp(column.type):
        cells = pc.replace_substring_regex(cells, r"(?: 00:00:00)?(?:\.0+)?$", "")
    if not pc.all(pc.string_is_ascii(cells)).as_py():
        cells = pc.utf8_normalize(cells, form="NFC")
        cells = pc.replace_substring_regex(cells, "[\u00a0\u2007\u202f]", " ")
        cells = pc.replace_substring_regex(cells, "[\u200b\u2060\ufeff\u00ad]", "")
    cells = pc.utf8_trim_whitespace(cells)
    return pc.if_else(pc.equal(cells, ""), None, cells)


def first_rows(texts: pa.LargeStringArray, among: pa.LargeStringArray) -> np.ndarray:
    """Return the first row of each text among other texts: int64, -1 for null and unknown texts."""
    rows = pc.index_in(texts, value_set=among, skip_nulls=True)
    return rows.fill_null(-1).to_numpy().astype(np.int64)


def label_key(text: str | None) -> str:
    """Return what equal labels have in common: `true` for `True`, `1` for `1.0` and `01`.

    Returns an empty text for a label that counts as missing.
    """
    key = " ".join((text or "").casefold().split())
    if key in MISSING_LABELS:
        return ""
    return re.sub(r"^([+-]?)0*([0-9]+)(\.0+)?$", r"\1\2", key)


def _float_text(column: pa.ChunkedArray | pa.DoubleArray) -> pa.ChunkedArray | pa.LargeStringArray:
    """Return floats as their shortest text, whole numbers without a point, NaN as null."""
    if pa.types.is_float16(column.type):
        column = pc.cast(column, pa.float32())
    column = pc.if_else(pc.is_nan(column), None, column)
    whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**63))
    integers = pc.cast(pc.cast(pc.if_else(whole, column, None), pa.int64()), TEXT)
    return pc.coalesce(integers, pc.cast(column, TEXT))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _all_match(cells: pa.LargeStringArray, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(cells, pattern)).as_py())
