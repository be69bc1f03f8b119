"""Prepared data of a few rows."""

from pathlib import Path

import pytest

from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.feeds import COUNTS, SIZE
from tests.ray_jobs.tiny import write_prepared


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared data")
    write_prepared(path, COUNTS, size=SIZE)
    return path


@pytest.fixture(scope="session")
def manifest(folder: Path) -> Manifest:
    return read_manifest(Folder(folder))
