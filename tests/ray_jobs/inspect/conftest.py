"""What several tests of the inspection look at."""

from pathlib import Path

import pytest

from ray_jobs.inspect.report_schema import Report
from tests.ray_jobs.inspect.samples import look
from tests.ray_jobs.tiny import write_prepared


@pytest.fixture(scope="package")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "prepared"
    write_prepared(folder, {"train": 203, "validation": 61, "test": 47})
    return folder


@pytest.fixture(scope="package")
def harmless_report(harmless: Path) -> Report:
    """The report on the harmless data, in the data's own folder."""
    return look(harmless)
