"""A job server, and an environment that its client may change."""

import os
from collections.abc import Iterator

import pytest

from tests.ray_jobs.submit.job_server import JobServer
from tests.ray_jobs.submit.submitting import ROOT

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The variables that tests set, and what the client sets, end with the test."""
    monkeypatch.chdir(ROOT)
    before = dict(os.environ)
    for name in ADDRESSES:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def server() -> Iterator[JobServer]:
    with JobServer() as started:
        yield started
