import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.cell_text import TEXT
from ray_jobs.prepare.sources.key_join import ImageIndex, join_images
from ray_jobs.prepare.sources.source import ImageRefs
from tests.ray_jobs.prepare.sources.samples import spec


def index(keys: list[str | None]) -> ImageIndex:
    rows = np.arange(len(keys), dtype=np.int64)
    paths = pa.array([f"f{i}" for i in rows], TEXT)
    return ImageIndex(pa.array(keys, TEXT), ImageRefs(paths, rows, rows))


def test_a_join_equals_a_lookup_in_a_dictionary():
    rng = np.random.default_rng(0)
    for _ in range(50):
        records = [None if k == 0 else str(k) for k in rng.integers(0, 12, rng.integers(1, 15))]
        images = [None if k == 0 else str(k) for k in rng.integers(0, 12, rng.integers(1, 15))]
        first: dict[str, int] = {}
        for row, key in enumerate(images):
            if key is not None:
                first.setdefault(key, row)
        expected = [None if key is None else first.get(key) for key in records]
        table = pa.table({"key": pa.array(records, pa.string())})
        if not any(row is not None for row in expected):
            with pytest.raises(JobError, match="no key of the table is the key of an image"):
                join_images(table, spec(), {"": index(images)})
            continue
        joined, unmatched = join_images(table, spec(), {"": index(images)})
        paths = [None if row is None else f"f{row}" for row in expected]
        assert joined[""].path.to_pylist() == paths
        assert unmatched == tuple(
            ("", "no_record", f"f{row}:{row} has no key")
            if key is None
            else (key, "duplicate_image", f"f{row}:{row} has the key of f{first[key]}:{first[key]}")
            if first[key] != row
            else (key, "no_record", f"no record has the key of f{row}:{row}")
            for row, key in enumerate(images)
            if key is None or first[key] != row or key not in records
        )


def test_numeric_keys_match_keys_of_text_and_others_are_shown_in_an_error():
    table = pa.table({"key": pa.array([2.0, None, 1.0])})
    joined, unmatched = join_images(table, spec(), {"": index(["1", "2"])})
    assert joined[""].path.to_pylist() == ["f1", None, "f0"]
    assert unmatched == ()
    joined, _ = join_images(table, spec(), {"": index(["001", "002.0"])})
    assert joined[""].path.to_pylist() == ["f1", None, "f0"]
    message = "the table has '2', '1', …, the images have 'a1', 'a2', …; make the keys equal"
    with pytest.raises(JobError, match=message):
        join_images(table, spec(), {"": index(["a1", "a2"])})
