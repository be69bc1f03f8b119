"""Prepared data for searches."""

from pathlib import Path

import pytest

from tests.ray_jobs.tune.searches import prepare_in


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared data; each search needs a name of its own in it."""
    folder = tmp_path_factory.mktemp("search")
    prepare_in(folder)
    return folder
