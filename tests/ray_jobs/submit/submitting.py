"""Runs `python -m ray_jobs.submit`, in this process or as a subprocess."""

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
IGNORED_WARNINGS = [
    # Ray's client passes a deprecated default to aiohttp.
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
    # Ray's client leaves an abandoned connection to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
]


def run(server: JobServer, *arguments: str) -> int:
    """Return the exit status."""
    return submit_job.parse(["--address", server.address, *arguments])() or 0


def program(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Run it in the project's folder; return exit status, stdout and stderr."""
    return run_program(arguments, ROOT, without_ray() | variables)


def without_ray() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


def start(
    arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str]
) -> subprocess.Popen[str]:
    """Start it in a folder; a copy of ray_jobs in the folder takes precedence."""
    # Tests in the background ignore Ctrl-C, which the subprocess would inherit.
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


def run_program(
    arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str]
) -> tuple[int, str, str]:
    """Run it in a folder; return exit status, stdout and stderr."""
    with start(arguments, folder, environment) as process:
        out, err = process.communicate()
    return process.returncode, out, err
