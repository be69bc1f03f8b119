"""Parses cells as numbers, by the rule in `prepare.number_rules` for the column if it has one.

The row of a cell that is neither a number nor covered by the rule goes to quarantine.
"""

# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.spec import NumberRule
from ray_jobs.prepare.cell_text import MISSING_NUMBERS, TEXT, column_text

_DECIMAL = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?"
_NUMBER = f"^{_DECIMAL}$"
_INFINITY = r"^[+-]?inf(inity)?$"
_CLOSED_RANGE = rf"^(?P<low>{_DECIMAL})\s*(?:-|–|—|to)\s*(?P<high>{_DECIMAL})$"
_OPEN_RANGE = rf"^(?:(?:<=?|>=?|≤|≥)\s*(?P<end>{_DECIMAL})|(?P<base>{_DECIMAL})\s*\+)$"
_SPACES = " \u00a0\u2009\u202f"
_MARKS = (r"\.", f"[{_SPACES}]", "['’]")
_GROUPED = "|".join(rf"[0-9]{{1,3}}(?:{mark}[0-9]{{3}})+" for mark in _MARKS)
_COMMA = rf"^[+-]?(?:(?:[0-9]+|{_GROUPED})(?:,[0-9]+)?|,[0-9]+)(?:e[+-]?[0-9]+)?$"
_DAY = "|".join(
    f"(?P<y{i}>[0-9]{{4}}){mark}(?P<m{i}>[0-9]{{2}}){mark}(?P<d{i}>[0-9]{{2}})"
    for i, mark in enumerate(("-", "/", r"\.", ""))
)
_CLOCK = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2}(?:[.,][0-9]+)?))?"
_ZONE = r"z|(?P<sign>[+-])(?P<zone_hour>[0-9]{2}):?(?P<zone_minute>[0-9]{2})?"
_DATE = rf"^(?:{_DAY})(?:(?:t|\s+){_CLOCK}\s*(?:{_ZONE})?)?$"
_DAY_S = 86_400.0


def parse_numbers(
    column: pa.ChunkedArray, rule: NumberRule | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return each cell as float64, and a mask of the cells that are not numbers.

    Missing cells and cells that are not numbers are NaN.

    Args:
        column: Numbers, booleans or text; with the rule `date` also dates and timestamps.
        rule: How to read text other than plain numbers. `range_low`, `range_mean` and `range_high`
            read ranges such as `91-92` and `10 to 20`, and open ranges such as `50+`, `<5` and
            `>=7` by their one end. `decimal_comma` reads `1.234,5` and `1 234,5`, and therefore
            `1.234` as 1234. `date` reads ISO 8601 dates and times, also with `/` or `.` as
            separator, as days since 1970-01-01 UTC. `missing` treats any other text as missing.

    Raises:
        JobError: If the column holds neither numbers nor text.
    """
    kind = column.type
    if rule == "date":
        if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
            days = (column.to_numpy() - np.datetime64(0, "D")) / np.timedelta64(1, "D")
            return days, np.zeros(len(column), bool)
        return _parse(column, _parse_dates)
    if pa.types.is_boolean(kind):
        column = pc.cast(column, pa.int8())
    elif not is_numeric(kind):
        parser = _PARSERS.get(rule, _parse_plain) if rule else _parse_plain
        values, is_invalid = _parse(column, parser)
        return values, np.zeros_like(is_invalid) if rule == "missing" else is_invalid
    return _to_float64(pc.cast(column, pa.float64(), safe=False)), np.zeros(len(column), bool)


def suggest_rule(text: str) -> NumberRule | None:
    """Return the rule that would read a text as a number, or None if there is no clear one.

    `1,000` may be a thousand or one, so no rule is suggested.
    """
    cell = pa.chunked_array([[text]], TEXT)
    lower = pc.utf8_lower(column_text(cell))
    if pc.any(pc.match_substring_regex(lower, r"^[+-]?[0-9]{1,3}(?:,[0-9]{3})+$")).as_py():
        return None
    rules: tuple[NumberRule, ...] = ("date", "decimal_comma", "range_mean")
    return next((rule for rule in rules if not np.isnan(parse_numbers(cell, rule)[0][0])), None)


def is_numeric(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds numbers; booleans do not count."""
    types = pa.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


def _parse(
    column: pa.ChunkedArray, parser: Callable[[pa.LargeStringArray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a text column, and a mask of the cells that are not numbers."""
    lower = pc.replace_substring(pc.utf8_lower(column_text(column)), "−", "-")
    values = parser(lower)
    missing = pc.or_(pc.is_null(lower), pc.is_in(lower, pa.array(MISSING_NUMBERS, TEXT)))
    return values, np.isnan(values) & ~_to_mask(missing)


def _parse_plain(lower: pa.LargeStringArray) -> np.ndarray:
    values = _text_to_float64(pc.if_else(_matches(lower, _NUMBER), lower, None))
    for word, value in (("true", 1.0), ("false", 0.0)):
        values[_to_mask(pc.fill_null(pc.equal(lower, word), False))] = value
    values[_to_mask(_matches(lower, _INFINITY))] = np.inf
    return values


def _parse_decimal_comma(lower: pa.LargeStringArray) -> np.ndarray:
    words = pc.if_else(_matches(lower, "[0-9]"), None, lower)
    plain = pc.replace_substring_regex(lower, rf"[.{_SPACES}'’]", "")
    plain = pc.replace_substring(plain, ",", ".")
    values = _text_to_float64(pc.if_else(_matches(lower, _COMMA), plain, None))
    return np.where(np.isnan(values), _parse_plain(words), values)


def _parse_ranges(lower: pa.LargeStringArray, end: NumberRule) -> np.ndarray:
    values = _parse_plain(lower)
    closed = pc.extract_regex(lower, _CLOSED_RANGE)
    low, high = (_text_to_float64(pc.struct_field(closed, name)) for name in ("low", "high"))
    chosen = {"range_low": low, "range_mean": low + (high - low) / 2, "range_high": high}[end]
    opened = pc.extract_regex(lower, _OPEN_RANGE)
    for name in ("end", "base"):
        bound = _text_to_float64(pc.struct_field(opened, name))
        values = np.where(np.isnan(values), bound, values)
    # A range rises: `2024-03` is not one.
    return np.where(np.isnan(values) & (low <= high), chosen, values)


def _parse_dates(lower: pa.LargeStringArray) -> np.ndarray:
    found = pc.extract_regex(lower, _DATE)

    def part(name: str) -> np.ndarray:
        return _text_to_float64(pc.replace_substring(pc.struct_field(found, name), ",", "."))

    year, month, day = (
        np.nansum([part(f"{name}{i}") for i in range(4)], axis=0).astype(np.int64) for name in "ymd"
    )
    first = (year * 12 + month - 1 - 1970 * 12).astype("datetime64[M]")
    date = first.astype("datetime64[D]") + (day - 1)
    hour, minute, second = (np.nan_to_num(part(name)) for name in ("hour", "minute", "second"))
    zone_hour, zone_minute = (np.nan_to_num(part(f"zone_{name}")) for name in ("hour", "minute"))
    is_behind = pc.equal(pc.struct_field(found, "sign"), "-")
    sign = np.where(_to_mask(pc.fill_null(is_behind, False)), -1.0, 1.0)
    seconds = hour * 3600 + minute * 60 + second - sign * (zone_hour * 3600 + zone_minute * 60)
    is_date = (
        _to_mask(pc.is_valid(found))
        # NumPy carries a day past the end of its month into the next month.
        & ((month >= 1) & (month <= 12) & (day >= 1) & (date.astype("datetime64[M]") == first))
        & ((hour < 24) & (minute < 60) & (second < 60) & (zone_hour < 24) & (zone_minute < 60))
    )
    return np.where(is_date, date.astype(np.int64) + seconds / _DAY_S, np.nan)


_PARSERS: dict[NumberRule, Callable[[pa.LargeStringArray], np.ndarray]] = {
    "range_low": lambda lower: _parse_ranges(lower, "range_low"),
    "range_mean": lambda lower: _parse_ranges(lower, "range_mean"),
    "range_high": lambda lower: _parse_ranges(lower, "range_high"),
    "decimal_comma": _parse_decimal_comma,
}


def _matches(cells: pa.LargeStringArray, pattern: str) -> pa.BooleanArray:
    return pc.fill_null(pc.match_substring_regex(cells, pattern), False)


def _text_to_float64(cells: pa.LargeStringArray) -> np.ndarray:
    """Convert text that spells numbers to float64, with NaN for null and empty text."""
    return _to_float64(pc.cast(pc.if_else(pc.equal(cells, ""), None, cells), pa.float64()))


def _to_float64(column: pa.DoubleArray | pa.ChunkedArray) -> np.ndarray:
    """Return a copy as float64, NaN for null."""
    return np.array(column, np.float64)


def _to_mask(column: pa.BooleanArray) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False).astype(bool)
