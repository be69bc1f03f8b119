"""Connects to the job server of a cluster and turns its errors into one-line messages.

Input: the address of a dashboard, and a token from the places where Ray looks for one.
Output: a connected `Server`.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.cluster import compat_ray
from ray_jobs.cluster.connection import first_line
from ray_jobs.config.errors import JobError
from ray_jobs.submit.submit_spec import DEFAULT_ADDRESS, is_url

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PROG = "python -m ray_jobs.submit"

_REQUEST_TIMEOUT_S = 60.0
_TOKEN = "RAY_AUTH_TOKEN"
_TOKEN_FILE = "~/.ray/auth_token"
_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"


class UnavailableError(JobError):
    """The server does not respond at the moment; its jobs may continue."""


@dataclass(frozen=True)
class Server:
    """The job server of a cluster."""

    client: "JobSubmissionClient"
    address: str
    """URL of the dashboard, which also accepts jobs."""
    flag: str
    """Flag of `submit` that selects this server again; empty if none was given."""

    def command(self, verb: str, job: str) -> str:
        """Return the command that applies a verb of `submit` to a job."""
        return f"{PROG} {self.flag}{verb} {job}"

    def job_details(self, job: str) -> "JobDetails":
        """Return the status and metadata of a job.

        Raises:
            JobError: If the job does not exist, or the server does not respond.
        """
        with request_errors(self.address):
            try:
                return self.client.get_job_info(job)
            except RuntimeError as error:
                if "status code 404" not in str(error):
                    raise
        raise JobError(f"no job {job!r} at {self.address}; `{PROG} {self.flag}list` lists its jobs")


def connect(given: str | None) -> Server:
    """Return the job server at an address; None selects the default address.

    Raises:
        JobError: If the server does not respond or rejects the token.
    """
    address = server_address(given)
    # Ray prefers this variable to the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    import ray  # noqa: F401 - creates the log handler

    # The client logs each upload at level INFO.
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)
    with request_errors(address):
        client = compat_ray.job_client(address, _REQUEST_TIMEOUT_S)
    return Server(client, address, f"--address {address} " if given else "")


def server_address(given: str | None) -> str:
    """Return the URL of a dashboard: as given, from the environment, or on this machine."""
    candidates = (given, os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS"))
    return next((url for url in candidates if url and is_url(url)), DEFAULT_ADDRESS).rstrip("/")


def enable_token() -> None:
    """Make Ray's client send the token if there is one.

    Ray sends the token only in the authentication mode `token`, which it reads when it is imported.

    Raises:
        JobError: If the token file does not exist.
    """
    path = os.environ.get(_TOKEN_PATH)
    if path and not os.environ.get(_TOKEN) and not Path(path).expanduser().is_file():
        raise JobError(f"${_TOKEN_PATH}={path} is not a file; it must contain the cluster's token")
    if _token_source():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def request_errors(address: str) -> Iterator[None]:
    """Convert errors of requests to a server into one-line messages.

    Raises:
        JobError: Replaces the errors of Ray and its HTTP client.
    """
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise JobError(f"{address} denied access: {_token_advice()}") from error
    except (ConnectionError, requests.ConnectionError) as error:
        raise UnavailableError(
            f"could not connect to a Ray dashboard at {address}; set --address or "
            "RAY_API_SERVER_ADDRESS, or forward the dashboard's port, such as with `ray dashboard "
            "cluster.yaml`"
        ) from error
    except requests.RequestException as error:
        raise UnavailableError(f"request to {address} failed: {first_line(error)}") from error
    except RuntimeError as error:
        # The server sends tracebacks, whose last line is the reason.
        reason = str(error).strip().splitlines()[-1]
        kind = UnavailableError if "status code 5" in str(error) else JobError
        raise kind(f"request to {address} failed: {reason}") from error


def _token_source() -> str | None:
    """Describe where Ray finds a token; None if there is none."""
    if os.environ.get(_TOKEN):
        return f"${_TOKEN}"
    if path := os.environ.get(_TOKEN_PATH):
        return f"${_TOKEN_PATH} ({path})"
    return _TOKEN_FILE if Path(_TOKEN_FILE).expanduser().is_file() else None


def _token_advice() -> str:
    source, mode = _token_source(), os.environ.get("RAY_AUTH_MODE")
    remedy = f"set ${_TOKEN} to the cluster's token, or ${_TOKEN_PATH} to a file that contains it"
    if source is None:
        return f"it requires a token, and none was found; {remedy}"
    if mode != "token":
        return f"it requires a token, but RAY_AUTH_MODE={mode} ignores {source}; unset it"
    return (
        f"the token in {source} is not the cluster's, which `ray get-auth-token` prints on its "
        f"head; {remedy}"
    )
