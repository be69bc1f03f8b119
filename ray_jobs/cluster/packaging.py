"""What goes with a job: a folder less what is left out, and the environment that is named.

Enters: a folder, perhaps with a runtime_env.yaml.  Leaves: Ray's runtime environment.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_jobs.config.command_line import read_yaml
from ray_jobs.config.errors import JobError, UsageError

RUNTIME_ENV = "runtime_env.yaml"
MOST_BYTES = 100 * 1024**2
"""Ray's dashboard takes no larger request."""

_NAMED = 4


def folder_to_send(given: str | None) -> Path:
    """Return the folder that goes with a job: the given one, else the project's.

    Raises:
        UsageError: if it is none, or ray_jobs lies in no project.
    """
    if given is not None:
        folder = Path(given).expanduser().resolve()
        if not folder.is_dir():
            raise UsageError(f"working_dir={given!r} is no folder")
        return folder
    project = Path(__file__).resolve().parents[2]
    if not (project / RUNTIME_ENV).exists():
        raise UsageError(
            f"ray_jobs lies in {project}, which holds no {RUNTIME_ENV} and is no project; say by "
            "--working_dir which folder goes with the job"
        )
    return project


def runtime_env(folder: Path, env: Sequence[str]) -> dict[str, Any]:
    """Return the environment of a job: the folder, and what its runtime_env.yaml says.

    Args:
        folder: that goes with the job.
        env: names of variables that the job has as they are here; no others go with it.

    Raises:
        UsageError: if one of them is not set, or the file cannot be read.
    """
    if missing := [name for name in env if name not in os.environ]:
        raise UsageError(f"env: {', '.join(missing)} not set here; export it, or leave it out")
    file = folder / RUNTIME_ENV
    tree = read_yaml(str(file)) if file.exists() else {}
    variables = {**(tree.get("env_vars") or {}), **{name: os.environ[name] for name in env}}
    return {**tree, "working_dir": str(folder), "env_vars": variables}


def require_sendable(environment: dict[str, Any], spec: str | None = None) -> None:
    """Check what goes with a job before it goes.

    Args:
        environment: as `runtime_env` returns it.
        spec: name in its folder of the specification that the job is to read there.

    Raises:
        JobError: if Ray would not take that much, naming the largest entries; or if the
            specification is left out.
    """
    sent = _sent_bytes(Path(environment["working_dir"]), environment.get("excludes") or ())
    folder = environment["working_dir"]
    if spec is not None and spec not in sent:
        raise JobError(
            f"{folder}/{spec} does not go with the job: {RUNTIME_ENV} or .gitignore leave it out"
        )
    if (total := sum(sent.values())) <= MOST_BYTES:
        return
    entries: dict[str, int] = {}
    for name, size in sent.items():
        top, slash, _ = name.partition("/")
        entries[top + slash] = entries.get(top + slash, 0) + size
    largest = sorted(entries.items(), key=lambda entry: -entry[1])[:_NAMED]
    named = ", ".join(f"{name} ({_mb(size)})" for name, size in largest)
    raise JobError(
        f"{folder} holds {_mb(total)} to send, and Ray takes {_mb(MOST_BYTES)}; leave out what the "
        f"job does not need, by `excludes` in {RUNTIME_ENV} or by .gitignore. The largest are "
        f"{named}"
    )


def _sent_bytes(folder: Path, excludes: Sequence[str]) -> dict[str, int]:
    """Return the size of each file that Ray sends, by its name in the folder."""
    # Ray itself walks the folder: what is left out is for it to say.
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    sent: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sent[path.relative_to(folder).as_posix()] = path.stat().st_size

    every = [*get_runtime_env_default_excludes(), *excludes]
    # Ray's own logger would tell of each .gitignore.
    quiet = logging.getLogger(__name__)
    packaging._dir_travel(folder, [packaging._get_excludes(folder, every)], note, True, quiet)
    return sent


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
