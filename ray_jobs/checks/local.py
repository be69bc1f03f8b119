"""Checks the working folder and the weights without a cluster."""

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from mm_model.backbones import LITE0_PACKAGE
from ray_jobs.checks.finding import Finding, from_message, ok, skipped
from ray_jobs.cluster.packaging import require_uploadable, resolve_working_dir, runtime_env
from ray_jobs.config.errors import JobError, UsageError
from ray_jobs.storage.folder import split_file

WEIGHTS_REMEDY = "set it to a path that exists on every node, to a URI, or to none"
HUB_REMEDY = 'run `pip install "multimodal-ray[hub]"` on every node, or choose another kind'
_IMAGENET = "https://storage.googleapis.com/tensorflow/keras-applications/"
_TIMEOUT_S = 5.0


def working_directory(given: str | None) -> Iterator[Finding]:
    """Check that Ray accepts the folder that is uploaded with a job."""
    code = "working_folder"
    try:
        folder = resolve_working_dir(given)
        require_uploadable(runtime_env(folder, ()))
    except UsageError as failure:
        yield skipped(code, str(failure))
    except JobError as failure:
        yield from_message(code, str(failure))
    else:
        yield ok(code, f"{folder} is small enough to upload with a job")


def hub_problem() -> str:
    """Return why this node cannot build the backbones of KerasHub; empty if it can."""
    missing = [name for name in ("keras_hub", "safetensors", "tokenizers") if not find_spec(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


def weights_problem(weights: str, kind: str) -> str:
    """Return why this node cannot read the weights of a branch; empty if it can.

    Args:
        weights: `model.image.weights` or `model.text.weights`; only located, not read.
        kind: Kind of the branch.
    """
    if weights.startswith("preset:"):
        return ""
    if weights == "imagenet":
        problem = "" if _is_downloaded(kind) else _url_problem(_IMAGENET)
        return problem and f"{_IMAGENET}: {problem}"
    if weights == "package":
        return "" if find_spec(LITE0_PACKAGE) else "the extra `weights` is not installed"
    if weights.startswith(("http://", "https://")):
        return _url_problem(weights, must_exist=True)
    if "://" not in weights:
        return "" if Path(weights).expanduser().exists() else "there is no such file"
    try:
        folder, name = split_file(weights)
        return "" if folder.exists(name) else "there is no such object"
    except (OSError, ValueError) as failure:
        return str(failure)


def _is_downloaded(kind: str) -> bool:
    """Whether Keras has cached the weights, under one of its several naming schemes."""
    models = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "models"
    wanted = kind.replace("_", "")
    return any(wanted in re.sub("[^a-z0-9]", "", file.name) for file in models.glob("*no*top*.h5"))


def _url_problem(url: str, *, must_exist: bool = False) -> str:
    # A GET request, since a signed URL may be valid for GET only; the body is not read.
    try:
        with urlopen(Request(url, headers={"Range": "bytes=0-0"}), timeout=_TIMEOUT_S):
            return ""
    except HTTPError as answer:
        return f"the server answers {answer.code}" if must_exist else ""
    except OSError as failure:
        return f"not reachable ({getattr(failure, 'reason', failure)})"
