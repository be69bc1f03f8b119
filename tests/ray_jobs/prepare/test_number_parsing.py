import datetime as dt

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.prepare.number_parsing import parse_numbers, propose_rule, resolve_rule
from tests.ray_jobs.prepare.sources.samples import column

NAN = float("nan")


def check(cells: dict, rule=None) -> None:
    """Compare the number of each text; `...` marks text that is not a number."""
    values, is_invalid = parse_numbers(column(*cells), rule)
    assert is_invalid.tolist() == [value is ... for value in cells.values()]
    np.testing.assert_array_equal(values, [NAN if v is ... else v for v in cells.values()])


def test_without_a_rule_only_plain_numbers_are_read():
    check(
        {" 1.50 ": 1.5, "-2e3": -2000, "+.5": 0.5, "5.": 5, "1E-2": 0.01, "True": 1, "inf": np.inf}
        | dict.fromkeys([None, "", "NA", "N/A", "NaN", "null", "None"], NAN)
        | dict.fromkeys(["50+", "91-92", "1,5", "2024-03-01", "unknown", "0x10", "1_0", "."], ...)
    )


@pytest.mark.parametrize(
    ("rule", "place"), [("range_low", 0), ("range_mean", 0.5), ("range_high", 1)]
)
def test_a_range_is_read_as_its_low_end_mean_or_high_end_and_an_open_one_as_its_end(rule, place):
    ends = {
        "91-92": (91, 92),
        "1.5 – 2.5": (1.5, 2.5),
        "10 to 20": (10, 20),
        "3—4": (3, 4),
        "-5--1": (-5, -1),
        "-5 - 1": (-5, 1),
        "−5–−1": (-5, -1),
        "1e-3-1e-1": (1e-3, 1e-1),
        "7-7": (7, 7),
    }
    check(
        {text: low + (high - low) * place for text, (low, high) in ends.items()}
        | {"50+": 50, "2.5 +": 2.5, "<5": 5, "< -5": -5, ">=7": 7, "≤3": 3, "12": 12, "na": NAN}
        | dict.fromkeys(["2024-03", "5-1", "a-b", "1-2-3", "+", "<", "1,5", "50++", "4 5"], ...),
        rule,
    )


def test_a_decimal_comma_allows_one_kind_of_thousands_separator():
    check(
        {
            "1.234,5": 1234.5,
            "1 234,5": 1234.5,
            "1\u202f234\u202f567": 1234567,
            "-1'234,5": -1234.5,
            "0,25": 0.25,
            ",5": 0.5,
            "1,5e3": 1500,
            "1.234": 1234,
            "12": 12,
            "none": NAN,
            "true": 1,
            "-inf": np.inf,
        }
        | dict.fromkeys(["1.5", "1.23,5", "1.234 567", "1,2,3", "1234.567,8", "0.123", "1,"], ...),
        "decimal_comma",
    )


def test_dates_are_read_as_days_since_1970():
    def days(*date: int, zone: dt.timezone = dt.UTC) -> float:
        return dt.datetime(*date, tzinfo=zone).timestamp() / 86400  # type: ignore[arg-type]

    check(
        {
            "1970-01-01": 0,
            "1969-12-31": -1,
            "2024-02-29": days(2024, 2, 29),
            **dict.fromkeys(["2024/03/01", "2024.03.01", "20240301"], days(2024, 3, 1)),
            "2024-03-01T12:30": days(2024, 3, 1, 12, 30),
            "2024-03-01 12:30:15.25": days(2024, 3, 1, 12, 30, 15, 250_000),
            "2024-03-01t12:30:15z": days(2024, 3, 1, 12, 30, 15),
            "2024-03-01T00:30:00-05:30": days(2024, 3, 1, 6),
            "2024-03-01T00:30:00+0130": days(2024, 2, 29, 23),
            "1900-03-01": days(1900, 3, 1),
            "0001-01-01": -719162,
            "NaN": NAN,
        }
        | dict.fromkeys(
            ["2023-02-29", "2024-13-01", "2024-00-01", "01/02/2024", "2024-3-1", "2024", "5",
             "2024-03-01T24:00", "2024-03-01T12", "2024-03/01", "20240230"], ...
        ),
        "date",
    )  # fmt: skip


def test_dates_and_timestamps_from_parquet_are_read_as_days():
    moment = dt.datetime(1999, 12, 31, 18, 0)
    expected = [(moment - dt.datetime(1970, 1, 1)) / dt.timedelta(days=1), NAN]
    for kind in [*(pa.timestamp(unit) for unit in ("s", "ms", "us", "ns")),
                 pa.timestamp("ms", tz="Europe/Berlin")]:  # fmt: skip
        values, is_invalid = parse_numbers(column(moment, None, kind=kind), "date")
        np.testing.assert_array_equal(values, expected)
        assert not is_invalid.any()
    for kind in (pa.date32(), pa.date64()):
        values, _ = parse_numbers(column(moment.date(), None, kind=kind), "date")
        np.testing.assert_array_equal(values, np.floor(expected))
    np.testing.assert_array_equal(parse_numbers(column(20000101, None), "date")[0], [10957, NAN])


def test_the_rule_missing_treats_any_other_text_as_missing():
    check({"1.5": 1.5, "unknown": NAN, "50+": NAN, "": NAN, "inf": np.inf}, "missing")


@pytest.mark.parametrize("rule", [None, "range_mean", "decimal_comma", "missing"])
def test_numbers_and_booleans_are_read_under_every_rule(rule):
    np.testing.assert_array_equal(parse_numbers(column(1, None, 3), rule)[0], [1, NAN, 3])
    np.testing.assert_array_equal(parse_numbers(column(1.5, None, NAN), rule)[0], [1.5, NAN, NAN])
    np.testing.assert_array_equal(parse_numbers(column(True, False, None), rule)[0], [1, 0, NAN])


def test_a_rule_is_suggested_if_it_is_unambiguous():
    rules = dict.fromkeys(["50+", "91-92", "< 5"], "range_mean")
    rules |= dict.fromkeys(["1,5", "1.234,5"], "decimal_comma")
    rules |= {"2024-03-01": "date"}
    rules |= {"1,000": "thousands", "10 cm": "unit:cm", "$5": "money", "No": "boolean"}
    rules |= {"1.5 m": "unit:m", "$1.5m": "money"}
    rules |= dict.fromkeys(["unknown", ""])
    proposed = {text: propose_rule(column(text)) for text in rules}
    assert {text: found and found[0] for text, found in proposed.items()} == rules


@pytest.mark.parametrize(
    ("rule", "numbers"),
    [
        (
            "money",
            {"$1,234": 1234, "1.234,50 €": 1234.5, "(5.00)": -5, "USD 5": 5, "-$3": -3, "$-3": -3}
            | {"1.2k": 1200, "$1.2M": 1.2e6, "1 234 zł": 1234, "kr. 12": 12, "1,5 EUR": 1.5}
            | {"£1,234,567.89": 1234567.89, "12.345": 12345, "0.125": 0.125, "5-": -5, "abc": ...}
            | {"5,-": 5, "CHF 5.-": 5, "5.--": 5, "-5.-": -5},
        ),
        (
            "unit:sqft",
            {"1,850 sqft": 1850, "12 SqFt.": 12, "13": 13, "1.850 sqft": 1.85, "-3 sqft": -3}
            | {"~4sqft": 4, "1,5 sqft": 1.5, "3 m": ..., "sqft": ...},
        ),
        ("unit:%", {"3%": 3, "3.5 %": 3.5, "n/a": NAN, "3 kg": ...}),
        ("unit", {"1 kg": 1, "2kg": 2, "3 lb": ...}),
        ("thousands", {"1,234": 1234, "1 234.5": 1234.5, "1'000": 1000, "12": 12, "1,23": ...}),
        ("boolean", {"Yes": 1, "n": 0, "TRUE": 1, "off": 0, "1": 1, "": NAN, "maybe": ...}),
        ("year", {"2020-01-06": 2020, "1969-12-31 23:59": 1969, "x": ...}),
        ("month", {"2020-01-06": 1, "1969-12-31": 12}),
        ("weekday", {"2020-01-06": 0, "1969-12-31": 2}),
    ],
)
def test_rules_read_text_as_people_write_it(rule, numbers):
    check(numbers, rule)


@pytest.mark.parametrize(
    ("cells", "rule"),
    [
        (["$1,234", "$0.50"], "money:."),
        (["1.234 €", "0,50 €"], "money:,"),
        (["$1,234", "$999"], "money:."),
        (["1.234 €", "999 €"], "money:,"),
        (["1.234 €", "1,234 €"], "money"),
        (["1.5 €", "1,5 €"], "money"),
        (["$5", None], "money"),
    ],
)
def test_a_column_shows_the_decimal_mark_of_its_money(cells, rule):
    cells = column(*cells)
    assert resolve_rule(cells, "money") == rule
    np.testing.assert_array_equal(parse_numbers(cells, rule)[0], parse_numbers(cells, "money")[0])


def test_a_column_shows_its_unit():
    assert resolve_rule(column("1 kg", "2 kg", "3 lb"), "unit") == "unit:kg"
    assert resolve_rule(column("1,234", "5"), "unit") == "thousands"
    assert resolve_rule(column(1.5, 2), "unit") == "thousands"
