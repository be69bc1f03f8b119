"""Cells → numbers, by what the user says text in a column means.

What neither is a number nor is understood by the column's rule is no number: its row goes to
quarantine. Imports neither Ray nor TensorFlow.
"""

# pyarrow makes the functions of its compute module when it is imported, unseen by pyright.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import NumberRule

_MISSING = ("nan", "na", "n/a", "#n/a", "<na>", "null", "none", "-nan")
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
_UNITS_PER_S = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


def numbers_of(
    column: pa.ChunkedArray, rule: NumberRule | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return cells as float64, NaN where one is missing or no number; and which are no number.

    Args:
        column: of numbers, booleans or text; with the rule `date` also of dates and timestamps.
        rule: what text other than plain numbers means. `range_low`, `range_mean` and `range_high`
            read `91-92`, `10 to 20` and, by their one end, `50+`, `<5` and `>=7`;
            `decimal_comma` reads `1.234,5` and `1 234,5`, so that `1.234` is 1234; `date` reads
            ISO 8601 days and times, also with `/` or `.` between, as days since 1970-01-01 UTC;
            `missing` takes all that is no number for missing.

    Raises:
        JobError: if the column holds neither numbers nor text.
    """
    kind = column.type
    if rule == "date":
        if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
            return _days_of_timestamps(column), np.zeros(len(column), bool)
        return _parse(texts(column), _parse_dates)
    if pa.types.is_boolean(kind):
        column = pc.cast(column, pa.int8())
    elif not is_number(kind):
        parser = _PARSERS.get(rule, _parse_numbers) if rule else _parse_numbers
        values, is_text = _parse(texts(column), parser)
        return values, np.zeros_like(is_text) if rule == "missing" else is_text
    values = pc.cast(column, pa.float64(), safe=False)
    return np.array(values.to_numpy(), np.float64), np.zeros(len(column), bool)


def suggest_rule(text: str) -> NumberRule | None:
    """Return the rule by which a text that is no number would be one, if that is clear.

    `1,000` may be a thousand or one, so nothing is suggested.
    """
    cell = pa.chunked_array([pa.array([text], pa.string())])
    lower = pc.utf8_lower(texts(cell))
    if pc.any(pc.match_substring_regex(lower, r"^[+-]?[0-9]{1,3}(?:,[0-9]{3})+$")).as_py():
        return None
    rules: tuple[NumberRule, ...] = ("date", "decimal_comma", "range_mean")
    return next((rule for rule in rules if not np.isnan(numbers_of(cell, rule)[0][0])), None)


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type holds numbers, not counting booleans."""
    types = pa.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


def texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return cells as text without spaces around it, whole numbers without `.0`, null if empty.

    Raises:
        JobError: if the column holds something that is no text, such as lists.
    """
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.cast(column, pa.float64())
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**63))
        integers = pc.cast(pc.cast(pc.if_else(whole, column, None), pa.int64()), pa.string())
        column = pc.coalesce(integers, pc.cast(column, pa.string()))
    try:
        cells = pc.utf8_trim_whitespace(pc.cast(column, pa.string()))
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise JobError(f"a column of type {column.type} cannot be read as text: {error}") from error
    cells = pc.if_else(pc.equal(cells, ""), None, cells)
    # What pandas makes of whole numbers in a column where some are missing.
    if pc.all(pc.match_substring_regex(cells, r"^-?[0-9]+\.0$")).as_py():
        cells = pc.replace_substring_regex(cells, r"\.0$", "")
    return cells


def _parse(
    cells: pa.ChunkedArray, parser: Callable[[pa.ChunkedArray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of texts, and which of them mean neither a number nor a missing one."""
    lower = pc.replace_substring(pc.utf8_lower(cells), "−", "-")
    values = parser(lower)
    missing = pc.or_(pc.is_null(lower), pc.is_in(lower, pa.array(_MISSING)))
    return values, np.isnan(values) & ~_mask(missing)


def _parse_numbers(lower: pa.ChunkedArray) -> np.ndarray:
    values = _floats(pc.if_else(_matches(lower, _NUMBER), lower, None))
    for word, value in (("true", 1.0), ("false", 0.0)):
        values[_mask(pc.fill_null(pc.equal(lower, word), False))] = value
    values[_mask(_matches(lower, _INFINITY))] = np.inf
    return values


def _parse_commas(lower: pa.ChunkedArray) -> np.ndarray:
    words = pc.if_else(_matches(lower, "[0-9]"), None, lower)
    plain = pc.replace_substring_regex(lower, rf"[.{_SPACES}'’]", "")
    plain = pc.replace_substring(plain, ",", ".")
    values = _floats(pc.if_else(_matches(lower, _COMMA), plain, None))
    return np.where(np.isnan(values), _parse_numbers(words), values)


def _parse_ranges(lower: pa.ChunkedArray, end: NumberRule) -> np.ndarray:
    values = _parse_numbers(lower)
    closed = pc.extract_regex(lower, _CLOSED_RANGE)
    low, high = (_floats(pc.struct_field(closed, name)) for name in ("low", "high"))
    chosen = {"range_low": low, "range_mean": low + (high - low) / 2, "range_high": high}[end]
    opened = pc.extract_regex(lower, _OPEN_RANGE)
    for name in ("end", "base"):
        bound = _floats(pc.struct_field(opened, name))
        values = np.where(np.isnan(values), bound, values)
    # What falls, such as `2024-03`, is no range.
    return np.where(np.isnan(values) & (low <= high), chosen, values)


def _parse_dates(lower: pa.ChunkedArray) -> np.ndarray:
    found = pc.extract_regex(lower, _DATE)

    def part(name: str) -> np.ndarray:
        return _floats(pc.replace_substring(pc.struct_field(found, name), ",", "."))

    year, month, day = (
        np.nansum([part(f"{name}{i}") for i in range(4)], axis=0).astype(np.int64) for name in "ymd"
    )
    first = (year * 12 + month - 1 - 1970 * 12).astype("datetime64[M]")
    date = first.astype("datetime64[D]") + (day - 1)
    hour, minute, second = (np.nan_to_num(part(name)) for name in ("hour", "minute", "second"))
    zone_hour, zone_minute = (np.nan_to_num(part(f"zone_{name}")) for name in ("hour", "minute"))
    is_behind = pc.equal(pc.struct_field(found, "sign"), "-")
    sign = np.where(_mask(pc.fill_null(is_behind, False)), -1.0, 1.0)
    seconds = hour * 3600 + minute * 60 + second - sign * (zone_hour * 3600 + zone_minute * 60)
    is_date = (
        _mask(pc.is_valid(found))
        # A day beyond the month's last falls into the next.
        & ((month >= 1) & (month <= 12) & (day >= 1) & (date.astype("datetime64[M]") == first))
        & ((hour < 24) & (minute < 60) & (second < 60) & (zone_hour < 24) & (zone_minute < 60))
    )
    return np.where(is_date, date.astype(np.int64) + seconds / _DAY_S, np.nan)


def _days_of_timestamps(column: pa.ChunkedArray) -> np.ndarray:
    kind = column.type
    if pa.types.is_date32(kind):
        days = pc.cast(pc.cast(column, pa.int32()), pa.float64())
        return np.array(days.to_numpy(), np.float64)
    per_s = _UNITS_PER_S["ms" if pa.types.is_date64(kind) else kind.unit]
    units = pc.cast(pc.cast(column, pa.int64()), pa.float64(), safe=False)
    return np.array(units.to_numpy(), np.float64) / (per_s * _DAY_S)


_PARSERS: dict[NumberRule, Callable[[pa.ChunkedArray], np.ndarray]] = {
    "range_low": lambda lower: _parse_ranges(lower, "range_low"),
    "range_mean": lambda lower: _parse_ranges(lower, "range_mean"),
    "range_high": lambda lower: _parse_ranges(lower, "range_high"),
    "decimal_comma": _parse_commas,
}


def _matches(cells: pa.ChunkedArray, pattern: str) -> pa.ChunkedArray:
    return pc.fill_null(pc.match_substring_regex(cells, pattern), False)


def _floats(cells: pa.ChunkedArray) -> np.ndarray:
    """Return texts that are numbers as float64, NaN where one is null or empty."""
    cells = pc.if_else(pc.equal(cells, ""), None, cells)
    return np.array(pc.cast(cells, pa.float64()).to_numpy(), np.float64)


def _mask(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(bool)
