"""Shared by the tests of users' inputs."""

from pathlib import Path

import pytest

from tests.ray_jobs.inputs.user_data import UserData


@pytest.fixture
def user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> UserData:
    """A user's folder with the images of the plain rows, and a wide terminal."""
    monkeypatch.setenv("COLUMNS", "400")
    data = UserData(tmp_path, capsys)
    data.add_images()
    return data
