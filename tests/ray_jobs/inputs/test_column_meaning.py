"""Columns that are no features, and numbers written as text; the ids of the parameters are the
public threads they come from."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.ray_jobs.inputs.user_data import UserData, cases, column_of, plain_rows, values

Cell = Callable[[int], Any]
NULLS = ["NA", "N/A", "n/a", "#N/A"]

NO_FEATURES: dict[str, tuple[str, Cell, str]] = {
    "tsfresh#162-index": ("Unnamed: 0", lambda i: i, "row number"),
    "deepchecks#171-sampled-index": ("Unnamed: 0", lambda i: i * 7919 % 100_003, "index"),
    "invest#146-index-without-name": ("", lambda i: i, "row number"),
    "milvus#33197-pandas-index": ("__index_level_0__", lambda i: i * 7 % 36, "row number"),
    "machinelearning#3826-float-ids": ("ID", lambda i: f"{842302 + i * 17}.0", "an id"),
    "autogluon#932-constant": ("x", lambda i: 3, "always"),
    "OasisLMF#307-nulls": ("x", lambda i: NULLS[i % 4], "empty"),
    "taxi-trip-duration#2-copy-with-gaps": ("x", lambda i: i % 3 == 0 if i % 5 else "", "copy"),
    "ml-project#10-leak": ("x", lambda i: "" if i % 3 else i * 7 % 36, "copy"),
    "koku#4762-uuid": ("x", lambda i: f"{i * 7919:08x}-aa", "all different"),
    "pandas#26446-index-saved-twice": ("Unnamed: 0.1", lambda i: i * 7919 % 100_003, "index"),
    "torchxrayvision#2-shared-id": ("patientid", lambda i: 100 + i // 3, "an id"),
}


@pytest.mark.parametrize(("name", "cell", "why"), cases(NO_FEATURES))
def test_a_column_that_is_no_feature_is_left_out(
    user: UserData, name: str, cell: Any, why: str
) -> None:
    rows = plain_rows(**{name: cell})
    column = column_of(user.look(rows), name)
    assert (column.role, why in column.reason) == ("left_out", True)
    assert column.reason in user.text
    if name not in ("", "x"):  # kept if named: machinelearning#3826
        assert column_of(user.look(rows, numeric_columns=[name]), name).role == "number"


def mixed(i: int) -> int:
    """The row numbers in an order that the label does not follow."""
    return i * 5 % 36


US = ["10.44", "76.33", "2,923", "1,045,442.22"]
PRICES = [("$1,230.45", 1230.45), ("$1.23", 1.23), ("$3.459", 3.459)]
AGES = [*((f"{i}0-{i}9", i * 10 + 4.5) for i in range(9)), ("90+", 90)]
READ: dict[str, tuple[Cell, Cell, str]] = {
    "pandas#53653": (lambda i: f"${1000 + i * 37.5:,.2f}", lambda i: 1000 + i * 37.5, "money"),
    "pyjanitor#1485-accounting": (lambda i: f"(${i}.5)", lambda i: -i - 0.5, "money"),
    "readr#444-minus-first": (lambda i: f"-${i + 3}", lambda i: -i - 3, "money"),
    "readr#444-minus-second": (lambda i: f"$-{i + 3}", lambda i: -i - 3, "money"),
    "readr#449": (lambda i: f"{i},5 %", lambda i: i + 0.5, "unit:%"),
    "ofbiz#845": (lambda i: f"{29 + i}\u202f000", lambda i: 29_000 + i * 1000, "thousands"),
    "go-evepraisal#19": (lambda i: f"{17 + i}\u00a0796 m3", lambda i: 17_796 + i * 1000, "unit:m3"),
    "rawgraphs#247": (lambda i: US[i % 4], lambda i: US[i % 4].replace(",", ""), "thousands"),
    "DataHarmonizer#102": (lambda i: AGES[i % 10][0], lambda i: AGES[i % 10][1], "range_mean"),
    "money-rails#268-three-decimals": (
        lambda i: PRICES[i // 5 % 3][0],
        lambda i: PRICES[i // 5 % 3][1],
        "money",
    ),
    "pandas#26304-day-first": (lambda i: f"{i % 28 + 1}.01.2017", lambda i: 17167 + i % 28, "date"),
}


@pytest.mark.parametrize(("text", "number", "rule"), cases(READ))
def test_text_that_holds_numbers_is_proposed_and_read(
    user: UserData, text: Cell, number: Cell, rule: str
) -> None:
    plain = user.look(plain_rows(x=lambda i: number(mixed(i))), numeric_columns=["x"])
    followed = user.look(plain_rows(x=lambda i: text(mixed(i))), columns="auto")
    column = column_of(followed, "x")
    # The decimal mark and the order of dates are added.
    assert (column.role, column.rule.partition(":")[0]) == ("number", rule.partition(":")[0])
    assert f"{rule} reads 36 of 36 cells" in column.reason
    assert values(followed)["numbers"]["x"] == values(plain)["numbers"]["x"]


NOT_READ: dict[str, tuple[Cell]] = {
    "datacleaner#6-classes": (lambda i: [">50%", "<=50%"][i % 2],),
    "sdrf#146-two-units": (lambda i: ["18 months", "2 years"][i % 2],),
    "csv-sql-live#1-addresses": (lambda i: f"{i + 1}.2.3.4",),
    "nflgame#56-feet-and-inches": (lambda i: f"{5 + i % 2}'{i % 12}\"",),
    "ruby-measurement#1-fraction": (lambda i: f"{i % 9 + 1} 1/3 oz.",),
    "DataTables#752-no-thousands": (lambda i: f"0{i % 9 + 1} 02",),
    "rawgraphs#247-one-decimal-comma": (lambda i: [*US, "1,23"][i % 5],),
}


@pytest.mark.parametrize("cell", cases(NOT_READ))
def test_text_that_no_rule_reads_rightly_is_no_number(user: UserData, cell: Cell) -> None:
    column = column_of(user.look(plain_rows(x=lambda i: cell(mixed(i)))), "x")
    assert (column.role, column.proposed == "number") == ("left_out", False)


@pytest.mark.parametrize("mark", cases({"aikit#78-adult": ("?",), "isic-2017-ages": ("unknown",)}))
def test_marks_for_missing_numbers_are_pointed_out(user: UserData, mark: str) -> None:
    rows = plain_rows(age=lambda i: i % 7 * 5 if i % 9 else mark)
    assert values(user.look(rows, number_rules={"age": "missing"}))["numbers"]["age"][2] > 0
    assert "{age: missing}" in user.refusal(rows)
