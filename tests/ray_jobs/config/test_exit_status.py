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


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_exits_with_0_and_runs_nothing(monkeypatch, capsys, flag):
    arguments = ["--train.epochs", "x", flag]
    assert run_main(monkeypatch, failing(AssertionError()), *arguments) == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_a_usage_error_exits_with_2_and_runs_nothing(monkeypatch, capsys):
    assert run_main(monkeypatch, failing(AssertionError()), "--train.epochs", "x") == 2
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


def test_a_traceback_is_printed_on_request(monkeypatch):
    monkeypatch.setenv("RAY_JOBS_TRACEBACK", "1")
    with pytest.raises(JobError, match="the table is empty"):
        run_main(monkeypatch, failing(JobError("the table is empty")))


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, failing(ZeroDivisionError()))


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    assert run_main(monkeypatch, failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_verb_refers_to_its_help_and_exits_with_2_on_a_usage_error():
    result = subprocess.run(
        [sys.executable, "-m", "ray_jobs.train", "--train.epoch", "3"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "")
    error = unframed(result.stderr)
    assert "Unrecognized options: --train.epoch, 3 Perhaps you meant: --train.epochs INT" in error
    assert "run python -m ray_jobs.train --help" in error


def test_a_verb_exits_with_1_and_one_line_if_its_data_is_missing(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "ray_jobs.train", "--data.prepared", str(tmp_path / "nothing"),
         "--run.storage_path", str(tmp_path / "runs")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {tmp_path}/nothing has no manifest.json; ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
