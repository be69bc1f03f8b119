"""Raw data for `prepare`."""

from pathlib import Path

import pytest

from tests.ray_jobs.raw import Raw


@pytest.fixture
def raw(tmp_path: Path) -> Raw:
    return Raw(tmp_path / "raw").add(range(48))
