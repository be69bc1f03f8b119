"""Send a job to a cluster, follow it there, stop it.

Reads: this project, which goes along as runtime_env.yaml says.  Writes: what the job writes. The
job's log comes to this terminal, and its summary after that. Data and results must be where every
node can reach them.

Run:   python -m ray_jobs.submit train ray_jobs/specs/houses.yaml --run.storage_path s3://bucket/runs

    VERB ARGUMENTS   doctor, prepare, inspect, train, tune, evaluate or predict, with the arguments
                     that `python -m ray_jobs.VERB` takes: they are checked before anything is sent.
                     Exits as the job does, and with 130 where it was stopped
    list             the jobs of the cluster
    status ID        PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    logs ID          follow a job again, from its beginning
    stop ID          stop a job; training saves a checkpoint first
    fetch ID         print the summary of a job that succeeded

Ctrl-C ends the following, not the job. A token is taken from $RAY_AUTH_TOKEN, from the file
$RAY_AUTH_TOKEN_PATH or from ~/.ray/auth_token. Flags of submit itself come before the verb:
"""

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any

from mm_model.nearest_match import did_you_mean
from mm_model.spec import Spec
from ray_jobs.cluster.packaging import folder_to_send, require_sendable, runtime_env
from ray_jobs.config import command_line
from ray_jobs.config.errors import JobError, UsageError
from ray_jobs.config.spec import EvaluateSpec, InspectSpec, PredictSpec, RunSpec
from ray_jobs.doctor.job import DoctorSpec
from ray_jobs.evaluate.job import METRICS
from ray_jobs.submit.client import PROG, Server, asking, connect, prepare_ray
from ray_jobs.submit.logs import FOLDER_KEY, SUMMARY_KEY, follow, say, summary_of, wait
from ray_jobs.submit.submit_spec import FetchSpec, JobSpec, ServerSpec, SubmitSpec
from ray_jobs.train.finalize import SUMMARY

_PACKAGE = "python -m ray_jobs."


@dataclass(frozen=True)
class _Verb:
    """A job that can be sent."""

    spec: type[Spec]
    output: str
    """Setting that says where its results go."""
    summary: str | None = None
    """File among them that sums them up."""


JOBS = {
    "prepare": _Verb(RunSpec, "prepare.output"),
    "inspect": _Verb(InspectSpec, "output"),
    "train": _Verb(RunSpec, "run.storage_path", SUMMARY),
    "tune": _Verb(RunSpec, "run.storage_path", SUMMARY),
    "evaluate": _Verb(EvaluateSpec, "output", METRICS),
    "predict": _Verb(PredictSpec, "output"),
    "doctor": _Verb(DoctorSpec, "run.storage_path"),
}


@dataclass(frozen=True)
class Job:
    """A job to send, checked."""

    verb: str
    arguments: tuple[str, ...]
    """Of the verb, as they hold at the cluster."""
    spec: str | None
    """YAML file among them, by its name in the folder that goes along."""
    folder: str
    """Where its results go."""
    summary: str | None
    """What sums them up, by its name in that folder."""

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs."""
        return _PACKAGE + shlex.join((self.verb, *self.arguments))

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster keeps of it, so that its summary is found."""
        return {FOLDER_KEY: self.folder} | ({SUMMARY_KEY: self.summary} if self.summary else {})

    @property
    def results(self) -> str:
        """Where its results go, to be read."""
        return "/".join((self.folder, *PurePosixPath(self.summary or "").parent.parts))


def submit(spec: SubmitSpec, job: Job, environment: dict[str, Any]) -> int:
    """Send a job, follow it, print its summary, and return its exit status.

    Args:
        spec: how it is sent.
        job: that is sent.
        environment: of the job, with the folder that goes along.

    Raises:
        JobError: if the folder is too large, or the cluster does not take the job.
    """
    require_sendable(environment, job.spec)
    server = connect(spec.address)
    with asking(server.address):
        sent = server.client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=spec.submission_id,
            runtime_env=environment,
            metadata=job.metadata,
        )
    say(f"job {sent}: {job.verb} → {job.results}\n  dashboard: {server.page(sent)}")
    if not spec.wait:
        print(sent)
        return 0
    status = follow(server, sent)
    if status == 0 and job.summary:
        try:
            _print_summary(server, sent, environment["working_dir"])
        except JobError as error:
            say(f"{error}\n  again: {server.command('fetch', sent)}")
    return status


# -- what is asked of jobs that were sent ---------------------------------------------------------


def list_jobs(spec: ServerSpec) -> int:
    """Print a table of the cluster's jobs, the newest at the end."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    server = connect(spec.address)
    with asking(server.address):
        jobs = [job for job in server.client.list_jobs() if job.submission_id]
    table = Table("id", "status", "started", "took", "job")
    for column in table.columns:
        column.no_wrap = True
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        began_s, ended_s = (job.start_time or 0) / 1e3, (job.end_time or 0) / 1e3
        table.add_row(
            job.submission_id,
            str(job.status),
            f"{datetime.fromtimestamp(began_s):%m-%d %H:%M}" if began_s else "–",
            _duration((ended_s or time.time()) - began_s) if began_s else "–",
            escape(job.entrypoint.removeprefix(_PACKAGE)),
        )
    # Of a long command a terminal shows the beginning, and a file the whole.
    width = None if sys.stdout.isatty() else max((len(job.entrypoint) for job in jobs), default=0)
    Console(highlight=False, width=width and width + 200).print(table)
    return 0


def status(spec: JobSpec) -> int:
    """Print how a job fares, in one word."""
    print(connect(spec.address).details(spec.id).status)
    return 0


def logs(spec: JobSpec) -> int:
    """Follow a job again, and return its exit status."""
    return follow(connect(spec.address), spec.id)


def stop(spec: JobSpec) -> int:
    """Stop a job, and wait until it has ended.

    Raises:
        JobError: if there is no such job.
    """
    server = connect(spec.address)
    server.details(spec.id)
    with asking(server.address):
        server.client.stop_job(spec.id)
    say(f"job {spec.id}: {wait(server, spec.id).status}")
    return 0


def fetch(spec: FetchSpec) -> int:
    """Print the summary of a job.

    Raises:
        JobError: if there is none.
    """
    folder = folder_to_send(spec.working_dir)
    _print_summary(connect(spec.address), spec.id, str(folder))
    return 0


ASKS: dict[str, tuple[type[Spec], Callable[[Any], int]]] = {
    "list": (ServerSpec, list_jobs),
    "status": (JobSpec, status),
    "logs": (JobSpec, logs),
    "stop": (JobSpec, stop),
    "fetch": (FetchSpec, fetch),
}


def _print_summary(server: Server, job: str, folder: str) -> None:
    print(json.dumps(summary_of(server, job, Path(folder)), indent=2))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


# -- the command line -----------------------------------------------------------------------------


def command(arguments: Sequence[str]) -> Callable[[], int]:
    """Return what the command line asks for, checked; nothing is sent yet, and no Ray is needed.

    Raises:
        UsageError: saying what is wrong with it.
    """
    flags, verb, rest = split(arguments)
    if verb in ASKS:
        spec_class, ask = ASKS[verb]
        return partial(ask, command_line.parse(spec_class, [*rest, *flags]))
    accepted = [*JOBS, *ASKS]
    if verb not in JOBS:
        what = (
            f"{verb!r} is no verb{did_you_mean(verb, accepted)}" if verb else "the verb is missing"
        )
        raise UsageError(f"{what} (accepted: {', '.join(accepted)})")
    spec = command_line.parse(SubmitSpec, flags)
    folder = folder_to_send(spec.working_dir)
    job = checked(verb, rest, folder)
    return partial(submit, spec, job, runtime_env(folder, spec.env))


def split(arguments: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Return submit's own flags, the verb, and what comes after it.

    Own flags may be written as Ray's are: `--no-wait`, `--working-dir`.
    """
    flags, rest = [], list(arguments)
    while rest and rest[0].startswith("--"):
        flag, equals, value = rest.pop(0).partition("=")
        flag = "--" + flag[2:].replace("-", "_")
        if flag == "--no_wait":
            flag, equals, value = "--wait", "=", "false"
        flags.append(flag + equals + value)
        if not equals and rest:
            flags.append(rest.pop(0))
    return flags, rest[0] if rest else "", rest[1:]


def checked(verb: str, arguments: Sequence[str], folder: Path) -> Job:
    """Return the job that a verb and its arguments describe.

    Args:
        verb: of `JOBS`.
        arguments: of the verb.
        folder: that goes along with the job.

    Raises:
        UsageError: if the verb would not take them, or they cannot mean the same at a cluster.
    """
    known = JOBS[verb]
    _require_flags_of(verb, arguments)
    spec: Any = command_line.parse(known.spec, arguments)
    is_run = isinstance(spec, RunSpec)
    addresses = {"address": getattr(spec, "address", None)}
    if is_run:
        addresses["run.address"] = spec.run.address
    for where, address in addresses.items():
        if address not in (None, "auto"):
            raise UsageError(
                f"{where}={address!r}: a job uses the cluster that it is sent to, which --address "
                f"before {verb} says; leave it out"
            )
    output = attrgetter(known.output)(spec) or spec.prepared
    if "://" not in output and not output.startswith("/"):
        raise UsageError(
            f"{known.output}={output!r} is relative, and a job works in a copy of the project that "
            "is deleted after it; give a path from the root, or a URI, that every node can reach"
        )
    words, file, below = list(arguments), None, ""
    if is_run and words and not words[0].startswith("--"):
        words[0] = file = _name_in(folder, words[0])
    if is_run and known.summary:
        # What it is called is settled here, so that its summary is found.
        name = spec.run.name or time.strftime("%Y%m%d-%H%M%S")
        words += [] if spec.run.name else ["--run.name", name]
        below = f"{name}/"
    summary = below + known.summary if known.summary else None
    return Job(verb, tuple(words), file, output, summary)


def _require_flags_of(verb: str, arguments: Sequence[str]) -> None:
    """Check that submit's own flags are not among those of a verb.

    Raises:
        UsageError: if one is.
    """
    own = {"no_wait", *SubmitSpec.model_fields} - set(command_line.flatten(JOBS[verb].spec))
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag[2:].replace("-", "_") in own:
            raise UsageError(f"{flag} is submit's own flag; put it before {verb}")


def _name_in(folder: Path, file: str) -> str:
    """Return the name of a file in the folder that goes along with a job.

    Raises:
        UsageError: if it lies elsewhere.
    """
    path = Path(file).resolve()
    if not path.is_relative_to(folder):
        raise UsageError(
            f"{file} is not in {folder}, which goes along with the job; copy it there, or name "
            "another folder by --working_dir before the verb"
        )
    return path.relative_to(folder).as_posix()


def help_text(arguments: Sequence[str]) -> str:
    """Return the help of submit, or of the verb that it is asked of."""
    for verb in arguments:
        if verb in JOBS:
            return command_line.help_text(
                JOBS[verb].spec, f"{PROG} [FLAGS] {verb}", f"{verb}, at a cluster"
            )
    _, _, flags = command_line.help_text(SubmitSpec, PROG, __doc__ or "").partition("\n")
    return f"usage: {PROG} [--key value …] VERB [ARGUMENTS]\n{flags}"


def main() -> None:
    """Run from the command line."""
    arguments = sys.argv[1:]
    if command_line.asks_for_help(arguments):
        print(help_text(arguments))
        return

    def answer(ask: Callable[[], int]) -> None:
        prepare_ray()
        sys.exit(ask())

    command_line.run(PROG, lambda: command(arguments), answer)
