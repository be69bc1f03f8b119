import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.cell_text import column_text
from ray_jobs.prepare.number_parsing import parse_numbers
from ray_jobs.prepare.table import (
    parse_path_pattern,
    require_columns,
)
from ray_jobs.prepare.table_files import open_table
from tests.ray_jobs.prepare.sources.samples import spec

ROLES = pa.table({"key": ["1"], "label": [1], "a": [2], "town": ["x"], "image": [3], "fold": [1]})


def test_csv_and_parquet_are_read_alike_by_path_and_by_uri(tmp_path):
    (tmp_path / "t.csv").write_text("id,area,label\n007,1.5,1\n008,,0\n")
    rows = {"id": ["007", "008"], "area": [1.5, None], "label": [1, 0]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    for location in (f"{tmp_path}/t.csv", f"file://{tmp_path}/t.parquet"):
        table = open_table(location).table
        assert column_text(table.column("id")).to_pylist() == ["007", "008"]
        assert column_text(table.column("label")).to_pylist() == ["1", "0"]
        np.testing.assert_array_equal(parse_numbers(table.column("area"))[0], [1.5, np.nan])


def test_a_csv_may_have_a_byte_order_mark_tabs_spaces_and_line_breaks_in_quotes(tmp_path):
    (tmp_path / "t.csv").write_text('\ufeffid\t note \n 1 \t"two\nlines"\n')
    table = open_table(str(tmp_path / "t.csv")).table
    assert table.column_names == ["id", "note"]
    assert column_text(table.column("id")).to_pylist() == ["1"]
    assert column_text(table.column("note")).to_pylist() == ["two\nlines"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "could not be read: it is empty"),
        (b"key,label\na,0,3\n", "line 2 has 3 cells, but the header has 2 names: 'a,0,3'"),
        (b"key,label,label\n1,0,1\n", "more than one column named 'label'"),
        (b"key,label\n\xc3\xa4\xe4,1\n", "line 2, character 2: invalid in utf-8"),
        (b"PAR1 and no more", r"table\.csv could not be read"),
    ],
)
def test_an_invalid_table_raises_an_error(tmp_path, content, message):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(JobError, match=message):
        open_table(str(tmp_path / "table.csv"))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{}/house.csv", r"house\.csv does not exist; did you mean 'houses\.csv'"),
        ("", r"prepare\.table is not set"),
    ],
)
def test_a_missing_table_raises_an_error_with_the_nearest_file(tmp_path, location, message):
    (tmp_path / "houses.csv").touch()
    with pytest.raises(JobError, match=message):
        open_table(location.format(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        *({f"{role}_column": "arae"} for role in ("key", "label", "group", "split", "fold")),
        {"numeric_columns": ["arae"]},
        {"exclude_columns": ["arae"]},
    ],
)
def test_a_missing_column_raises_an_error_with_setting_and_nearest_match(options):
    table = pa.table({"key": ["1"], "area": [1.0], "label": [1], "": [0]})
    (setting,) = options
    message = rf"prepare\.{setting}: the table has no column 'arae'; did you mean 'area'\? "
    with pytest.raises(JobError, match=rf"{message}\(it has: key, area, label, ''\)"):
        require_columns(table, spec(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numeric_columns": ["a"], "key_column": "a"}, "names 'a', the key_column"),
        ({"numeric_columns": ["a"], "exclude_columns": ["a"]}, "exclude_columns both name 'a'"),
        ({"numeric_columns": ["a", "a"]}, "names 'a' twice"),
        ({"numeric_columns": ["image"]}, "names 'image', which is a reserved column of the shards"),
        ({"key_column": "a", "label_column": "a"}, "cannot be both"),
        ({"numeric_columns": ["a"], "fold_column": "a"}, "names 'a', the fold_column"),
        ({"numeric_columns": ["fold"], "fold_column": "a"}, "'fold', which is a reserved column"),
        ({"split_column": "a", "split_keys": {"test": "t.txt"}}, "set only one of them"),
        ({"image_columns": ["key", "key"]}, "holds an empty or repeated name"),
        ({"image_columns": ["a"], "image_column": "key"}, "set only one of them"),
        ({"exclude_columns": ["town"]}, "exclude_columns both name 'town'"),
        ({"numeric_columns": ["town"]}, "both name 'town'; remove it from one of them"),
        ({"label_column": "town"}, r"data\.categorical names 'town', the label_column"),
        ({"categorical": ["town", "town"]}, r"data\.categorical names 'town' twice"),
        ({"categorical": ["twon"]}, r"data\.categorical: the table has no column 'twon'; did you"),
    ],
)
def test_a_column_with_two_roles_or_a_reserved_name_raises_an_error(options, message):
    options = {"categorical": ["town"], **options}
    categorical = options.pop("categorical")
    with pytest.raises(JobError, match=message):
        require_columns(ROLES, spec(**options), categorical)


@pytest.mark.parametrize("pattern", ["photo.jpg", "{}.jpg", "{key.jpg", "key}.jpg"])
def test_a_pattern_without_a_column_raises_an_error(pattern):
    with pytest.raises(JobError, match="must name columns in braces"):
        parse_path_pattern(spec(image_pattern=pattern))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_column": "aera"}, "prepare.weight_column: .*no column 'aera'; did you mean"),
        ({"weight_column": "label"}, "prepare.weight_column names 'label', the label_column"),
        (
            {"weight_column": "area", "numeric_columns": ["area"]},
            "numeric_columns names 'area', the weight_column; leave it out",
        ),
        (
            {"weight_column": "area", "numeric_columns": ["weight"]},
            "'weight', which is a reserved column",
        ),
    ],
)
def test_a_weight_column_has_no_other_role(options, message):
    table = pa.table({name: [1, 0] for name in ("key", "area", "weight", "label")})
    with pytest.raises(JobError, match=message):
        require_columns(table, spec(**options))
