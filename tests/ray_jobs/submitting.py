"""`python -m ray_jobs.submit` as a program of its own."""

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


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
