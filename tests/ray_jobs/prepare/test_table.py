from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.prepare.cell_text import column_text
from ray_jobs.prepare.number_parsing import parse_numbers
from ray_jobs.prepare.table import (
    find_numeric_columns,
    parse_path_pattern,
    read_table,
    require_columns,
)


def spec(**options: object) -> PrepareSpec:
    return PrepareSpec.model_validate(options)


def column(*cells: object) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(cells)])


def write_text(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_csv_and_parquet_are_read_alike_by_path_and_by_uri(tmp_path):
    text = "id,area,label\n007,1.5,1\n008,,0\n"
    csv_table = read_table(write_text(tmp_path / "t.csv", text))
    pq.write_table(
        pa.table({"id": ["007", "008"], "area": [1.5, None], "label": [1, 0]}),
        tmp_path / "t.parquet",
    )
    for table in (csv_table, read_table(f"file://{tmp_path}/t.parquet")):
        assert column_text(table.column("id")).to_pylist() == ["007", "008"]
        assert column_text(table.column("label")).to_pylist() == ["1", "0"]
        np.testing.assert_array_equal(parse_numbers(table.column("area"))[0], [1.5, np.nan])


def test_a_csv_may_have_a_byte_order_mark_tabs_spaces_and_line_breaks_in_quotes(tmp_path):
    table = read_table(write_text(tmp_path / "t.csv", '\ufeffid\t note \n 1 \t"two\nlines"\n'))
    assert table.column_names == ["id", "note"]
    assert column_text(table.column("id")).to_pylist() == ["1"]
    assert column_text(table.column("note")).to_pylist() == ["two\nlines"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "could not be read: it is empty"),
        ("key,label\n", "has no rows"),
        ("key,label\n1,0,3\n", "could not be read: .*Expected 2 columns, got 3"),
        ("key,label,label\n1,0,1\n", "more than one column named 'label'"),
    ],
)
def test_an_invalid_table_raises_an_error(tmp_path, text, message):
    with pytest.raises(JobError, match=message):
        read_table(write_text(tmp_path / "t.csv", text))


def test_a_damaged_parquet_file_and_a_wrong_encoding_raise_an_error(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "t.csv").write_bytes("key,label\nä,1\n".encode("latin-1"))
    for name in ("t.parquet", "t.csv"):
        with pytest.raises(JobError, match=f"{name} could not be read"):
            read_table(str(tmp_path / name))


def test_a_missing_table_raises_an_error_with_the_nearest_file(tmp_path):
    write_text(tmp_path / "houses.csv", "key\n1\n")
    with pytest.raises(JobError, match=r"house\.csv does not exist; did you mean 'houses\.csv'"):
        read_table(str(tmp_path / "house.csv"))
    with pytest.raises(JobError, match="is a folder"):
        read_table(str(tmp_path))
    with pytest.raises(JobError, match=r"prepare\.table is not set"):
        read_table("")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("key_column", "arae"),
        ("label_column", "arae"),
        ("group_column", "arae"),
        ("split_column", "arae"),
        ("numeric_columns", ("arae",)),
        ("exclude_columns", ("arae",)),
    ],
)
def test_a_missing_column_raises_an_error_with_setting_and_nearest_match(setting, value):
    table = pa.table({"key": ["1"], "area": [1.0], "label": [1]})
    message = rf"prepare\.{setting}: the table has no column 'arae'; did you mean 'area'\? \(it has"
    with pytest.raises(JobError, match=message):
        require_columns(table, spec(**{setting: value}))


@pytest.mark.parametrize("pattern", ["photo.jpg", "{}.jpg", "{key.jpg", "key}.jpg"])
def test_a_pattern_without_a_column_raises_an_error(pattern):
    with pytest.raises(JobError, match="must name columns in braces"):
        parse_path_pattern(spec(image_pattern=pattern))


@pytest.mark.parametrize("role", ["key_column", "label_column", "split_column"])
def test_a_column_with_another_role_cannot_be_a_feature(role):
    table = pa.table({"key": ["1"], "label": [1], "a": [2]})
    with pytest.raises(JobError, match=f"names 'a', the {role}"):
        require_columns(table, spec(**{"numeric_columns": ["a"], role: "a"}))


def test_a_column_cannot_have_two_roles():
    table = pa.table({"key": ["1"], "label": [1], "a": [2]})
    with pytest.raises(JobError, match="exclude_columns both name 'a'"):
        require_columns(table, spec(numeric_columns=["a"], exclude_columns=["a"]))
    with pytest.raises(JobError, match="cannot be both"):
        require_columns(table, spec(key_column="a", label_column="a"))


def test_numeric_columns_without_another_role_are_features():
    table = pa.table(
        {
            "id": [1, 2],
            "whole": [1, 2],
            "price": [1.0, 2.0],
            "flag": [True, False],
            "exact": [Decimal("1.5"), None],
            "text": ["1", "2x"],
            "patient": [7, 8],
            "fold": [1, 1],
            "folder": [3, 4],
            "label": [0, 1],
        }
    )
    roles = spec(
        key_column="id",
        group_column="patient",
        split_column="fold",
        exclude_columns=["price"],
        image_pattern="{folder}/{key}.jpg",
    )
    assert find_numeric_columns(table, roles) == ("whole", "flag", "exact")


def test_a_few_words_do_not_make_a_csv_column_non_numeric(tmp_path):
    text = "key,area,town,empty,label\n1,3,x,,0\n2,unknown,4,,1\n3,5,y,,1\n"
    table = read_table(write_text(tmp_path / "t.csv", text))
    assert find_numeric_columns(table, spec()) == ("area",)


def test_having_no_numeric_column_raises_an_error_unless_requested():
    table = pa.table({"key": ["a"], "label": [1]})
    with pytest.raises(JobError, match=r"set it to \[\] to learn from images alone"):
        find_numeric_columns(table, spec())
    assert find_numeric_columns(table, spec(numeric_columns=[])) == ()


def test_a_numeric_column_cannot_have_a_reserved_name_or_be_repeated():
    table = pa.table({"id": ["a"], "image": [1], "a": [1], "y": [1]})
    with pytest.raises(JobError, match="'image' has the name of a reserved column"):
        find_numeric_columns(table, spec(key_column="id", label_column="y"))
    with pytest.raises(JobError, match="names 'a' twice"):
        require_columns(table, spec(numeric_columns=["a", "a"], key_column="id", label_column="y"))


def test_numbers_are_read_in_every_common_spelling():
    cells = ["1", "-2.5", "+3", ".5", "5.", "1e3", "1E-2", " 7 ", "true", "False"]
    values, is_invalid = parse_numbers(column(*cells))
    np.testing.assert_array_equal(values, [1, -2.5, 3, 0.5, 5, 1000, 0.01, 7, 1, 0])
    assert not is_invalid.any()


def test_empty_cells_are_missing_and_other_words_are_invalid():
    cells = ["", None, "NA", "NaN", "n/a", "null", "None", "1,200", "3 m", "0x1F", "1_0", "."]
    values, is_invalid = parse_numbers(column(*cells))
    assert np.isnan(values).all()
    assert is_invalid.tolist() == [False] * 7 + [True] * 5


def test_an_error_quotes_blank_column_names():
    table = pa.table({"": ["0"], "age": [1], "label": [1]})
    with pytest.raises(JobError, match=r"no column 'key' \(it has: '', age, label\)"):
        require_columns(table, spec())
