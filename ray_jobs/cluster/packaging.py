"""Packages a job: its working directory without excluded files, and its runtime environment.

Input: a folder, optionally with a runtime_env.yaml. Output: Ray's `runtime_env`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_jobs.cluster import compat_ray
from ray_jobs.config.command_line import read_yaml
from ray_jobs.config.errors import JobError, UsageError

RUNTIME_ENV = "runtime_env.yaml"
MAX_UPLOAD_BYTES = 100 * 1024**2
"""Maximum size of a request to Ray's dashboard."""

_NUM_LISTED = 4


def resolve_working_dir(given: str | None) -> Path:
    """Return the folder to upload with a job: the given one, else the project's.

    Raises:
        UsageError: If it is not a folder, or ray_jobs is not part of a project.
    """
    if given is not None:
        folder = Path(given).expanduser().resolve()
        if not folder.is_dir():
            raise UsageError(
                f"working_dir={given!r} is not a folder; set it to the folder to upload with the "
                "job"
            )
        return folder
    project = Path(__file__).resolve().parents[2]
    if not (project / RUNTIME_ENV).exists():
        raise UsageError(
            f"ray_jobs is installed in {project}, which is not a project, since it has no "
            f"{RUNTIME_ENV}; set --working_dir to the folder to upload with the job"
        )
    return project


def runtime_env(folder: Path, env: Sequence[str]) -> dict[str, Any]:
    """Return the runtime environment of a job: the folder and its runtime_env.yaml.

    Args:
        folder: Working directory of the job.
        env: Names of environment variables to pass on to the job; no others are passed on.

    Raises:
        UsageError: If a variable is not set, or the file cannot be read.
    """
    if missing := [name for name in env if name not in os.environ]:
        raise UsageError(
            f"env={','.join(missing)} is not set in this environment; export it, or remove it "
            "from env"
        )
    file = folder / RUNTIME_ENV
    tree = read_yaml(str(file)) if file.exists() else {}
    variables = {**(tree.get("env_vars") or {}), **{name: os.environ[name] for name in env}}
    return {**tree, "working_dir": str(folder), "env_vars": variables}


def require_uploadable(environment: dict[str, Any], spec: str | None = None) -> None:
    """Check a job's working directory before it is uploaded.

    Args:
        environment: As returned by `runtime_env`.
        spec: Path in the working directory of the specification that the job reads.

    Raises:
        JobError: If the files exceed Ray's limit or do not include the specification.
    """
    folder = environment["working_dir"]
    sizes = _upload_sizes(Path(folder), environment.get("excludes") or ())
    if spec is not None and spec not in sizes:
        raise JobError(
            f"{folder}/{spec} is not uploaded with the job, because {RUNTIME_ENV} or .gitignore "
            "excludes it; move it or change the exclusion"
        )
    if (total := sum(sizes.values())) <= MAX_UPLOAD_BYTES:
        return
    entries: dict[str, int] = {}
    for name, size in sizes.items():
        top, slash, _ = name.partition("/")
        entries[top + slash] = entries.get(top + slash, 0) + size
    largest = sorted(entries.items(), key=lambda entry: -entry[1])[:_NUM_LISTED]
    listed = ", ".join(f"{name} ({_megabytes(size)})" for name, size in largest)
    raise JobError(
        f"{folder} has {_megabytes(total)} to upload, and Ray accepts at most "
        f"{_megabytes(MAX_UPLOAD_BYTES)}; exclude files that the job does not need, with "
        f"`excludes` in {RUNTIME_ENV} or with .gitignore. The largest are {listed}"
    )


def _upload_sizes(folder: Path, excludes: Sequence[str]) -> dict[str, int]:
    """Return the size in bytes of each file that Ray uploads, by its path in the folder."""
    files = compat_ray.packaged_files(folder, excludes)
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
