"""A job server, and an environment that its client can change."""

import logging
import os
from collections.abc import Iterator

import pytest

from tests.ray_jobs.submit.job_server import JobServer
from tests.ray_jobs.submit.submitting import ROOT

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restores the variables and the log levels that the test or the client changes."""
    monkeypatch.chdir(ROOT)
    before = dict(os.environ)
    handlers = {handler: handler.level for handler in logging.getLogger("ray").handlers}
    for name in ADDRESSES:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(handlers.get(handler, logging.NOTSET))


@pytest.fixture
def server() -> Iterator[JobServer]:
    with JobServer() as started:
        yield started
