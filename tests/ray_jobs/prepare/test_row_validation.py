import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare import row_validation
from ray_jobs.prepare.cell_text import TEXT, column_text
from ray_jobs.prepare.labels import find_classes
from ray_jobs.prepare.row_validation import CheckedRows, read_rows
from ray_jobs.prepare.sources.source import ImageRefs, Source
from ray_jobs.prepare.table import require_columns
from tests.ray_jobs.prepare.sources.samples import spec


def source_of(table: pa.Table) -> Source:
    """A source whose rows have an image where the column photo, if it exists, is not empty."""
    has_photo = "photo" in table.column_names
    paths = column_text(table["photo"]) if has_photo else pa.array(["x"] * table.num_rows, TEXT)
    return Source(table, {"": ImageRefs(paths)}, {})


def rows_of(
    table: dict,
    numeric: tuple[str, ...] = (),
    categorical: tuple[str, ...] = (),
    **options: object,
) -> CheckedRows:
    arrow, prepare = pa.table(table), spec(**options)
    require_columns(arrow, prepare, categorical)
    classes = find_classes(arrow.column(prepare.label_column), prepare)
    return read_rows(source_of(arrow), prepare, numeric, classes, categorical)


def reasons(rows: CheckedRows) -> dict[int, str]:
    return {row: reason for row, (reason, _) in rows.quarantined.items()}


def test_a_rare_third_label_quarantines_its_rows():
    keys, labels = [str(i) for i in range(200)], ["yes", "no"] * 99 + ["maybe", "n/a"]
    table = {"key": keys, "label": labels}
    strict = {"other_labels": "quarantine", "max_bad_fraction": 0.05}
    rows = rows_of(table, positive_label="yes", **strict)
    assert rows.quarantined == {
        198: ("bad_label", "label is 'maybe', neither 'no' nor 'yes'"),
        199: ("missing_label", "label is n/a"),
    }
    assert rows.labels.tolist() == [1, 0] * 99 + [-1, -1]
    assert rows.good.tolist() == [True] * 198 + [False] * 2


def test_each_bad_cell_quarantines_its_row_with_the_value():
    table = {
        "id": ["a", None, "a", "d", "e", "f", "g", "h", "i"],
        "area": ["1", "1", "1", "one", "inf", "1e39", "NA", "1", "1"],
        "photo": ["p"] * 7 + ["", "p"],
        "label": ["0", "1", "1", "1", "1", "1", "1", "1", "0"],
        "split": ["train"] * 8 + ["extra"],
        "patient": [7, 7, 7, None, 7, 7, 7, 7, 7],
    }
    options = {"key_column": "id", "image_column": "photo", "split_column": "split"}
    assert rows_of(table, ("area",), **options, group_column="patient").quarantined == {
        1: ("missing_key", "row 2 has no id"),
        2: ("duplicate_key", "row 3 has the id of row 1"),
        3: ("missing_group", "patient is empty"),
        4: ("non_finite_number", "area is inf, outside the range of float32"),
        5: ("non_finite_number", "area is 1e39, outside the range of float32"),
        7: ("missing_image", "the row has no image"),
        8: (
            "bad_split",
            "split is 'extra', not one of train, training; validation, val, valid, validate, dev, "
            "eval; test, testing, tst",
        ),
    }
    rows = rows_of(table, ("area",), **options)
    detail = "area is 'one'; --prepare.number_rules '{area: missing}' would treat it as missing"
    assert rows.quarantined[3] == ("non_numeric_text", detail)
    assert np.isnan(rows.numeric_RF[6, 0])
    assert rows.numeric_RF.dtype == np.float32


def test_a_number_rule_is_applied_or_suggested():
    table = {"key": ["a", "b", "c"], "label": [0, 1, 0], "age": ["50", "91-92", "old"]}
    suggestion = "age is '91-92'; --prepare.number_rules '{age: range_mean}' would read it"
    assert rows_of(table, ("age",)).quarantined[1] == ("non_numeric_text", suggestion)
    rows = rows_of(table, ("age",), number_rules={"age": "range_mean"})
    detail = "age is 'old', which the rule range_mean cannot read"
    assert rows.quarantined == {2: ("non_numeric_text", detail)}
    assert rows.numeric_RF[:2, 0].tolist() == [50, 91.5]


def test_one_rule_is_suggested_for_all_cells_that_it_reads(monkeypatch):
    calls = []
    propose = row_validation.propose_rule
    monkeypatch.setattr(
        row_validation, "propose_rule", lambda cells: (calls.append(len(cells)), propose(cells))[1]
    )
    ages = ["50", "91-92", "3 kg"] + ["20-30"] * 200
    table = {"key": range(203), "label": [0, 1, 0, *[1] * 200], "age": ages}
    details = [detail for _, detail in rows_of(table, ("age",)).quarantined.values()]
    assert sum("{age: range_mean}' would read it" in detail for detail in details) == 201
    assert (
        "age is '3 kg'; --prepare.number_rules '{age: missing}' would treat it as missing"
        in details
    )
    assert calls == [202]


def test_rows_for_prediction_need_no_label():
    table = pa.table({"key": ["a", None], "area": [1, 2]})
    require_columns(table, spec(), labelled=False)
    rows = read_rows(source_of(table), spec(), ("area",), None)
    assert rows.labels.tolist() == [-1, -1]
    assert reasons(rows) == {1: "missing_key"}


def test_a_column_of_dates_is_not_numeric():
    import datetime

    table = {"key": ["a", "b"], "label": [0, 1], "day": [datetime.date(2020, 1, 2)] * 2}
    rows = rows_of(table, ("day",), max_bad_fraction=1)
    assert reasons(rows) == {0: "non_numeric_text", 1: "non_numeric_text"}
    nested = {"key": ["a", "b"], "label": [0, 1], "list": [[1], [2]]}
    with pytest.raises(JobError, match="numeric column 'list' holds no numbers"):
        rows_of(nested, ("list",))


def test_columns_of_text_may_exceed_2_gib():
    table = {"key": ["a", "b"], "label": [0, 1], "town": ["x", None], "patient": [1, 2]}
    rows = rows_of(table, categorical=("town",), group_column="patient")
    taken = rows.take(np.array([1]))
    for text in (rows.keys, rows.groups, rows.categories["town"], taken.keys):
        assert text.type == pa.large_string()


@pytest.mark.parametrize(
    ("cell", "detail"),
    [
        pytest.param("-0.5", "w is '-0.5', but", id="hep_ml#51, vowpal_wabbit#4924: negative"),
        pytest.param("0", "w is '0', but", id="h2o-3#5604, scikit-learn#14286: zero"),
        pytest.param("1e-60", "w is '1e-60', but", id="zero as float32"),
        pytest.param("1e39", "w is '1e39', but", id="infinite as float32"),
        pytest.param("inf", "w is 'inf', but", id="infinite"),
        pytest.param("", "w is empty, but", id="empty"),
        pytest.param("NaN", "w is 'NaN', but", id="missing"),
        pytest.param("high", "w is 'high', but a weight is a positive number", id="a word"),
        pytest.param(
            "1,5", "--prepare.number_rules '{w: decimal_comma}' would read it", id="comma"
        ),
    ],
)
def test_a_row_whose_weight_is_not_a_positive_number_is_quarantined(cell, detail):
    table = {"key": ["a", "b", "c"], "label": [0, 1, 0], "w": ["2.5", "1", cell]}
    rows = rows_of(table, weight_column="w")
    assert reasons(rows) == {2: "bad_weight"}
    assert detail in rows.quarantined[2][1]
    assert rows.take(np.array([1, 0])).weights.tolist() == [1, 2.5]
    assert rows_of(table).weights is None


def test_weights_are_read_by_the_rule_of_their_column():
    table = {"key": ["a", "b"], "label": [0, 1], "w": ["1,5", "2"]}
    rows = rows_of(table, weight_column="w", number_rules={"w": "decimal_comma"})
    assert rows.weights.tolist() == [1.5, 2]
    assert not rows.quarantined
    table["w"] = ["1.50 €", "1.125 €"]
    rows = rows_of(table, weight_column="w", number_rules={"w": "money"})
    assert rows.weights.tolist() == [1.5, 1.125]
    whole = {"key": ["a", "b"], "label": [0, 1], "w": [3, None]}
    rows = rows_of(whole, weight_column="w")
    assert rows.weights[0] == 3
    assert rows.quarantined[1][1].startswith("w is empty")
