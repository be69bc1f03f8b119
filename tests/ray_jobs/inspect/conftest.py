"""What several tests of the inspection look at."""

from pathlib import Path

import pytest

from tests.ray_jobs.tiny import write_prepared


@pytest.fixture(scope="package")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "prepared"
    write_prepared(folder, {"train": 203, "validation": 61, "test": 47})
    return folder
