"""How many rows training takes from the datasets of Ray Data; see reading.py."""

import pytest

from ray_jobs.train.job import fit
from tests.ray_jobs.train.reading import recorded_reading, rows_read
from tests.ray_jobs.train.test_train import SIZES, prepared_in, spec_in


@pytest.mark.slow
def test_rows_in_the_cache_are_not_read_again(ray_local, tmp_path):
    prepared_in(tmp_path)
    with recorded_reading():
        fit(spec_in(tmp_path, data__cache="object_store", train__num_workers=1))
    read = rows_read(tmp_path / "runs")
    assert read.pop("in_place") == 0
    for split, num_rows in read.items():
        assert SIZES[split] <= num_rows < 2 * SIZES[split]
