"""The job server of a cluster: found by URL, let in by token, its errors in the user's terms.

Enters: an address, and a token from where Ray looks for one.  Leaves: a connected `Server`.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.cluster.connection import first_line
from ray_jobs.config.errors import JobError
from ray_jobs.submit.submit_spec import DEFAULT, is_url

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PROG = "python -m ray_jobs.submit"

_SILENT_S = 60.0
_TOKEN = "RAY_AUTH_TOKEN"
_TOKEN_FILE = "~/.ray/auth_token"
_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"


class Unanswered(JobError):
    """The server does not answer at the moment; the jobs at it may go on."""


@dataclass(frozen=True)
class Server:
    """A cluster's job server."""

    client: "JobSubmissionClient"
    address: str
    """URL of the dashboard, which is where the jobs are taken, too."""
    flag: str
    """What a command of ours needs to find it again."""

    def command(self, verb: str, job: str) -> str:
        """Return the command that does something with a job."""
        return f"{PROG} {self.flag}{verb} {job}"

    def page(self, job: str) -> str:
        """Return the dashboard's page of a job."""
        return f"{self.address}/#/jobs/{job}"

    def details(self, job: str) -> "JobDetails":
        """Return what the cluster knows of a job.

        Raises:
            JobError: if it knows none of this id, or does not answer.
        """
        with asking(self.address):
            try:
                return self.client.get_job_info(job)
            except RuntimeError as error:
                if "status code 404" not in str(error):
                    raise
        raise JobError(
            f"{self.address} knows no job {job!r}; `{PROG} {self.flag}list` shows those there are"
        )


def connect(given: str | None) -> Server:
    """Return the job server at an address, or at the one that the environment names.

    Raises:
        JobError: if there is none, or it does not let us in.
    """
    address = server_address(given)
    # Ray takes this over the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """One that does not wait for ever for a server which takes a connection and is silent."""

        def _do_request(self, *args: Any, **options: Any) -> Any:
            return super()._do_request(*args, **{"timeout": _SILENT_S, **options})

    with asking(address):
        client = Client(address)
    return Server(client, address, f"--address {address} " if given else "")


def server_address(given: str | None) -> str:
    """Return the URL of a cluster's dashboard: the given one, the environment's, or one here."""
    named = (given, os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS"))
    return next((url for url in named if url and is_url(url)), DEFAULT).rstrip("/")


def prepare_ray() -> None:
    """Let Ray's client send a token where there is one, and say nothing by itself.

    Neither variable nor file makes it send a token without a mode, which it reads once: this comes
    before anything else of Ray's.

    Raises:
        JobError: if there is to be one, and there is not.
    """
    path = os.environ.get(_TOKEN_PATH)
    if path and not os.environ.get(_TOKEN) and not Path(path).expanduser().is_file():
        raise JobError(f"${_TOKEN_PATH}={path} is no file; it should hold the cluster's token")
    if _token_source():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray  # noqa: F401 - makes the handler

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)


@contextmanager
def asking(address: str) -> Iterator[None]:
    """Say what went wrong between us and the server, in one line.

    Raises:
        JobError: in place of what Ray and its HTTP client raise.
    """
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise JobError(f"{address} does not let us in: {_what_token()}") from error
    except (ConnectionError, requests.ConnectionError) as error:
        raise Unanswered(
            f"no Ray dashboard answers at {address}; name it by --address or "
            "RAY_API_SERVER_ADDRESS, or open the way to it, such as with `ray dashboard "
            "cluster.yaml`"
        ) from error
    except requests.RequestException as error:
        raise Unanswered(f"{address} does not answer as Ray does: {first_line(error)}") from error
    except RuntimeError as error:
        # The server's own errors come as tracebacks, with the reason at their end.
        why = str(error).strip().splitlines()[-1]
        kind = Unanswered if "status code 5" in str(error) else JobError
        raise kind(f"{address} refuses: {why}") from error


def _token_source() -> str | None:
    """Return where Ray finds a token, in words."""
    if os.environ.get(_TOKEN):
        return f"${_TOKEN}"
    if path := os.environ.get(_TOKEN_PATH):
        return f"${_TOKEN_PATH} ({path})"
    return _TOKEN_FILE if Path(_TOKEN_FILE).expanduser().is_file() else None


def _what_token() -> str:
    source, mode = _token_source(), os.environ.get("RAY_AUTH_MODE")
    where = f"set ${_TOKEN} to the cluster's, or ${_TOKEN_PATH} to a file with it"
    if source is None:
        return f"it wants a token, and there is none here; {where}"
    if mode != "token":
        return f"it wants a token, and RAY_AUTH_MODE={mode} keeps that in {source} back; unset it"
    return (
        f"the token in {source} is not the cluster's (there `ray get-auth-token` shows it); {where}"
    )
