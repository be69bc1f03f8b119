"""The error messages and exit status of a job."""

import subprocess
import sys
from typing import Any

import pytest

from ray_jobs.config import command_line
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from tests.ray_jobs.config.usage import unframed


def run_main(monkeypatch: pytest.MonkeyPatch, job: Any, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    try:
        command_line.main(RunSpec, job, "A job.")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def failing(error: BaseException) -> Any:
    def job(spec: RunSpec) -> None:
        raise error

    return job


def test_a_successful_job_exits_with_0(monkeypatch):
    seen = []
    assert run_main(monkeypatch, seen.append, "--train.epochs", "3") == 0
    assert [spec.train.epochs for spec in seen] == [3]


def test_help_and_usage_errors_run_nothing(monkeypatch, capsys):
    job = failing(AssertionError())
    for flag in ("-h", "--help"):
        assert run_main(monkeypatch, job, "--train.epochs", "x", flag) == 0
        assert capsys.readouterr().out.startswith("usage: ")
    assert run_main(monkeypatch, job, "--train.epochs", "x") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "--train.epochs: 'x' is invalid: Input should be a valid integer" in unframed(output.err)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (JobError("the table is empty"), "error: the table is empty\n"),
        (ValueError("too few rows"), "error: too few rows\n"),
        (FileNotFoundError(2, "No such file", "x.csv"), "error: [Errno 2] No such file: 'x.csv'\n"),
        (ValueError(), "error: ValueError\n"),
    ],
)
def test_an_error_that_the_user_can_fix_exits_with_1_and_one_line(monkeypatch, capsys, error, line):
    monkeypatch.delenv("RAY_JOBS_TRACEBACK", raising=False)
    assert run_main(monkeypatch, failing(error)) == 1
    assert capsys.readouterr().err == line


def test_other_errors_and_those_on_request_keep_their_traceback(monkeypatch, capsys):
    assert run_main(monkeypatch, failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, failing(ZeroDivisionError()))
    monkeypatch.setenv("RAY_JOBS_TRACEBACK", "1")
    with pytest.raises(JobError, match="the table is empty"):
        run_main(monkeypatch, failing(JobError("the table is empty")))


def run_train(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray_jobs.train", *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_verb_refers_to_its_help_and_exits_with_2_on_a_usage_error():
    result = run_train("--train.epoch", "3")
    assert (result.returncode, result.stdout) == (2, "")
    error = unframed(result.stderr)
    assert "Unrecognized options: --train.epoch, 3 Perhaps you meant: --train.epochs INT" in error
    assert "run python -m ray_jobs.train --help" in error


def test_a_verb_exits_with_1_and_one_line_if_its_data_is_missing(tmp_path):
    data, runs = tmp_path / "nothing", tmp_path / "runs"
    result = run_train("--data.prepared", str(data), "--run.storage_path", str(runs))
    assert (result.returncode, result.stdout) == (1, "")
    remedy = "run `python -m ray_jobs.prepare` first"
    assert result.stderr == f"error: {data} has no manifest.json; {remedy}\n"
    assert not runs.exists()
