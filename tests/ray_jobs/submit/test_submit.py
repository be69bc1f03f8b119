"""Submitting jobs: command line, upload and authentication."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.cluster import packaging
from ray_jobs.config.errors import JobError, UsageError
from ray_jobs.submit import job as submit_job
from ray_jobs.submit.client import enable_token, server_address
from tests.ray_jobs.config.usage import unframed, usage_error
from tests.ray_jobs.submit.job_server import JobServer
from tests.ray_jobs.submit.submitting import IGNORED_WARNINGS, ROOT, SHARED, SPEC, program, run

pytestmark = IGNORED_WARNINGS


# -- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "flags", "rest"),
    [
        (["train", "a.yaml", "--train.epochs", "3"], [], ["a.yaml", "--train.epochs", "3"]),
        (["--address", "train", "train"], ["--address", "train"], []),
        (["--address=x", "--no-wait", "train"], ["--address=x", "--wait=false"], []),
        (["--working-dir", "a-b", "train", "--no-wait"], ["--working-dir", "a-b"], ["--no-wait"]),
    ],
)
def test_the_flags_of_submit_end_at_the_verb(line, flags, rest):
    assert submit_job.split(line) == (flags, "train", rest)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r"missing verb \(accepted: prepare, "),
        ("trian", r"unknown verb 'trian'; did you mean 'train'\? \(accepted: prepare, .*fetch\)"),
        ("--adress x train", r"Unrecognized options: --adress"),
        ("--address head:8265 list", r"address='head:8265': must be the URL of a dashboard, such"),
        ("train --no-wait", r"--no-wait is a flag of submit; put it before train"),
        ("train --address http://head:8265", r"--address is a flag of submit"),
        ("train --train.epoch 3",
         r"Perhaps you meant: --train\.epochs INT.*run python -m ray_jobs\.submit train --help"),
        ("evaluate --data /d --output /o", r"Required options .* --run TEXT"),
        ("evaluate --run /r --data /d --output /o --address http://head:8265",
         r"address='http://head:8265': a submitted job uses the cluster that it runs on"),
        (f"train {SPEC} --run.storage_path /r --run.address ray://head", r"run\.address='ray://he"),
        (f"train {SPEC}", r"run\.storage_path='runs' is relative, but a submitted job runs in"),
        (f"prepare {SPEC}", r"prepare\.output='runs/houses-prepared' is relative"),
        ("predict --run /r --data /d --output ~/out", r"output='~/out' is relative"),
        ("inspect prepared", r"output='prepared' is relative"),
        ("--env NO_SUCH_THING train --run.storage_path /r", r"env=NO_SUCH_THING is not set in"),
        ("--working_dir nowhere train", r"working_dir='nowhere' is not a folder"),
        ("stop", r"Required options .* ID "),
    ],
)  # fmt: skip
def test_a_usage_error_names_the_problem(capsys, line, message):
    assert re.search(message, usage_error(capsys, submit_job.parse, line.split()))


def test_a_usage_error_exits_with_2_without_a_connection():
    nowhere = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    status, out, err = program("train", "--train.epoch", "3", **nowhere)
    assert (status, out) == (2, "")
    assert "Perhaps you meant: --train.epochs INT" in unframed(err)


def test_a_spec_file_outside_the_uploaded_folder_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("run: {storage_path: /shared/runs}")
    with pytest.raises(UsageError, match=r"own\.yaml is not in /.*, the folder that is uploaded"):
        submit_job.parse(["train", str(tmp_path / "own.yaml")])
    job = submit_job.make_job("train", [str(tmp_path / "own.yaml"), *SHARED], tmp_path)
    assert job.arguments[0] == job.spec_file == "own.yaml"


def test_a_run_without_a_name_is_given_one_so_that_its_summary_can_be_found():
    job = submit_job.make_job("train", [SPEC, *SHARED], ROOT)
    assert job.entrypoint == f"python -m ray_jobs.train {SPEC} {' '.join(SHARED)}"
    assert job.metadata == {"folder": "/shared/runs", "summary": "first/summary.json"}
    assert job.results == "/shared/runs/first"
    quoted = submit_job.make_job("train", [*SHARED[:3], "a b"], ROOT).entrypoint
    assert quoted == "python -m ray_jobs.train --run.storage_path /shared/runs --run.name 'a b'"
    job = submit_job.make_job("tune", ["--run.storage_path", "s3://b/r?region=x"], ROOT)
    *words, flag, name = job.arguments
    assert (words, flag) == (["--run.storage_path", "s3://b/r?region=x"], "--run.name")
    assert job.summary == f"{name}/summary.json"


@pytest.mark.parametrize(
    ("line", "folder", "summary"),
    [
        ("evaluate --run /r --data /d --output /o", "/o", "metrics.json"),
        ("predict --run /r --data /d --output /o", "/o", None),
        ("inspect /p", "/p", None),
        ("doctor --run.storage_path /r --address auto", "/r", None),
        ("prepare --prepare.output gs://b/p", "gs://b/p", None),
    ],
)
def test_the_folder_and_the_summary_of_results_are_known(line, folder, summary):
    verb, *words = line.split()
    job = submit_job.make_job(verb, words, ROOT)
    assert (job.folder, job.results, job.summary) == (folder, folder, summary)
    assert job.arguments == tuple(words)


def test_help_describes_the_given_verb(capsys):
    for line, usage, flag in (
        ("--help", "submit [FLAGS] VERB [ARGUMENTS]", "--submission_id TEXT|none "),
        ("train --help", "submit [FLAGS] train [SPEC.yaml]", "--train.epochs INT "),
    ):
        with pytest.raises(SystemExit, match="0"):
            submit_job.parse(line.split())
        text = capsys.readouterr().out
        assert text.startswith(f"usage: python -m ray_jobs.{usage} [-h]")
        assert flag in text


def test_the_address_is_given_or_from_the_environment_or_local(monkeypatch):
    assert server_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert server_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://b:1/")
    assert server_address(None) == "http://b:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://a:1")
    assert server_address(None) == "https://a:1"
    assert server_address("http://c:1") == "http://c:1"


# -- upload ---------------------------------------------------------------------------------------


def test_runtime_env_yaml_sets_excludes_and_variables_and_secrets_are_not_sent(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    environment = packaging.runtime_env(ROOT, ())
    assert ".venv" in environment["excludes"]
    assert environment["env_vars"]["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.5"
    assert environment["working_dir"] == str(ROOT)
    assert "secret" not in json.dumps(environment)
    named = packaging.runtime_env(ROOT, ["AWS_SECRET_ACCESS_KEY"])
    assert named["env_vars"] == environment["env_vars"] | {"AWS_SECRET_ACCESS_KEY": "secret"}


def test_the_upload_of_this_project_is_complete_and_small():
    environment = packaging.runtime_env(ROOT, ())
    sizes = packaging._upload_sizes(ROOT, environment["excludes"])
    project = [path for name in ("mm_model", "ray_jobs") for path in (ROOT / name).rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in project} < set(sizes)
    assert "ray_jobs/pages/page.css" in sizes
    assert not [name for name in sizes if name.startswith((".git/", ".venv/")) or ".pyc" in name]
    assert sum(sizes.values()) < packaging.MAX_UPLOAD_BYTES / 10


def test_the_upload_limit_is_that_of_ray():
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert packaging.MAX_UPLOAD_BYTES == DASHBOARD_CLIENT_MAX_SIZE


def big(folder: Path) -> None:
    """Make a folder too large, with sparse files that use no disk space."""
    (folder / "photos").mkdir()
    (folder / ".gitignore").write_text("runs/\n")
    for name, size in {"photos/a": 90, "photos/b": 60, "c": 20, "d.yaml": 0}.items():
        with open(folder / name, "wb") as file:
            file.truncate(size * 10**6)


def test_a_folder_that_is_too_large_is_refused_with_its_largest_entries(server, tmp_path):
    big(tmp_path)
    message = (
        r"has 170\.0 MB to upload, and Ray accepts at most 104\.9 MB; exclude .*with `excludes` in "
        r"runtime_env\.yaml or with \.gitignore\. The largest are photos/ \(150\.0 MB\), "
        r"c \(20\.0 MB"
    )
    with pytest.raises(JobError, match=message):
        run(server, "--working-dir", str(tmp_path), "train", *SHARED)
    assert (server.uploads, server.submitted) == (0, [])
    packaging.require_uploadable({"working_dir": str(tmp_path), "excludes": ["photos/a"]})


def test_an_excluded_spec_file_is_refused(tmp_path):
    big(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "best.yaml").touch()
    environment: dict[str, Any] = {"working_dir": str(tmp_path), "excludes": ["photos"]}
    packaging.require_uploadable(environment, "d.yaml")
    with pytest.raises(JobError, match=r"runs/best\.yaml is not uploaded with the job"):
        packaging.require_uploadable(environment, "runs/best.yaml")


# -- authentication -------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HOME"])
def test_a_token_is_found_in_each_place_where_ray_looks(tmp_path, monkeypatch, variable):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    file = tmp_path / (".ray/auth_token" if variable == "HOME" else "token")
    file.write_text("right")
    monkeypatch.setenv(variable, str(tmp_path if variable == "HOME" else file))
    enable_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_missing_token_file_is_an_error(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/token")
    with pytest.raises(JobError, match=r"\$RAY_AUTH_TOKEN_PATH=/no/token is not a file; it must"):
        enable_token()


@pytest.fixture
def guarded() -> Iterator[JobServer]:
    with JobServer(token="right") as started:
        started.add("one", "RUNNING")
        yield started


def test_a_token_in_the_home_directory_is_sent(guarded, tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("right")
    ended = program("--address", guarded.address, "status", "one", HOME=str(tmp_path))
    assert ended == (0, "RUNNING\n", "")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"},
         "URL denied access: the token in $RAY_AUTH_TOKEN is not the cluster's, which `ray "
         "get-auth-token` prints on its head; set $RAY_AUTH_TOKEN to the cluster's token, or "
         "$RAY_AUTH_TOKEN_PATH to a file that contains it"),
        ({}, "URL denied access: it requires a token, and none was found; set $RAY_AUTH_TOKEN to "
         "the cluster's token, or $RAY_AUTH_TOKEN_PATH to a file that contains it"),
        ({"RAY_AUTH_TOKEN": "right", "RAY_AUTH_MODE": "disabled"},
         "URL denied access: it requires a token, but RAY_AUTH_MODE=disabled ignores "
         "$RAY_AUTH_TOKEN; unset it"),
    ],
)  # fmt: skip
def test_denied_access_is_one_line_with_a_remedy(guarded, tmp_path, variables, message):
    address = ("--address", guarded.address)
    status, out, err = program(*address, "list", HOME=str(tmp_path), **variables)
    assert (status, out) == (1, "")
    assert err == f"error: {message}\n".replace("URL", guarded.address)
