"""Columns that are no features, and numbers written as text.

Each input comes from the public thread in its parameter id.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.ray_jobs.inputs.user_data import UserData, column_of, plain_rows, roles, values

Cell = Callable[[int], Any]


def wrong(reason: str) -> Any:
    return pytest.mark.xfail(strict=True, reason=reason)


NO_FEATURES: list[Any] = [
    pytest.param("Unnamed: 0", lambda i: i, "row number", id="tsfresh#162-index-in-csv"),
    pytest.param("Unnamed: 0", lambda i: i * 7919 % 100_003, "index", id="deepchecks#171-sampled"),
    pytest.param("", lambda i: i, "row number", id="pandas#26446-index-without-name"),
    pytest.param("__index_level_0__", lambda i: i * 7 % 36, "row number", id="milvus#33197"),
    pytest.param("ID", lambda i: f"{842302 + i * 17}.0", "an id", id="dotnet-ml#3826-float-ids"),
    pytest.param("x", lambda i: 3, "always", id="autogluon#932-constant"),
    pytest.param("x", lambda i: ["NA", "N/A", "n/a", "#N/A"][i % 4], "empty", id="OasisLMF#307"),
    pytest.param("x", lambda i: "" if i % 5 == 0 else int(i % 3 == 0), "copy", id="taxi-trip-duration#2"),
    pytest.param("x", lambda i: i * 7 % 36 if i % 3 == 0 else "", "copy", id="ml-project#10-leak"),
    pytest.param("x", lambda i: f"{i * 7919:08x}-aa", "all different", id="koku#4762-uuid"),
    pytest.param(
        "Unnamed: 0.1",
        lambda i: i * 7919 % 100_003,
        "index",
        id="pandas#26446-index-saved-twice",
        marks=wrong("pandas' name of a second index is a feature"),
    ),
    pytest.param(
        "patientid",
        lambda i: 100 + i // 3,
        "an id",
        id="torchxrayvision#2-patient-of-several-rows",
        marks=wrong("an id that several rows share is a feature"),
    ),
]


@pytest.mark.parametrize(("name", "cell", "reason"), NO_FEATURES)
def test_a_column_that_is_no_feature_is_left_out(
    user: UserData, name: str, cell: Cell, reason: str
) -> None:
    column = column_of(user.look(plain_rows(**{name: cell})), name)
    assert column.role == "left_out"
    assert reason in column.reason
    assert column.reason in user.text


@pytest.mark.parametrize("name", ["Unnamed: 0", "ID", "lesion_id"])
def test_a_column_named_explicitly_is_kept(user: UserData, name: str) -> None:
    """dotnet/machinelearning#3826: users name what the inference left out."""
    manifest = user.look(plain_rows(**{name: lambda i: i + 5}), numeric_columns=["size", name])
    assert roles(manifest) == {"key": "key", "size": "number", "weight": "left_out"} | {
        "label": "label",
        name: "number",
    }


def shuffled(i: int) -> int:
    return i * 5 % 36


US = ["10.44", "76.33", "2,923", "1,045,442.22"]
MONEY = ["$1,230.45", "$1.23", "$3.459"]
READ: list[Any] = [
    pytest.param(
        lambda i: f"${1000 + i * 37.5:,.2f}", lambda i: 1000 + i * 37.5, "money", id="pandas#53653"
    ),
    pytest.param(
        lambda i: f"(${i + 0.5})" if i % 2 else f"${i + 0.5}",
        lambda i: -i - 0.5 if i % 2 else i + 0.5,
        "money",
        id="pyjanitor#1485-accounting",
    ),
    pytest.param(lambda i: f"-${i + 3}", lambda i: -i - 3, "money", id="readr#444-minus-first"),
    pytest.param(lambda i: f"$-{i + 3}", lambda i: -i - 3, "money", id="readr#444-minus-second"),
    pytest.param(lambda i: f"{i},5 %", lambda i: i + 0.5, "unit:%", id="readr#449-percent"),
    pytest.param(
        lambda i: f"{29 + i}\u202f000", lambda i: 29_000 + i * 1000, "thousands", id="ofbiz#845"
    ),
    pytest.param(
        lambda i: f"{17 + i}\u00a0796 m3",
        lambda i: 17_796 + i * 1000,
        "unit:m3",
        id="go-evepraisal#19-volume",
    ),
    pytest.param(
        lambda i: f"{65 + i}\u00a0797\u00a0506,72 ISK",
        lambda i: 65_797_506.72 + i * 1_000_000,
        "unit:isk",
        id="go-evepraisal#19-price",
    ),
    pytest.param(
        lambda i: US[i % 4],
        lambda i: float(US[i % 4].replace(",", "")),
        "thousands",
        id="rawgraphs#247-thousands",
    ),
    pytest.param(
        lambda i: f"{i % 9}0-{i % 9}9" if i % 5 else "90+",
        lambda i: i % 9 * 10 + 4.5 if i % 5 else 90,
        "range_mean",
        id="DataHarmonizer#102-age-bins",
    ),
    pytest.param(
        lambda i: MONEY[i % 3],
        lambda i: float(MONEY[i % 3].replace(",", "")[1:]),
        "money",
        id="pandas#53653-three-decimals",
        marks=wrong("'$3.459' is read as 3459 beside '$1,230.45'"),
    ),
    pytest.param(
        lambda i: f"{i % 28 + 1:02}.{i % 12 + 1:02}.2017 17:18",
        lambda i: 0,
        "date",
        id="pandas#26304-day-first",
        marks=wrong("the rule date reads no dates with the day first, although some days exceed 12"),
    ),
]


@pytest.mark.parametrize(("text", "number", "rule"), READ)
def test_text_that_holds_numbers_is_proposed_and_read(
    user: UserData, text: Cell, number: Cell, rule: str
) -> None:
    rows = plain_rows(x=lambda i: text(shuffled(i)), plain=lambda i: number(shuffled(i)))
    manifest = user.look(rows, numeric_columns=["size", "plain"])
    rows_of_text = [{k: v for k, v in row.items() if k != "plain"} for row in rows]
    proposed = column_of(user.look(rows_of_text), "x")
    assert (proposed.role, proposed.proposed, proposed.rule) == ("left_out", "number", rule)
    assert f"{rule} reads 36 of 36 cells" in user.text
    followed = user.look(rows_of_text, columns="auto")
    assert values(followed)["numbers"]["x"] == values(manifest)["numbers"]["plain"]


NOT_READ: list[Any] = [
    pytest.param(lambda i: [">50%", "<=50%"][i % 2], id="datacleaner#6-classes"),
    pytest.param(lambda i: ["18 months", "2 years"][i % 2], id="sdrf#146-two-units"),
    pytest.param(lambda i: f"{i % 9}Y{i % 11}M{i % 5}D", id="sdrf#146-years-months-days"),
    pytest.param(lambda i: f"{i + 1}.2.3.4", id="csv-sql-live#1-addresses"),
    pytest.param(
        lambda i: f"{5 + i % 2}'{i % 12}\"",
        id="nflgame#56-feet-and-inches",
        marks=wrong("5'11\" is proposed as 511 in the unit \""),
    ),
    pytest.param(
        lambda i: f"{i % 9 + 1} 1/3 oz.",
        id="ruby-measurement#1-mixed-fraction",
        marks=wrong("'2 1/3 oz.' is proposed as 21 in the unit '/3 oz'"),
    ),
    pytest.param(
        lambda i: f"0{i % 9 + 1} 02",
        id="DataTables#752-no-groups-of-three",
        marks=wrong("'01 02' is proposed as 102, money"),
    ),
    pytest.param(
        lambda i: [*US, "1,23"][i % 5],
        id="rawgraphs#247-one-decimal-comma",
        marks=wrong("money reads 2,923 as 2923 and 1,23 as 1.23 in one column"),
    ),
]


@pytest.mark.parametrize("cell", NOT_READ)
def test_text_that_no_rule_reads_rightly_is_not_proposed_as_a_number(
    user: UserData, cell: Cell
) -> None:
    column = column_of(user.look(plain_rows(x=lambda i: cell(shuffled(i)))), "x")
    assert column.role == "left_out"
    assert column.proposed != "number"


@pytest.mark.parametrize("mark", ["?", "unknown"], ids=["aikit#78-adult", "isic-2017-ages"])
@pytest.mark.xfail(strict=True, reason="the error names no rule, although `missing` reads the cells")
def test_marks_for_missing_numbers_are_pointed_out(user: UserData, mark: str) -> None:
    rows = plain_rows(age=lambda i: mark if i % 9 == 0 else i % 7 * 5)
    assert values(user.look(rows, number_rules={"age": "missing"}))["numbers"]["age"][2] > 0
    assert "{age: missing}" in user.refusal(rows)
