"""Submit, follow and stop jobs on a cluster.

Uploads this project as defined in runtime_env.yaml, then prints the job's log and its summary.
Input data and results must be in storage that every node can reach.

Run:   python -m ray_jobs.submit train ray_jobs/specs/houses.yaml --run.storage_path s3://bucket/runs

    VERB ARGUMENTS   submit doctor, prepare, inspect, train, tune, evaluate or predict, with the
                     arguments of `python -m ray_jobs.VERB`, which are checked before anything is
                     sent. The exit status is that of the job, or 130 if it was stopped
    list             list the jobs of the cluster
    status ID        print PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    logs ID          follow a job again, from the start of its log
    stop ID          stop a job; training saves a checkpoint first
    fetch ID         print the summary of a successful job

Ctrl-C stops following the log; the job continues. The token comes from $RAY_AUTH_TOKEN, the file
$RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. The flags of submit itself come before the verb:
"""

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any

from mm_model.nearest_match import did_you_mean
from mm_model.spec import Spec
from ray_jobs.cluster.packaging import require_uploadable, resolve_working_dir, runtime_env
from ray_jobs.config import command_line
from ray_jobs.config.errors import JobError, UsageError
from ray_jobs.config.inference_spec import EvaluateSpec, PredictSpec
from ray_jobs.config.spec import (
    CrossValidateSpec,
    InspectSpec,
    RunSpec,
)
from ray_jobs.doctor.job import DoctorSpec
from ray_jobs.evaluate.job import METRICS
from ray_jobs.submit.client import PROG, Server, connect, enable_token, request_errors
from ray_jobs.submit.logs import FOLDER_KEY, SUMMARY_KEY, follow, print_status, read_summary, wait
from ray_jobs.submit.submit_spec import FetchSpec, JobSpec, ServerSpec, SubmitSpec
from ray_jobs.train.finalize import SUMMARY
from ray_jobs.tune.search.space import SearchSpec

_PACKAGE = "python -m ray_jobs."


@dataclass(frozen=True)
class _Verb:
    """A verb that can be submitted."""

    spec: type[Spec]
    output: str
    """Path of the setting with the folder of the results."""
    summary: str | None = None
    """Name of the summary file in the results."""


JOBS = {
    "prepare": _Verb(RunSpec, "prepare.output"),
    "inspect": _Verb(InspectSpec, "output"),
    "train": _Verb(RunSpec, "run.storage_path", SUMMARY),
    "tune": _Verb(SearchSpec, "run.storage_path", SUMMARY),
    "cross_validate": _Verb(CrossValidateSpec, "run.storage_path", METRICS),
    "evaluate": _Verb(EvaluateSpec, "output", METRICS),
    "predict": _Verb(PredictSpec, "output"),
    "doctor": _Verb(DoctorSpec, "run.storage_path"),
}


@dataclass(frozen=True)
class Job:
    """A validated job to submit."""

    verb: str
    arguments: tuple[str, ...]
    """Arguments of the verb on the cluster."""
    spec_file: str | None
    """The YAML file among them, relative to the uploaded folder."""
    folder: str
    """Folder of the results."""
    summary: str | None
    """Summary file, relative to that folder."""

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs."""
        return _PACKAGE + shlex.join((self.verb, *self.arguments))

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata stored on the cluster, from which `fetch` finds the summary."""
        return {FOLDER_KEY: self.folder} | ({SUMMARY_KEY: self.summary} if self.summary else {})

    @property
    def results(self) -> str:
        """Folder of the summary; if there is none, folder of the results."""
        return "/".join((self.folder, *PurePosixPath(self.summary or "").parent.parts))


def submit(spec: SubmitSpec, job: Job, environment: dict[str, Any]) -> int:
    """Submit a job, follow it, print its summary, and return its exit status.

    `environment` is the job's runtime environment, which names the folder to upload.

    Raises:
        JobError: If the folder is too large, or the cluster rejects the job.
    """
    require_uploadable(environment, job.spec_file)
    server = connect(spec.address)
    with request_errors(server.address):
        job_id = server.client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=spec.submission_id,
            runtime_env=environment,
            metadata=job.metadata,
        )
    dashboard = f"{server.address}/#/jobs/{job_id}"
    print_status(f"job {job_id}: {job.verb} → {job.results}\n  dashboard: {dashboard}")
    if not spec.wait:
        print(job_id)
        return 0
    status = follow(server, job_id)
    if status == 0 and job.summary:
        try:
            _print_summary(server, job_id, environment["working_dir"])
        except JobError as error:
            print_status(f"{error}\n  try again: {server.command('fetch', job_id)}")
    return status


# -- submitted jobs -------------------------------------------------------------------------------


def list_jobs(spec: ServerSpec) -> None:
    """Print a table of the cluster's jobs, the newest last."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    server = connect(spec.address)
    with request_errors(server.address):
        jobs = [job for job in server.client.list_jobs() if job.submission_id]
    names = ("id", "status", "started", "took", "job")
    table = Table(*(Column(name, no_wrap=True) for name in names))
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        started, took = "–", "–"
        if job.start_time:
            start_s, end_s = job.start_time / 1e3, (job.end_time or 0) / 1e3 or time.time()
            started = f"{datetime.fromtimestamp(start_s):%m-%d %H:%M}"
            took = str(timedelta(seconds=round(end_s - start_s)))
        command = escape(job.entrypoint.removeprefix(_PACKAGE))
        table.add_row(job.submission_id, str(job.status), started, took, command)
    # A terminal truncates long commands; a file contains them in full.
    width = None if sys.stdout.isatty() else max((len(job.entrypoint) for job in jobs), default=0)
    Console(highlight=False, width=width and width + 200).print(table)


def status(spec: JobSpec) -> None:
    """Print the status of a job."""
    print(connect(spec.address).job_details(spec.id).status)


def logs(spec: JobSpec) -> int:
    """Follow a job again, and return its exit status."""
    return follow(connect(spec.address), spec.id)


def stop(spec: JobSpec) -> None:
    """Stop a job and wait until it has ended."""
    server = connect(spec.address)
    server.job_details(spec.id)
    with request_errors(server.address):
        server.client.stop_job(spec.id)
    print_status(f"job {spec.id}: {wait(server, spec.id).status}")


def fetch(spec: FetchSpec) -> None:
    """Print the summary of a job."""
    folder = resolve_working_dir(spec.working_dir)
    _print_summary(connect(spec.address), spec.id, str(folder))


COMMANDS: dict[str, tuple[type[Spec], Callable[[Any], int | None]]] = {
    "list": (ServerSpec, list_jobs),
    "status": (JobSpec, status),
    "logs": (JobSpec, logs),
    "stop": (JobSpec, stop),
    "fetch": (FetchSpec, fetch),
}


def _print_summary(server: Server, job_id: str, folder: str) -> None:
    print(json.dumps(read_summary(server, job_id, Path(folder)), indent=2))


# -- the command line -----------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> Callable[[], int | None]:
    """Return the validated action of a command line, which returns an exit status; None means 0.

    Sends nothing and does not import Ray. Exits like `command_line.parse`.

    Raises:
        UsageError: If the command line is invalid.
    """
    flags, verb, rest = split(arguments)
    if verb in COMMANDS:
        spec_class, action = COMMANDS[verb]
        spec = command_line.parse(
            spec_class, [*rest, *flags], f"{PROG} {verb}", action.__doc__ or ""
        )
        return partial(action, spec)
    prog = f"{PROG} [FLAGS] VERB [ARGUMENTS]" if command_line.HELP_FLAGS & set(flags) else PROG
    spec = command_line.parse(SubmitSpec, flags, prog, __doc__ or "")
    accepted = [*JOBS, *COMMANDS]
    if verb not in JOBS:
        problem = f"unknown verb {verb!r}{did_you_mean(verb, accepted)}" if verb else "missing verb"
        raise UsageError(f"{problem} (accepted: {', '.join(accepted)})")
    folder = resolve_working_dir(spec.working_dir)
    job = make_job(verb, rest, folder)
    return partial(submit, spec, job, runtime_env(folder, spec.env))


def split(arguments: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Return the flags of submit, the verb, and the verb's arguments.

    The flags of submit may be written like Ray's: `--no-wait`, `--working-dir`.
    """
    flags, rest = [], list(arguments)
    while rest and rest[0].startswith("-"):
        flag, equals, value = rest.pop(0).partition("=")
        if flag in ("--no-wait", "--no_wait"):
            flag, equals, value = "--wait", "=", "false"
        flags.append(flag + equals + value)
        if not equals and rest and flag not in command_line.HELP_FLAGS:
            flags.append(rest.pop(0))
    return flags, rest[0] if rest else "", rest[1:]


def make_job(verb: str, arguments: Sequence[str], folder: Path) -> Job:
    """Return the job for a verb of `JOBS`, its arguments and the folder to upload.

    Raises:
        UsageError: If the verb does not accept the arguments, or the cluster could not use them.
    """
    _require_no_submit_flags(verb, arguments)
    prog = (
        f"{PROG} [FLAGS] {verb}" if command_line.HELP_FLAGS & set(arguments) else f"{PROG} {verb}"
    )
    spec: Any = command_line.parse(JOBS[verb].spec, arguments, prog, f"Run {verb} on a cluster.")
    is_run = isinstance(spec, RunSpec)
    addresses = {"address": getattr(spec, "address", None)}
    if is_run:
        addresses["run.address"] = spec.run.address
    for path, address in addresses.items():
        if address not in (None, "auto"):
            raise UsageError(
                f"{path}={address!r}: a submitted job uses the cluster that it runs on; remove the "
                f"setting, and choose the cluster with --address before {verb}"
            )
    output = attrgetter(JOBS[verb].output)(spec) or spec.prepared
    if "://" not in output and not output.startswith("/"):
        raise UsageError(
            f"{JOBS[verb].output}={output!r} is relative, but a submitted job runs in a temporary "
            "copy of the project; use an absolute path or a URI that every node can reach"
        )
    words, spec_file, summary = list(arguments), None, JOBS[verb].summary
    if is_run and words and not words[0].startswith("--"):
        words[0] = spec_file = _relative_name(folder, words[0])
    if is_run and summary:
        # The name must be known here to find the summary.
        name = spec.run.name or time.strftime("%Y%m%d-%H%M%S")
        words += [] if spec.run.name else ["--run.name", name]
        summary = f"{name}/{summary}"
    return Job(verb, tuple(words), spec_file, output, summary)


def _require_no_submit_flags(verb: str, arguments: Sequence[str]) -> None:
    own = {"no_wait", *SubmitSpec.model_fields} - set(command_line.flatten(JOBS[verb].spec))
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag[2:].replace("-", "_") in own:
            raise UsageError(f"{flag} is a flag of submit; put it before {verb}")


def _relative_name(folder: Path, file: str) -> str:
    path = Path(file).resolve()
    if not path.is_relative_to(folder):
        raise UsageError(
            f"{file} is not in {folder}, the folder that is uploaded with the job; move it there, "
            "or set another folder with --working_dir before the verb"
        )
    return path.relative_to(folder).as_posix()


def main() -> None:
    """Run from the command line."""

    def run(action: Callable[[], int | None]) -> None:
        enable_token()
        sys.exit(action())

    command_line.run(PROG, lambda: parse(sys.argv[1:]), run)
