"""What can be looked at without a cluster."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from ray_jobs.checks.finding import Finding, error, ok, skipped
from ray_jobs.config.errors import JobError, UsageError
from ray_jobs.storage.folder import split_file

WEIGHTS_REMEDY = (
    "set model.image.weights to a file that every node has or to a URI that it reaches, or to none"
)
_IMAGENET = "https://storage.googleapis.com/tensorflow/keras-applications/"
_ANSWERS_S = 5.0


def working_directory(given: str | None) -> Iterator[Finding]:
    """Check that the folder which goes with submitted jobs is one that Ray takes."""
    from ray_jobs.cluster.packaging import folder_to_send, require_sendable, runtime_env

    try:
        folder = folder_to_send(given)
    except UsageError as failure:
        yield skipped("working folder", str(failure))
        return
    try:
        require_sendable(runtime_env(folder, ()))
    except JobError as failure:
        text, _, remedy = str(failure).partition("; ")
        yield error("working folder", text, remedy)
    else:
        yield ok("working folder", f"{folder} is small enough to be sent with a job")


def weights_problem(weights: str, kind: str) -> str:
    """Return what keeps this node from the weights of an image branch, or nothing.

    Args:
        weights: as `model.image.weights`; they are looked for, and not read.
        kind: of the branch.
    """
    if weights == "imagenet":
        problem = "" if _keras_has(kind) else _unreachable(_IMAGENET)
        return problem and f"of {_IMAGENET}, {problem}"
    if weights.startswith(("http://", "https://")):
        return _unreachable(weights, must_exist=True)
    if "://" not in weights:
        return "" if Path(weights).expanduser().is_file() else "there is no such file"
    try:
        folder, name = split_file(weights)
        return "" if folder.exists(name) else "there is no such object"
    except (OSError, ValueError) as failure:
        return str(failure)


def _keras_has(kind: str) -> bool:
    """Whether Keras downloaded the weights before; it names files by kind, in several ways."""
    home = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "models"
    wanted = kind.replace("_", "")
    return any(wanted in re.sub("[^a-z0-9]", "", file.name) for file in home.glob("*no*top*.h5"))


def _unreachable(url: str, *, must_exist: bool = False) -> str:
    # As what fetches it: an address may be signed for GET alone. Nothing of it is read.
    try:
        with urlopen(Request(url, headers={"Range": "bytes=0-0"}), timeout=_ANSWERS_S):
            return ""
    except HTTPError as answer:
        return f"it answers {answer.code}" if must_exist else ""
    except (URLError, OSError) as failure:
        return f"it cannot be reached ({getattr(failure, 'reason', failure)})"
