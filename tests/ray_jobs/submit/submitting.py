"""`python -m ray_jobs.submit`, here and as a program of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from ray_jobs.submit import job as submit_job
from tests.ray_jobs.submit.job_server import JobServer

ROOT = Path(__file__).parents[3]
SPEC = "ray_jobs/specs/houses.yaml"
SHARED = ("--run.storage_path", "/shared/runs", "--run.name", "first")
OF_THE_CLIENT = [
    # Ray's own client gives aiohttp no context where it wants the usual one,
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
    # and leaves it to the collector to close a connection that it is told to leave.
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
]


def run(server: JobServer, *arguments: str) -> int:
    return submit_job.command(["--address", server.address, *arguments])()


def program(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of it, in the project's folder."""
    return outcome(arguments, ROOT, without_ray() | variables)


def without_ray() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


def start(
    arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str]
) -> subprocess.Popen[str]:
    """Start it in a folder, whose own ray_jobs it is if there is one."""
    # Whoever runs the tests in the background lets them ignore Ctrl-C, and that is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.submit", *arguments],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def outcome(
    arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str]
) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of it."""
    with start(arguments, folder, environment) as process:
        out, err = process.communicate()
    return process.returncode, out, err
