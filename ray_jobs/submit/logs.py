"""Follows a job on a cluster: prints its log and returns its exit status and summary.

A lost connection is reopened, for example after a laptop has slept. The job does not depend on
this process: it continues if the terminal is closed.
"""

import asyncio
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.cluster.packaging import runtime_env
from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.submit import summary
from ray_jobs.submit.client import Server, UnavailableError, request_errors

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

FOLDER_KEY, SUMMARY_KEY = "folder", "summary"
"""Keys of a job's metadata: the folder of its results, and the name of the summary file in it."""

_SILENCE_S = 60.0
"""A connection that sends no data for this long may be dead, so it is replaced."""
_RETRY_S = 3.0
_GIVE_UP_S = 900.0
_POLL_S = 0.5
_INTERRUPTED, _SIGNALLED = 130, 128


def print_status(text: str) -> None:
    """Print a message of `submit` to stderr; stdout contains only the job's output."""
    print(text, file=sys.stderr, flush=True)


def follow(server: Server, job: str) -> int:
    """Print a job's log until the job ends, and return the job's exit status.

    Raises:
        JobError: If the job does not exist, or the cluster is lost.
        Interrupted: If the user stops following.
    """
    log, details = _Log(server, job), server.job_details(job)
    detached = (
        f"job {job} continues without this terminal\n"
        f"  follow it again: {server.command('logs', job)}\n"
        f"  stop it: {server.command('stop', job)}"
    )
    lost_at = None
    try:
        while not details.status.is_terminal():
            if log.follow():
                lost_at = None
            try:
                details, lost_at = server.job_details(job), None
            except UnavailableError as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > _GIVE_UP_S:
                    raise JobError(f"{error}\nIf the cluster is alive, {detached}") from error
                time.sleep(_RETRY_S)
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        raise Interrupted(detached) from None
    log.finish()
    return _report_end(job, details)


def wait(server: Server, job: str) -> "JobDetails":
    """Return the details of a job once it has ended.

    Raises:
        JobError: If the job does not exist, or the server does not respond.
    """
    while not (details := server.job_details(job)).status.is_terminal():
        time.sleep(_POLL_S)
    return details


def read_summary(server: Server, job: str, folder: Path) -> Any:
    """Return the summary of a job's results, read by another job on the cluster.

    Args:
        server: The server of both jobs.
        job: Id of the job.
        folder: Folder to upload with the job that reads the summary.

    Raises:
        JobError: If the job has not succeeded, writes no summary, or the summary cannot be read.
    """
    details = server.job_details(job)
    metadata = details.metadata or {}
    if SUMMARY_KEY not in metadata:
        raise JobError(f"job {job} writes no summary ({details.entrypoint})")
    if details.status != "SUCCEEDED":
        raise JobError(f"job {job} is {details.status}; only a successful job has a summary")
    environment = runtime_env(folder, ())
    # Reading the results can require the job's own variables, such as keys of object storage.
    environment["env_vars"] |= (details.runtime_env or {}).get("env_vars") or {}
    words = ("python", "-m", summary.__name__, metadata[FOLDER_KEY], metadata[SUMMARY_KEY])
    with request_errors(server.address):
        reader = server.client.submit_job(entrypoint=shlex.join(words), runtime_env=environment)
        wait(server, reader)
        log = server.client.get_job_logs(reader)
    content = summary.parse_log(log)
    if content is None:
        reason = log.strip().rpartition("\n")[2]
        raise JobError(
            f"the cluster could not read {metadata[FOLDER_KEY]}/{metadata[SUMMARY_KEY]}: {reason}"
        )
    with request_errors(server.address):
        server.client.delete_job(reader)
    return content


class _Log:
    """Prints a job's log, which every connection sends from its start, without repetition."""

    def __init__(self, server: Server, job: str) -> None:
        self._server, self._job = server, job
        self._printed = 0

    def follow(self) -> bool:
        """Print the log until the job ends, or the connection breaks or sends no data for long.

        Ray may omit the last second of the log; only the job's status shows whether it has ended.

        Returns:
            Whether there was anything new, which shows that the cluster was reachable.
        """
        from aiohttp import ClientError

        before = self._printed
        try:
            asyncio.run(self._follow())
        except BrokenPipeError:  # of this terminal
            raise
        except TimeoutError:  # no data for _SILENCE_S
            pass
        except (ClientError, OSError, RuntimeError):
            time.sleep(_RETRY_S)
        return self._printed > before

    def finish(self) -> None:
        """Print the rest of the log after the job has ended."""
        # If the node with the log is gone, the output ends with what was already printed.
        with suppress(JobError), request_errors(self._server.address):
            self._print(self._server.client.get_job_logs(self._job), 0)

    async def _follow(self) -> None:
        start, clock = 0, asyncio.get_running_loop().time
        async with asyncio.timeout(_SILENCE_S) as silence:
            async for text in self._server.client.tail_job_logs(self._job):
                silence.reschedule(clock() + _SILENCE_S)
                self._print(text, start)
                start += len(text)

    def _print(self, text: str, start: int) -> None:
        """Print the part of a text that was not printed before; `start` is its offset."""
        sys.stdout.write(text[max(0, self._printed - start) :])
        sys.stdout.flush()
        self._printed = max(self._printed, start + len(text))


def _report_end(job: str, details: "JobDetails") -> int:
    """Print how a job ended and return its exit status."""
    if details.status == "SUCCEEDED":
        print_status(f"job {job} succeeded")
        return 0
    if details.status == "STOPPED":
        print_status(f"error: job {job} was stopped")
        return _INTERRUPTED
    code = details.driver_exit_code
    if code is None:
        # It did not start or was lost, so only Ray, not the log, has the reason.
        print_status(f"{details.message or 'Ray gives no reason'}\nerror: job {job} failed")
        return 1
    status = code if code > 0 else _SIGNALLED - code
    print_status(f"error: job {job} failed with exit status {status}")
    return status
