"""Describes the environment of a run: package versions, source revision and machine."""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from ray_jobs.config.spec import RunSpec

PACKAGES = ("ray", "tensorflow", "keras", "numpy", "scikit-learn", "pyarrow", "pydantic")


def describe_environment(spec: RunSpec) -> dict[str, Any]:
    """Return the content of `environment.json`, without secrets."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_revision": _git_revision(),
        "seed": spec.run.seed,
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
        },
    }


def _git_revision() -> str | None:
    """Return the commit of this project, with `-dirty` if files differ; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match=-"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
