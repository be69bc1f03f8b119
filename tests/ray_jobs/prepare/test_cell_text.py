from datetime import datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.cell_text import (
    TEXT,
    apply_text_rule,
    column_text,
    find_text_rule,
    role_text,
)
from tests.ray_jobs.prepare.sources.samples import column, spec


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ((1.0, None, 2.5, float("nan")), ["1", None, "2.5", None]),
        (("1.0", "2.0", None), ["1.0", "2.0", None]),
        (("1.0", "v2.0"), ["1.0", "v2.0"]),
        ((" a ", "", "007", "NA"), ["a", None, "007", "NA"]),
        (("\u00a0a\u00a0b", "e\u0301", "\ufeffx", "\u200b"), ["a b", "é", "x", None]),
        ((np.float32(0.1), np.float32(3)), ["0.1", "3"]),
        ((Decimal("1.50"), Decimal("20.00")), ["1.5", "20"]),
        ((datetime(2020, 1, 2), datetime(2020, 1, 2, 3)), ["2020-01-02", "2020-01-02 03:00:00"]),
        ((10**17, None), ["100000000000000000", None]),
        ((True, None), ["true", None]),
    ],
)
def test_whole_numbers_have_no_point_and_empty_cells_are_null(cells, expected):
    assert column_text(column(*cells)).to_pylist() == expected


@pytest.mark.parametrize(
    ("rule", "spellings"),
    [
        # The cells of one value in CSV, Parquet and Excel files, before and after pandas.
        ("number", {"7": [7, 7.0, "7", "7.0", "07", "+7"], "0.5": [0.5, "0.50", ".5", "5e-1"]}),
        ("number", {"1": [True, "True", "true", 1.0], "0": [False, "-0", 0], "x": ["x"]}),
        ("number", {"12345678901234567890": ["12345678901234567890"], "-3": [-3, "-03.0"]}),
        ("boolean", {"true": [True, "True", "yes", "Y", 1, "1.0", "01"], "false": ["No", 0.0]}),
        ("digits_5", {"01234": [1234, "01234", "1234.0", 1234.0], "A1": ["A1"], "-1": [-1]}),
        ("text", {"01": ["01"], "1.0": ["1.0"], "Red": [" Red\u00a0"], "NaN x": ["NaN x"]}),
    ],
)
def test_a_rule_gives_a_value_one_text_in_every_spelling(rule, spellings):
    for text, cells in spellings.items():
        for cell in cells:
            assert apply_text_rule(column_text(column(cell)), rule).to_pylist() == [text], cell


@pytest.mark.parametrize(
    ("cells", "rule"),
    [
        ((True, None), "boolean"),
        (("True", "FALSE", ""), "boolean"),
        (("yes", "No", "NA"), "boolean"),
        ((1, 2), "number"),
        ((1.0, None), "number"),
        (("1.0", "22", "null"), "number"),
        (("01234", "90210", None), "digits_5"),
        (("01", "1", "7.0"), "number"),
        (("Yes", "1", "false"), "boolean"),
        (("01", "1e5"), "text"),
        (("1", "1A"), "text"),
        (("red", "1"), "text"),
        (("", "NA"), "text"),
    ],
)
def test_the_rule_of_a_column_depends_on_all_of_its_cells(cells, rule):
    assert find_text_rule(column(*cells)) == rule


def test_words_for_missing_are_missing_except_in_keys():
    table = pa.table({"key": ["NA", "null", "", "1"]})
    assert role_text(table, "key", spec()).to_pylist() == [None, None, None, "1"]
    keys = role_text(table, "key", spec(), keep_words=True)
    assert keys.to_pylist() == ["NA", "null", None, "1"]
    table = pa.table({"key": ["1.0", "02"]})
    assert role_text(table, "key", spec(text_rules={"key": "number"})).to_pylist() == ["1", "2"]


def test_columns_in_many_chunks_dictionaries_and_empty_columns_become_one_array():
    cells = column("x", "y", "x")
    for chunked in (cells, cells.dictionary_encode(), pa.chunked_array([*cells.chunks, ["z"]])):
        text = column_text(chunked)
        assert text.type == TEXT
        assert text.to_pylist() == chunked.to_pylist()
    assert column_text(column(1.5, 2.0).dictionary_encode()).to_pylist() == ["1.5", "2"]
    assert column_text(pa.chunked_array([], pa.string())).equals(pa.array([], TEXT))


@pytest.mark.slow
@pytest.mark.parametrize("encode", [False, True])
def test_a_column_of_more_than_2_gib_becomes_one_array(encode):
    words = pa.array(["x" * 2**20] * 300)
    chunks = [words.dictionary_encode() if encode else words] * 7
    text = column_text(pa.chunked_array(chunks))
    assert (text.type, len(text)) == (TEXT, 2100)
    assert text.nbytes > 2**31
    assert text[2099] == text[0]


def test_a_column_of_lists_cannot_be_text():
    with pytest.raises(JobError, match=r"a column of type list<.*cannot be read as text"):
        column_text(column([1], [2]))
