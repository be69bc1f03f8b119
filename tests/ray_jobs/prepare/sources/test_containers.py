import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.sources.containers import (
    Index,
    PieceReader,
    find_files,
    in_threads,
    join,
    stack,
    table_of_records,
)
from ray_jobs.prepare.sources.refs import ImageRefs
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.prepare.sources.samples import spec


def index(*chunks: list[str | None]) -> Index:
    keys = pa.chunked_array(chunks, pa.string())
    numbers = np.arange(len(keys), dtype=np.int64)
    return Index(keys, ImageRefs(pa.array([f"f{i}" for i in numbers]), numbers, numbers))


def test_a_join_is_that_of_two_dictionaries_whatever_repeats_or_lacks():
    rng = np.random.default_rng(0)
    for _ in range(50):
        records = [None if k == 0 else str(k) for k in rng.integers(0, 12, rng.integers(1, 15))]
        images = [None if k == 0 else str(k) for k in rng.integers(0, 12, rng.integers(1, 15))]
        cut = int(rng.integers(0, len(images) + 1))
        first: dict[str, int] = {}
        for row, key in enumerate(images):
            if key is not None:
                first.setdefault(key, row)
        expected = [None if key is None else first.get(key) for key in records]
        table = pa.table({"key": pa.array(records, pa.string())})
        if not any(row is not None for row in expected):
            with pytest.raises(JobError, match="no key of the table is the key of an image"):
                join(table, spec(), {"": index(images[:cut], images[cut:])})
            continue
        found, unmatched = join(table, spec(), {"": index(images[:cut], images[cut:])})
        paths = [None if row is None else f"f{row}" for row in expected]
        assert found[""].path.to_pylist() == paths
        assert unmatched == tuple(
            ("", "no_record", f"f{row}:{row} has no key")
            if key is None
            else (key, "duplicate_image", f"f{row}:{row} has the key of f{first[key]}:{first[key]}")
            if first[key] != row
            else (key, "no_record", f"no record has the key of f{row}:{row}")
            for row, key in enumerate(images)
            if key is None or first[key] != row or key not in records
        )


def test_keys_of_numbers_and_of_text_are_the_same_keys():
    table = pa.table({"key": pa.array([2.0, None, 1.0])})
    found, unmatched = join(table, spec(), {"": index(["1", "2"])})
    assert found[""].path.to_pylist() == ["f1", None, "f0"]
    assert unmatched == ()


def test_stacked_tables_keep_what_both_can_be():
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


def test_objects_become_a_table_without_their_lists():
    records = [{"a": 1, "l": [1]}, {"a": 2.5, "m": "x"}, {"m": True, "big": 2**70}, {"m": None}]
    assert table_of_records(records).to_pydict() == {
        "a": [1.0, 2.5, None, None],
        "m": [None, "x", "true", None],
        "big": [None, None, str(2**70), None],
    }


def test_files_are_found_in_order_without_hidden_ones(tmp_path):
    for name in ("b.x", "a/c.x", ".hidden.x", "_log.x", "a.y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")

    def find(location: str) -> list[str]:
        return find_files(location, lambda name: name.endswith(".x"), "x files")[1]

    assert find(str(tmp_path)) == ["a/c.x", "b.x"]
    assert find(f"{tmp_path}/a.y") == ["a.y"]
    assert find(f"{tmp_path}/{{b,a/c}}.x") == ["b.x", "a/c.x"]
    assert find(f"{tmp_path}/**/[bc].x") == ["a/c.x", "b.x"]
    for location, message in (
        ("", "prepare.images is not set: give the x files"),
        (f"{tmp_path}/none", "there is no such file or folder"),
        (f"{tmp_path}/*.z", "there are no x files"),
        (f"{tmp_path}/{{b}}.x", "braces hold a range such as"),
        ("nonsense://x", "nonsense://x cannot be opened"),
    ):
        with pytest.raises(JobError, match=message):
            find(location)


def test_the_first_error_of_threads_is_raised():
    def fail(item: int) -> int:
        if item == 3:
            raise JobError("three")
        return item

    assert in_threads(fail, [1, 2]) == [1, 2]
    with pytest.raises(JobError, match="three"):
        in_threads(fail, range(20))


def test_whole_files_and_pieces_are_read_in_one_go(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    paths = pa.array(["a", None, "a", "none", "a", "a"])
    pieces = ImageRefs(paths, np.array([0, 0, 2, 0, 5, 8]), np.array([2, 0, 3, 1, 5, 9]))
    read = list(PieceReader(Folder(tmp_path)).read(pieces))
    assert [r if isinstance(r, bytes) else r.reason for r in read] == [
        b"01", "missing_image", b"234", "missing_image", b"56789", "unreadable_file"
    ]  # fmt: skip
    whole = list(PieceReader(Folder(tmp_path)).read(ImageRefs(paths.take([0, 1, 0]))))
    assert whole[0] == whole[2] == b"0123456789"
    assert whole[1].reason == "missing_image"
