"""Follow a job at a cluster: its log on this terminal, how it ended, its summary.

Enters: a server and a job's id.  Leaves: the log on stdout, and the job's exit status.

A connection that is lost, as by a laptop that slept, is made anew. The job knows nothing of us:
whoever goes away leaves it running.
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
from ray_jobs.submit.client import Server, Unanswered, asking

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

FOLDER_KEY, SUMMARY_KEY = "folder", "summary"
"""Of a job's metadata: where its results lie, and the name there of the file that sums them up."""

_SILENCE_S = 60.0
"""A connection that brings nothing for so long may be dead; another one sends the log once more."""
_RETRY_S = 3.0
_GIVE_UP_S = 900.0
_LOOK_S = 0.5
_INTERRUPTED, _SIGNALLED = 130, 128


def say(text: str) -> None:
    """Print what is ours: stdout has what is the job's."""
    print(text, file=sys.stderr, flush=True)


def follow(server: Server, job: str) -> int:
    """Show a job's log until the job ends, say how it ended, and return its exit status.

    Raises:
        JobError: if there is no such job, or its cluster is lost.
        Interrupted: if the user goes away.
    """
    log, details = _Log(server, job), server.details(job)
    goes_on = (
        f"job {job} goes on without this terminal\n"
        f"  follow it again: {server.command('logs', job)}\n"
        f"  stop it: {server.command('stop', job)}"
    )
    lost_at = None
    try:
        while not details.status.is_terminal():
            log.follow()
            try:
                details, lost_at = server.details(job), None
            except Unanswered as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > _GIVE_UP_S:
                    raise JobError(f"{error}\nPerhaps {goes_on}") from error
                time.sleep(_RETRY_S)
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        raise Interrupted(goes_on) from None
    log.finish()
    return _ended(server, job, details)


def wait(server: Server, job: str) -> "JobDetails":
    """Return what the cluster knows of a job once it has ended.

    Raises:
        JobError: if there is no such job, or the cluster does not answer.
    """
    while not (details := server.details(job)).status.is_terminal():
        time.sleep(_LOOK_S)
    return details


def summary_of(server: Server, job: str, folder: Path) -> Any:
    """Return what sums up a job's results, which may lie where only the cluster reaches.

    Args:
        server: that the job was sent to.
        job: its id.
        folder: that goes along with the job that reads it.

    Raises:
        JobError: if the job has not succeeded, leaves no summary, or that cannot be read.
    """
    details = server.details(job)
    metadata = details.metadata or {}
    if SUMMARY_KEY not in metadata:
        raise JobError(f"job {job} leaves no summary ({details.entrypoint})")
    if details.status != "SUCCEEDED":
        raise JobError(f"job {job} is {details.status}; a summary comes with success")
    environment = runtime_env(folder, ())
    # With what opened the folder for the job itself, such as keys of object storage.
    environment["env_vars"] |= (details.runtime_env or {}).get("env_vars") or {}
    words = ("python", "-m", summary.__name__, metadata[FOLDER_KEY], metadata[SUMMARY_KEY])
    with asking(server.address):
        reader = server.client.submit_job(entrypoint=shlex.join(words), runtime_env=environment)
        wait(server, reader)
        log = server.client.get_job_logs(reader)
    found = summary.shown_in(log)
    if found is None:
        why = log.strip().rpartition("\n")[2]
        raise JobError(
            f"{metadata[FOLDER_KEY]}/{metadata[SUMMARY_KEY]} cannot be read there: {why}"
        )
    with asking(server.address):
        server.client.delete_job(reader)
    return found


class _Log:
    """A job's log on this terminal. Every connection sends it from its beginning."""

    def __init__(self, server: Server, job: str) -> None:
        self._server, self._job = server, job
        self._shown = 0

    def follow(self) -> None:
        """Print what comes, until the job ends, nothing comes for long, or the connection breaks.

        Ray may miss the job's last second, and whether it ended is for the server to say.
        """
        from aiohttp import ClientError

        try:
            asyncio.run(self._follow())
        except BrokenPipeError:  # of our own terminal
            raise
        except TimeoutError:  # of silence
            pass
        except (ClientError, OSError, RuntimeError):
            time.sleep(_RETRY_S)

    def finish(self) -> None:
        """Print what is left, once the job has ended."""
        # A log that lies on a node which is gone by now ends with what was seen of it.
        with suppress(JobError), asking(self._server.address):
            self._print(self._server.client.get_job_logs(self._job), 0)

    async def _follow(self) -> None:
        begins, clock = 0, asyncio.get_running_loop().time
        async with asyncio.timeout(_SILENCE_S) as silence:
            async for text in self._server.client.tail_job_logs(self._job):
                silence.reschedule(clock() + _SILENCE_S)
                self._print(text, begins)
                begins += len(text)

    def _print(self, text: str, begins: int) -> None:
        """Print of a piece of the log what was not printed before."""
        sys.stdout.write(text[max(0, self._shown - begins) :])
        sys.stdout.flush()
        self._shown = max(self._shown, begins + len(text))


def _ended(server: Server, job: str, details: "JobDetails") -> int:
    """Say how a job ended, and return its exit status."""
    if details.status == "SUCCEEDED":
        say(f"job {job} succeeded")
        return 0
    if details.status == "STOPPED":
        say(f"error: job {job} was stopped")
        return _INTERRUPTED
    code = details.driver_exit_code
    if code is None:
        # It did not come to run, or was lost: its log does not say why, and Ray does.
        say(f"{details.message or 'Ray does not say why'}\nerror: job {job} failed")
        return 1
    status = code if code > 0 else _SIGNALLED - code
    say(f"error: job {job} failed with exit status {status}")
    return status
