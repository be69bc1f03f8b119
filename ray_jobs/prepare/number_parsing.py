"""Parses cells as numbers, by the rule in `prepare.number_rules` for the column if it has one.

The row of a cell that is neither a number nor covered by the rule goes to quarantine.
"""

# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.prepare_spec import NumberRule
from ray_jobs.prepare.cell_text import (
    FALSE_WORDS,
    MISSING_NUMBERS,
    TEXT,
    TRUE_WORDS,
    column_text,
)

_MAX_PROPOSAL_WORDS = 10_000
"""Maximum number of different cells of a column with which rules are tried."""

_DECIMAL = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?"
_NUMBER = f"^{_DECIMAL}$"
_INFINITY = r"^[+-]?inf(inity)?$"
_CLOSED_RANGE = rf"^(?P<low>{_DECIMAL})\s*(?:-|–|—|to)\s*(?P<high>{_DECIMAL})$"
_OPEN_RANGE = rf"^(?:(?:<=?|>=?|≤|≥)\s*(?P<end>{_DECIMAL})|(?P<base>{_DECIMAL})\s*\+)$"
_SPACES = " \u00a0\u2009\u202f"
_MARKS = (r"\.", f"[{_SPACES}]", "['’]")
_GROUPED = "|".join(rf"[1-9][0-9]{{0,2}}(?:{mark}[0-9]{{3}})+" for mark in _MARKS)
_COMMA = rf"^[+-]?(?:(?:[0-9]+|{_GROUPED})(?:,[0-9]+)?|,[0-9]+)(?:e[+-]?[0-9]+)?$"
_THOUSANDS = rf"^[+-]?[1-9][0-9]{{0,2}}(?:[,{_SPACES}'’][0-9]{{3}})+(?:\.[0-9]+)?$"
_SYMBOL = "[$€£¥₹₽₩₺₫฿¢]"
_CURRENCY = (
    rf"(?:us|ca|au|nz|hk|r|a|c)?{_SYMBOL}|usd|eur|gbp|jpy|chf|cad|aud|nzd|inr|cny|rmb|sek|nok|dkk|"
    "pln|czk|huf|brl|mxn|zar|krw|rub|try|ils|sgd|hkd|thb|kr|rs|zł|fr"
)
_AMOUNT = rf"[0-9](?:[0-9.,{_SPACES}'’]*[0-9])?|[.,][0-9]+"
_MULTIPLES = {"k": 1e3, "m": 1e6, "mn": 1e6, "mio": 1e6, "b": 1e9, "bn": 1e9, "mrd": 1e9}
_MONEY = (
    rf"^(?P<open>\()?\s*(?P<sign>[+-])?\s*(?P<before>{_CURRENCY})?\.?\s*(?P<minus>-)?"
    rf"(?P<amount>{_AMOUNT})\s*(?P<multiple>{'|'.join(_MULTIPLES)})?\.?\s*(?P<after>{_CURRENCY})?"
    r"\.?\s*(?:,?-{1,2}|\))?$"
)
_UNIT = (
    rf"^[~≈]?\s*(?P<sign>[+-])?(?P<amount>{_AMOUNT})\s*"
    r"(?P<unit>(?:\p{L}\S*|[^\p{L}0-9\s.,/_+-][^0-9\s]*)(?: [^0-9\s]+)?)$"
)
_POINTS = r"^[^.]*,[^.]*\.[0-9]+$|^[^,.]*\.(?:[0-9]{1,2}|[0-9]{4,})$|^0?\.|,.*,"
_COMMAS = r"^[^,]*\.[^,]*,[0-9]+$|^[^,.]*,(?:[0-9]{1,2}|[0-9]{4,})$|^0?,|\..*\."
"""Amounts whose decimal mark can only be a point, or only a comma."""
_GAPS = rf"^[0-9]{{1,3}}(?:[{_SPACES}'’][0-9]{{3}})+(?:[.,][0-9]+)?$|^[0-9.,]+$"
"""Amounts whose spaces and apostrophes, if any, separate thousands."""
_DAY_FIRST = r"^(?P<first>[0-9]{1,2})(?P<mark>[./-])(?P<second>[0-9]{1,2})[./-][0-9]{4}(?:[t ].*)?$"
"""Dates that begin with the day or the month."""
_DATE = (
    r"^[0-9]{4}(?:-[0-9]{2}-[0-9]{2}|/[0-9]{2}/[0-9]{2}|\.[0-9]{2}\.[0-9]{2}|[0-9]{4})"
    r"(?:[t ][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:[.,][0-9]+)?)?\s*(?:z|[+-][0-9]{2}:?(?:[0-9]{2})?)?)?$"
)
_DAY = np.timedelta64(1, "D")
_DATES = ("date", "year", "month", "weekday")


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
            `1.234` as 1234; `thousands` reads `1,234.5` and `1 234`. `money` also removes
            currencies, reads `(5)` as -5 and `1.2k` as 1200, and a single comma or point before
            three digits as a thousands separator, unless `money:.` or `money:,` gives the decimal
            mark. `unit:kg` reads numbers with this unit or without one; in them, a point is always
            decimal. `boolean` reads yes and no, true and false and the like. `date` reads ISO 8601
            dates and times, also with `/` or `.` as separator, as days since 1970-01-01 UTC, and
            with `date:dmy` or `date:mdy` also those that begin with the day or the month; `year`,
            `month` and `weekday` are their parts. `missing` treats any other text as missing.

    Raises:
        JobError: If the column holds neither numbers nor text.
    """
    kind = column.type
    name, _, argument = (rule or "").partition(":")
    if name in _DATES:
        if is_date(kind):
            days = (column.to_numpy() - np.datetime64(0, "D")) / _DAY
            is_invalid = np.zeros(len(column), bool)
        else:
            days, is_invalid = _parse(column, partial(_parse_dates, order=argument))
        return days if name == "date" else _date_part(days, name), is_invalid
    if pa.types.is_boolean(kind):
        column = pc.cast(column, pa.int8())
    elif not is_numeric(kind):
        if name == "unit":
            parser = partial(_parse_units, unit=argument or common_unit(column))
        elif name == "money":
            parser = partial(_parse_money, mark=argument)
        else:
            parser = _PARSERS.get(name, _parse_plain)
        values, is_invalid = _parse(column, parser)
        return values, np.zeros_like(is_invalid) if rule == "missing" else is_invalid
    return _to_float64(pc.cast(column, pa.float64(), safe=False)), np.zeros(len(column), bool)


def propose_rule(column: pa.ChunkedArray) -> tuple[NumberRule, float] | None:
    """Return the rule that reads most cells of a column, and the fraction of the cells it reads.

    If several rules read equally many cells, the first one is proposed, so `1,000` is a thousand.
    """
    if is_date(column.type):
        return "date", 1.0
    counts = pc.value_counts(column_text(column).drop_null()).slice(0, _MAX_PROPOSAL_WORDS)
    words, num_rows = pa.chunked_array([counts.field(0)]), counts.field(1).to_numpy()
    if not len(words):
        return None
    unit = common_unit(words)
    rules: list[NumberRule] = ["date", "boolean", "thousands", "decimal_comma", "money"]
    rules += ["range_mean", *([f"unit:{unit}"] if unit else [])]
    if unit == "m":
        # Without a currency, metres, minutes or months are more likely than millions.
        rules.insert(rules.index("money"), rules.pop())
    values = [parse_numbers(words, resolve_rule(words, rule))[0] for rule in rules]
    read = [float(num_rows[~np.isnan(of_rule)].sum()) for of_rule in values]
    best = int(np.argmax(read))
    return (rules[best], read[best] / num_rows.sum()) if read[best] else None


def resolve_rule(column: pa.ChunkedArray, rule: NumberRule) -> NumberRule:
    """Return a rule with what depends on the whole column, so that it reads each cell by itself.

    `unit` becomes `unit:kg`, for the most frequent unit, or `thousands` if there is none. `money`
    becomes `money:.` or `money:,`, by the amounts whose decimal mark is clear, or if there are
    none, by the mark before three digits, which is not decimal. `date` and its parts become
    `date:dmy` or `date:mdy` if dates begin with the day or the month: a number over 12 is a day,
    and points follow days.
    """
    if rule == "unit":
        unit = common_unit(column)
        return f"unit:{unit}" if unit else "thousands"
    if is_numeric(column.type) or is_date(column.type) or pa.types.is_boolean(column.type):
        return rule
    lower = pc.utf8_lower(column_text(column))
    if rule == "money":
        amounts = pc.struct_field(pc.extract_regex(lower, _MONEY), "amount")
        points, commas = (pc.sum(_matches(amounts, p)).as_py() or 0 for p in (_POINTS, _COMMAS))
        if not points and not commas:
            groups = (rf"^[1-9][0-9]{{0,2}}{mark}[0-9]{{3}}$" for mark in (",", r"\."))
            points, commas = (bool(pc.any(_matches(amounts, p)).as_py()) for p in groups)
        return rule if points == commas else f"money:{'.' if points > commas else ','}"
    if rule in _DATES:
        parts = pc.extract_regex(lower, _DAY_FIRST)
        first, second = (_text_to_float64(pc.struct_field(parts, n)) for n in ("first", "second"))
        starts, follows = (first > 12).sum(), (second > 12).sum()
        points = pc.mean(pc.equal(pc.struct_field(parts, "mark"), ".")).as_py() or 0
        if starts > follows or (points > 0.5 and not follows):
            return f"{rule}:dmy"
        return f"{rule}:mdy" if follows > starts else rule
    return rule


def common_unit(column: pa.ChunkedArray) -> str:
    """Return the most frequent unit of a column's cells, such as `kg`; empty if there is none."""
    found = pc.extract_regex(pc.utf8_lower(column_text(column)), _UNIT)
    units = _unit_text(pc.struct_field(found, "unit")).drop_null()
    counts = pc.value_counts(units).to_pylist()
    return min(counts, key=lambda c: (-c["counts"], c["values"]))["values"] if counts else ""


def is_date(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds dates or timestamps."""
    return pa.types.is_date(kind) or pa.types.is_timestamp(kind)


def is_numeric(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds numbers; booleans do not count."""
    types = pa.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


def _parse(
    column: pa.ChunkedArray, parser: Callable[[pa.LargeStringArray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a text column, and a mask of the cells that are not numbers."""
    lower = pc.replace_substring(pc.utf8_lower(column_text(column)), "−", "-")
    if parser is _parse_plain:
        values = parser(lower)
    else:
        # Reading a cell by a rule takes longer than finding the different cells.
        words = lower.dictionary_encode()
        of_word = np.append(parser(words.dictionary), np.nan)
        values = of_word[words.indices.fill_null(-1).to_numpy()]
    missing = pc.or_(pc.is_null(lower), pc.is_in(lower, pa.array(MISSING_NUMBERS, TEXT)))
    return values, np.isnan(values) & ~_to_mask(missing)


def _parse_plain(lower: pa.LargeStringArray) -> np.ndarray:
    values = _text_to_float64(pc.if_else(_matches(lower, _NUMBER), lower, None))
    for word, value in (("true", 1.0), ("false", 0.0)):
        values[_to_mask(pc.equal(lower, word))] = value
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


def _parse_dates(lower: pa.LargeStringArray, order: str = "") -> np.ndarray:
    # This import takes 0.3 s.
    import pandas as pd

    if order:
        lower = pc.replace_substring_regex(lower, r"^([0-9])([./-])", r"0\1\2")
        lower = pc.replace_substring_regex(lower, r"^([0-9]{2}[./-])([0-9][./-])", r"\10\2")
        swapped = r"\3-\2-\1" if order == "dmy" else r"\3-\1-\2"
        pattern = r"^([0-9]{2})[./-]([0-9]{2})[./-]([0-9]{4})"
        lower = pc.replace_substring_regex(lower, pattern, swapped)
    dates = pc.utf8_upper(pc.if_else(_matches(lower, _DATE), lower, None))
    texts = pc.replace_substring_regex(dates, "(:[0-9]{2})[.,]([0-9]{1,6})[0-9]*", r"\1.\2")
    found = pd.to_datetime(texts.to_pandas(), format="ISO8601", utc=True, errors="coerce")
    return (found.dt.tz_localize(None).to_numpy() - np.datetime64(0, "D")) / _DAY


def _parse_thousands(lower: pa.LargeStringArray) -> np.ndarray:
    values = _parse_plain(lower)
    grouped = pc.if_else(_matches(lower, _THOUSANDS), lower, None)
    grouped = pc.replace_substring_regex(grouped, f"[,{_SPACES}'’]", "")
    return np.where(np.isnan(values), _text_to_float64(grouped), values)


def _parse_money(lower: pa.LargeStringArray, mark: str = "") -> np.ndarray:
    found = pc.extract_regex(lower, _MONEY)
    amounts = pc.struct_field(found, "amount")
    if mark:
        # The other mark only separates thousands.
        wrong = _COMMAS if mark == "." else _POINTS
        amounts = pc.if_else(_matches(amounts, wrong), None, amounts)
    groups = {"": "[.,]", ".": ",", ",": r"\."}[mark]
    values = _parse_amounts(amounts, groups)
    for name, multiple in _MULTIPLES.items():
        is_multiple = _to_mask(pc.equal(pc.struct_field(found, "multiple"), name))
        values = np.where(is_multiple, values * multiple, values)
    # `5-` is negative, but `5,-`, `5.-` and `5.--` are whole amounts.
    is_negative = _to_mask(_matches(lower, r"^\(|^[^0-9]*-|[^,.-]-$"))
    return np.where(is_negative, -values, values)


def _parse_units(lower: pa.LargeStringArray, unit: str) -> np.ndarray:
    found = pc.extract_regex(lower, _UNIT)
    is_unit = pc.equal(_unit_text(pc.struct_field(found, "unit")), unit)
    amount = pc.if_else(pc.fill_null(is_unit, False), pc.struct_field(found, "amount"), None)
    values = _parse_amounts(amount, ",")
    is_negative = _to_mask(pc.equal(pc.struct_field(found, "sign"), "-"))
    values = np.where(is_negative, -values, values)
    return np.where(np.isnan(values), _parse_thousands(lower), values)


def _parse_amounts(amounts: pa.LargeStringArray, groups: str) -> np.ndarray:
    """Convert amounts with separators to numbers.

    The last of a comma and a point is decimal. A single one that matches `groups` and precedes
    three digits, or a repeated one, separates thousands.
    """
    amounts = pc.if_else(_matches(amounts, _GAPS), amounts, None)
    plain = pc.replace_substring_regex(amounts, f"[{_SPACES}'’]", "")
    is_grouped = _matches(
        plain,
        rf"^[1-9][0-9]{{0,2}}(?:(?:{groups})[0-9]{{3}})$|^[0-9]{{1,3}}(?:,[0-9]{{3}}){{2,}}$|"
        r"^[0-9]{1,3}(?:\.[0-9]{3}){2,}$",
    )
    comma_last = pc.greater(pc.find_substring(plain, ","), pc.find_substring(plain, "."))
    without_commas = pc.replace_substring(plain, ",", "")
    without_points = pc.replace_substring(pc.replace_substring(plain, ".", ""), ",", ".")
    decimal = pc.if_else(comma_last, without_points, without_commas)
    text = pc.if_else(is_grouped, pc.replace_substring_regex(plain, "[.,]", ""), decimal)
    return _text_to_float64(pc.if_else(_matches(text, _NUMBER), text, None))


def _parse_booleans(lower: pa.LargeStringArray) -> np.ndarray:
    values = np.full(len(lower), np.nan)
    for value, words in ((1.0, ("1", *TRUE_WORDS)), (0.0, ("0", *FALSE_WORDS))):
        values[_to_mask(pc.is_in(lower, pa.array(words, TEXT)))] = value
    return values


def _unit_text(units: pa.LargeStringArray) -> pa.LargeStringArray:
    """Return units without a final point or plural s."""
    units = pc.replace_substring_regex(pc.utf8_trim_whitespace(units), r"\.$", "")
    return pc.replace_substring_regex(units, r"([a-z]{3})s$", r"\1")


def _date_part(days: np.ndarray, part: str) -> np.ndarray:
    import pandas as pd

    index = pd.DatetimeIndex(np.floor(days).astype("datetime64[D]"))
    return getattr(index, "day_of_week" if part == "weekday" else part).to_numpy(float)


_PARSERS: dict[str, Callable[[pa.LargeStringArray], np.ndarray]] = {
    **{end: partial(_parse_ranges, end=end) for end in ("range_low", "range_mean", "range_high")},
    "decimal_comma": _parse_decimal_comma,
    "thousands": _parse_thousands,
    "boolean": _parse_booleans,
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
    """Return a mask, False for null."""
    return pc.fill_null(column, False).to_numpy(zero_copy_only=False).astype(bool)
