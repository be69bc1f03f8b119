import pyarrow as pa

from ray_jobs.prepare.sources.record_table import RecordTable, stack


def test_stacked_columns_have_a_common_type():
    parts = [
        {"a": [1, None], "b": [1, 2], "c": [True, None], "only": ["x", "y"]},
        {"a": [0.5], "b": ["two"], "c": [0.5]},
        {"a": pa.nulls(1), "b": pa.nulls(1)},
    ]
    assert stack(pa.table(part) for part in parts).to_pydict() == {
        "a": [1.0, None, 0.5, None],
        "b": ["1", "2", "two", None],
        "c": ["true", None, "0.5", None],
        "only": ["x", "y", None, None],
    }


def test_json_objects_become_a_table_without_lists():
    records = RecordTable()
    for record in (
        {"a": 1, "l": [1]},
        {"a": 2.5, "m": "x"},
        {"m": True, "big": 2**70},
        {"m": None},
    ):
        records.append(record)
    assert records.to_table().to_pydict() == {
        "a": [1.0, 2.5, None, None],
        "m": [None, "x", "true", None],
        "big": [None, None, str(2**70), None],
    }
