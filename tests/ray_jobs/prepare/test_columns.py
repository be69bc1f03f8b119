from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.columns import describe, find_columns, proposed_flags
from tests.ray_jobs.prepare.sources.samples import spec

NUM_ROWS = 60
RNG = np.random.default_rng(0)
LABEL = np.arange(NUM_ROWS) % 2


def table_of(**columns: Any) -> pa.Table:
    key = [f"k{i}" for i in range(NUM_ROWS)]
    return pa.table({"key": key, "label": LABEL, **columns})


def roles(table: pa.Table, categorical: tuple[str, ...] = (), **settings: Any) -> dict[str, str]:
    """Return the role of each column, with its rule, or why it is left out."""
    columns = find_columns(table, spec(**settings), categorical, LABEL[: table.num_rows])
    return {c.name: c.reason or f"{c.role} {c.rule}".strip() for c in columns}


def words(*texts: str) -> list[str]:
    return [texts[i % len(texts)] for i in range(NUM_ROWS)]


def shuffled(values: Any) -> np.ndarray:
    return np.random.default_rng(1).permutation(np.asarray(values))


def test_numbers_without_another_role_are_inputs():
    table = pa.table(
        {
            "id": [1, 2, 3],
            "whole": [1, 2, 3],
            "price": [1.0, 2.0, 3.0],
            "flag": [True, False, True],
            "exact": [Decimal("1.5"), None, None],
            "a_word": ["3", "unknown", "5"],
            "words": ["1", "2x", "y"],
            "empty": ["", "", ""],
            "patient": [7, 8, 9],
            "fold": [1, 1, 1],
            "folder": [3, 4, 5],
            "label": [0, 1, 0],
        }
    )
    settings = {
        "key_column": "id",
        "group_column": "patient",
        "split_column": "fold",
        "exclude_columns": ["price"],
        "image_pattern": "{folder}/{key}.jpg",
    }
    columns = find_columns(table, spec(**settings))
    numbers = [column.name for column in columns if column.role == "number"]
    assert numbers == ["whole", "flag", "exact", "a_word"]


# pandas-dev/pandas: to_csv writes the index by default; read_csv then names it Unnamed: 0.
@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("", np.arange(NUM_ROWS), "a row number"),
        ("Unnamed: 0", shuffled(np.arange(NUM_ROWS)), "a row number"),
        ("__index_level_0__", np.arange(NUM_ROWS) * 3 + 7, "the index of a table"),
        ("nr", [str(i + 1) for i in range(NUM_ROWS)], "a row number"),
        ("patient_id", np.arange(NUM_ROWS) * 7 + 1000, "an id, different in each row"),
        ("PatientID", np.arange(NUM_ROWS) * 7 + 1000, "an id, different in each row"),
        ("constant", np.full(NUM_ROWS, 3.5), "always 3.5"),
        ("version", words("v1"), "always 'v1'"),
        ("empty", [None] * NUM_ROWS, "empty"),
        ("blank", words("", "NA", "null"), "empty"),
        ("copy", LABEL * 2.0 + RNG.normal(0, 0.01, NUM_ROWS), "separates the classes on its own"),
        ("only_if_sick", np.where(LABEL == 1, RNG.normal(size=NUM_ROWS), np.nan), "separates"),
        ("late_copy", np.where(np.arange(NUM_ROWS) < 10, np.nan, LABEL), "separates"),
        ("diagnosis", words("benign", "malignant"), "separates the classes on its own, AUC 1.000"),
        ("cured", words("Yes", "No"), "text such as 'Yes', which boolean reads, separates the"),
        (
            "note",
            ["", *(f"seen on day {i}, again" for i in range(1, NUM_ROWS))],
            "text such as 'seen on day 1, again', all different in 59 rows",
        ),
    ],
)
def test_columns_that_are_no_features_are_left_out_unless_they_are_named(name, values, reason):
    table = table_of(**{name: values, "area": RNG.normal(size=NUM_ROWS)})
    found = roles(table)
    assert found[name].startswith(reason)
    assert found["area"] == "number"
    assert roles(table, numeric_columns=[name])[name] == "number"
    assert roles(table, (name,))[name].startswith("category")


def test_a_column_filled_only_in_rows_without_a_label_raises_no_warning():
    labels = np.where(np.arange(NUM_ROWS) < 30, LABEL, -2)
    values = np.where(labels < 0, RNG.normal(size=NUM_ROWS), np.nan)
    columns = find_columns(table_of(later=values), spec(), labels=labels)
    assert columns[2].role == "number"


@pytest.mark.parametrize(
    ("num_rows", "num_positive", "is_found"),
    [(120, 5, True), (24, 12, True), (22, 11, False), (900, 2, False), (60, 0, False)],
)
@pytest.mark.parametrize("kind", ["number", "word"])
def test_a_copy_of_the_label_is_found_unless_chance_may_have_made_it(
    num_rows, num_positive, is_found, kind
):
    labels = shuffled(np.arange(num_rows) < num_positive).astype(int)
    copy = labels + RNG.random(num_rows) / 2 if kind == "number" else np.array(["n", "p"])[labels]
    table = pa.table({"key": range(num_rows), "copy": copy, "x": RNG.normal(size=num_rows)})
    columns = find_columns(table, spec(), labels=labels)
    copy, other = columns[1:]
    assert ("separates the classes on its own" in copy.reason) == is_found
    assert other.role == "number"


def test_words_that_occur_once_do_not_separate_the_classes():
    labels = (np.arange(200) < 3).astype(int)
    town = np.array([f"t{i}" if i < 40 else "capital" for i in range(200)])
    columns = find_columns(
        pa.table({"key": range(200), "town": town}), spec(columns="auto"), (), labels
    )
    assert (columns[1].role, columns[1].reason) == ("category", "")


# Numbers that look like ids or counters, but are features.
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("price", np.arange(NUM_ROWS) * 1000 + RNG.integers(0, 999, NUM_ROWS)),
        ("count", RNG.integers(0, NUM_ROWS, NUM_ROWS)),
        ("humidity", np.round(RNG.random(NUM_ROWS), 3)),
        ("fluid", RNG.normal(size=NUM_ROWS)),
        ("strong", LABEL + RNG.normal(0, 0.6, NUM_ROWS)),
        ("sparse", np.where(RNG.random(NUM_ROWS) < 0.5, np.nan, 1.0)),
    ],
)
def test_features_that_resemble_ids_or_the_label_are_kept(name, values):
    assert roles(table_of(**{name: values}))[name] == "number"


@pytest.mark.parametrize(
    ("cells", "rule", "reason"),
    [
        (words("$1,234", "$99.50", ""), "money", "money reads 40 of 40 cells"),
        (words("1,850 sqft", "920 sqft", "1,020 sqft"), "unit:sqft", "unit:sqft reads 60 of 60"),
        (words("3%", "12.5 %", "7%"), "unit:%", "unit:% reads 60 of 60 cells"),
        (words("Yes", "No", "yes", "No", "No"), "boolean", "boolean reads 60 of 60 cells"),
        (words("1,200", "13,400", "950"), "thousands", "thousands reads 60 of 60 cells"),
        (words("10-20", "20-30", "50+"), "range_mean", "range_mean reads 60 of 60 cells"),
        (words("2020-01-31", "2021/02/03 10:00", "x", *["2020-01-01"] * 17), "date", "57 of 60"),
        (np.arange(NUM_ROWS).astype("datetime64[D]"), "date", "date reads 60 of 60 cells"),
    ],
)
def test_text_that_a_rule_reads_is_proposed_with_the_number_of_its_cells(cells, rule, reason):
    table = table_of(**{"a column": cells, "area": RNG.normal(size=NUM_ROWS)})
    columns = find_columns(table, spec(), labels=LABEL)
    found = next(column for column in columns if column.name == "a column")
    assert (found.role, found.proposed, found.rule) == ("left_out", "number", rule)
    assert reason in found.reason
    quoted = f'"{rule}"' if ":" in rule else rule
    flag = f"""--prepare.number_rules '{{"a column": {quoted}}}'"""
    assert list(describe(columns))[-1] == f"to use them, add {flag}"
    # The flag and `columns=auto` both do what is proposed.
    for settings in ({"number_rules": {"a column": rule}}, {"columns": "auto"}):
        again = find_columns(table, spec(**settings), labels=LABEL)
        used = next(column for column in again if column.name == "a column")
        assert (used.role, used.rule) == ("number", {"money": "money:."}.get(rule, rule))
        assert proposed_flags(again) == ""


@pytest.mark.parametrize(("num_other", "role"), [(500, "number"), (10_000, None)])
def test_the_cells_that_a_rule_reads_are_counted_in_the_whole_column(num_other, role):
    cells = [f"${i}" for i in range(10_000)] + [f"word {i}" for i in range(num_other)]
    table = pa.table({"price": cells, "area": RNG.normal(size=len(cells))})
    found = find_columns(table, spec())[0]
    assert (found.role, found.proposed) == ("left_out", role)
    count = f"money reads 10,000 of {len(cells):,} cells"
    assert (count in found.reason) == (role == "number")


def test_words_with_few_values_are_proposed_as_categories():
    table = table_of(colour=words("red", "blue", "green"), area=RNG.normal(size=NUM_ROWS))
    assert roles(table)["colour"] == "3 words such as 'red'"
    columns = find_columns(table, spec(), labels=LABEL)
    assert proposed_flags(columns) == "--data.categorical colour"
    automatic = find_columns(table, spec(columns="auto"), labels=LABEL)
    assert {c.name: c.role for c in automatic}["colour"] == "category"


def test_having_no_input_raises_an_error_with_a_flag_unless_requested():
    table = table_of(town=words("x", "y", "z"))
    with pytest.raises(JobError, match=r"left out: town\); add --data\.categorical town, or set"):
        find_columns(table, spec(), labels=LABEL)
    assert roles(table, numeric_columns=[])["town"] == "not in numeric_columns"
    assert roles(table, ("town",))["town"] == "category text"
    with pytest.raises(JobError, match=r"set prepare\.numeric_columns to \[\] to learn from image"):
        find_columns(table_of(), spec())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("image", {}),
        ("image_bed", {"image_columns": ["bed"], "image_pattern": "{image}/{key}.jpg"}),
    ],
)
def test_a_numeric_column_cannot_have_a_reserved_name(name, options):
    table = table_of(**{name: RNG.normal(size=NUM_ROWS)})
    with pytest.raises(JobError, match=f"'{name}' has the name of a reserved column"):
        find_columns(table, spec(**options))


def test_a_weight_is_never_an_input_and_its_name_is_reserved_only_with_a_weight_column():
    table = table_of(area=RNG.normal(size=NUM_ROWS), weight=RNG.random(NUM_ROWS))
    assert roles(table)["weight"] == "number"
    assert roles(table, weight_column="weight")["weight"] == "weight"
    with pytest.raises(JobError, match="'weight' has the name of a reserved column"):
        find_columns(table, spec(weight_column="area"))
