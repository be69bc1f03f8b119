import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.prepare.cell_text import TEXT
from ray_jobs.prepare.sources.source import ImageRefs, repeat_paths


def test_a_negative_row_takes_an_entry_without_an_image():
    refs = ImageRefs(pa.array(["a", "b"], TEXT), np.array([5, 7]), np.array([1, 2]))
    taken = refs.take([1, -1, 0])
    assert taken.path.to_pylist() == ["b", None, "a"]
    assert (taken.start.tolist(), taken.size.tolist()) == ([7, 0, 5], [2, 0, 1])
    assert taken.has_image.tolist() == [True, False, True]


@pytest.mark.slow
def test_paths_may_exceed_2_gib():
    names = ["a" * 2**20, "b" * 2**20]
    paths = repeat_paths(names, [1100, 1100])
    assert paths.nbytes > 2**31
    assert ImageRefs(paths).take([2199, 0]).path.to_pylist() == names[::-1]
