"""What is sent to a cluster, what is refused before, and who is let in."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.cluster import packaging
from ray_jobs.config.errors import JobError, UsageError
from ray_jobs.submit import job as submit_job
from ray_jobs.submit.client import server_address
from tests.ray_jobs.submit.job_server import JobServer
from tests.ray_jobs.submit.submitting import OF_THE_CLIENT, ROOT, SHARED, SPEC, program, run

pytestmark = OF_THE_CLIENT
NOBODY = "http://127.0.0.1:1"


# -- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "flags", "rest"),
    [
        (["train", "a.yaml", "--train.epochs", "3"], [], ["a.yaml", "--train.epochs", "3"]),
        (["--address", "train", "train"], ["--address", "train"], []),
        (["--address=x", "--no-wait", "train"], ["--address=x", "--wait=false"], []),
        (["--working-dir", "a-b", "train", "--no-wait"], ["--working_dir", "a-b"], ["--no-wait"]),
    ],
)
def test_own_flags_end_at_the_verb(line, flags, rest):
    assert submit_job.split(line) == (flags, "train", rest)


def test_a_line_of_flags_alone_has_no_verb():
    assert submit_job.split(["--address"]) == (["--address"], "", [])
    with pytest.raises(UsageError, match="the verb is missing"):
        submit_job.command([])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", r"'trian' is no verb; did you mean 'train'\? \(accepted: prepare, .*fetch\)"),
        ("--adress x train", r"--adress is no flag; did you mean 'address'\?"),
        ("--address head:8265 list", r"address='head:8265': is the URL of a dashboard, such as"),
        ("train --no-wait", r"--no-wait is submit's own flag; put it before train"),
        ("train --address http://head:8265", r"--address is submit's own flag"),
        ("train --train.epoch 3", r"--train\.epoch is no flag; did you mean 'train\.epochs'"),
        ("train --train.epochs 0", r"train\.epochs='0': "),
        ("evaluate --data /d --output /o", r"run: is required; give it as --run"),
        ("evaluate --run /r --data /d --output /o --address http://head:8265",
         r"address='http://head:8265': a job uses the cluster that it is sent to, which --address"),
        ("doctor --address http://head:8265", r"address='http://head:8265': a job uses"),
        (f"train {SPEC} --run.storage_path /r --run.address ray://head", r"run\.address='ray://he"),
        (f"train {SPEC}", r"run\.storage_path='runs' is relative, and a job works in a copy of"),
        (f"prepare {SPEC}", r"prepare\.output='runs/houses-prepared' is relative"),
        ("predict --run /r --data /d --output ~/out", r"output='~/out' is relative"),
        ("inspect prepared", r"output='prepared' is relative"),
        ("--env NO_SUCH_THING train --run.storage_path /r", r"env: NO_SUCH_THING not set here"),
        ("--working_dir nowhere train", r"working_dir='nowhere' is no folder"),
        ("stop", r"id: is required; give it as ID or --id"),
        ("stop one two", r"unexpected argument 'two'"),
        ("demo", r"'demo' is no verb"),
    ],
)  # fmt: skip
def test_wrong_usage_says_what_is_wrong(line, message):
    with pytest.raises(UsageError, match=message):
        submit_job.command(line.split())


def test_a_specification_elsewhere_does_not_go_along(tmp_path):
    (tmp_path / "own.yaml").write_text("run: {storage_path: /shared/runs}")
    with pytest.raises(UsageError, match=r"own\.yaml is not in /.*, which goes along with the job"):
        submit_job.command(["train", str(tmp_path / "own.yaml")])
    job = submit_job.checked("train", [str(tmp_path / "own.yaml"), *SHARED], tmp_path)
    assert job.arguments[0] == job.spec == "own.yaml"


def test_a_job_has_a_name_so_that_its_summary_is_found():
    job = submit_job.checked("train", [SPEC, *SHARED], ROOT)
    assert job.entrypoint == f"python -m ray_jobs.train {SPEC} {' '.join(SHARED)}"
    assert job.metadata == {"folder": "/shared/runs", "summary": "first/summary.json"}
    assert job.results == "/shared/runs/first"
    job = submit_job.checked("tune", ["--run.storage_path", "s3://b/r?region=x"], ROOT)
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
def test_where_results_go(line, folder, summary):
    verb, *words = line.split()
    job = submit_job.checked(verb, words, ROOT)
    assert (job.folder, job.results, job.summary) == (folder, folder, summary)
    assert job.arguments == tuple(words)


def test_words_with_blanks_come_to_the_job_as_they_are():
    words = ["--run.storage_path", "/shared/my runs", "--run.name", "a b"]
    assert submit_job.checked("train", words, ROOT).entrypoint == (
        "python -m ray_jobs.train --run.storage_path '/shared/my runs' --run.name 'a b'"
    )


def test_help_is_of_submit_or_of_the_verb():
    assert submit_job.help_text(["--help"]).startswith(
        "usage: python -m ray_jobs.submit [--key value"
    )
    assert "--submission_id TEXT|none  (default none)" in submit_job.help_text(["--help"])
    of_train = submit_job.help_text(["train", "--help"])
    assert of_train.startswith("usage: python -m ray_jobs.submit [FLAGS] train [SPEC.yaml]")
    assert "--train.epochs INT" in of_train


def test_the_address_is_the_given_one_then_the_environments_then_here(monkeypatch):
    assert server_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert server_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://b:1/")
    assert server_address(None) == "http://b:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://a:1")
    assert server_address(None) == "https://a:1"
    assert server_address("http://c:1") == "http://c:1"


# -- what goes along ------------------------------------------------------------------------------


def test_excludes_and_variables_come_from_runtime_env_yaml_and_no_secret_goes_along(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    environment = packaging.runtime_env(ROOT, ())
    assert ".venv" in environment["excludes"]
    assert environment["env_vars"]["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.5"
    assert environment["working_dir"] == str(ROOT)
    assert "secret" not in json.dumps(environment)
    named = packaging.runtime_env(ROOT, ["AWS_SECRET_ACCESS_KEY"])
    assert named["env_vars"] == environment["env_vars"] | {"AWS_SECRET_ACCESS_KEY": "secret"}


def test_this_project_is_small_and_goes_whole():
    environment = packaging.runtime_env(ROOT, ())
    sizes = packaging._sent_bytes(ROOT, environment["excludes"])
    assert {"ray_jobs/train/job.py", "mm_model/model.py", "ray_jobs/pages/page.css"} < set(sizes)
    assert not [name for name in sizes if name.startswith((".git/", ".venv/")) or ".pyc" in name]
    assert sum(sizes.values()) < packaging.MOST_BYTES / 10


def test_the_limit_is_rays():
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert packaging.MOST_BYTES == DASHBOARD_CLIENT_MAX_SIZE


def big(folder: Path) -> None:
    """Make a folder too large by files that take no room on the disk."""
    (folder / "photos").mkdir()
    (folder / ".gitignore").write_text("runs/\n")
    for name, size in {"photos/a": 90, "photos/b": 60, "c": 20, "d.yaml": 0}.items():
        with open(folder / name, "wb") as file:
            file.truncate(size * 10**6)


def test_a_folder_that_is_too_large_is_refused_and_its_largest_entries_are_named(tmp_path):
    big(tmp_path)
    environment: dict[str, Any] = {"working_dir": str(tmp_path)}
    message = (
        r"holds 170\.0 MB to send, and Ray takes 104\.9 MB; leave out .*by `excludes` in "
        r"runtime_env\.yaml or by \.gitignore. The largest are photos/ \(150\.0 MB\), c \(20\.0 MB"
    )
    with pytest.raises(JobError, match=message):
        packaging.require_sendable(environment)
    packaging.require_sendable(environment | {"excludes": ["photos/a"]})


def test_a_specification_that_is_left_out_is_refused(tmp_path):
    big(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "best.yaml").touch()
    environment: dict[str, Any] = {"working_dir": str(tmp_path), "excludes": ["photos"]}
    packaging.require_sendable(environment, "d.yaml")
    with pytest.raises(JobError, match=r"runs/best\.yaml does not go with the job: runtime_env"):
        packaging.require_sendable(environment, "runs/best.yaml")


def test_nothing_is_sent_of_what_is_too_large(server, tmp_path):
    big(tmp_path)
    with pytest.raises(JobError, match="Ray takes"):
        run(server, "--working-dir", str(tmp_path), "train", *SHARED)
    assert (server.uploads, server.sent) == (0, [])


# -- the program ----------------------------------------------------------------------------------


def test_no_server_is_one_line_with_a_remedy_and_exit_status_1():
    status, out, err = program("list", RAY_API_SERVER_ADDRESS=NOBODY)
    assert (status, out) == (1, "")
    assert err.startswith(f"error: no Ray dashboard answers at {NOBODY}; name it by --address or ")
    assert err.count("\n") == 1


def test_wrong_usage_exits_with_2_and_asks_nobody():
    status, out, err = program("train", "--train.epoch", "3", RAY_API_SERVER_ADDRESS=NOBODY)
    assert (status, out) == (2, "")
    assert err.startswith("error: --train.epoch is no flag; did you mean 'train.epochs'?")
    assert err.endswith("\nSee python -m ray_jobs.submit --help.\n")


@pytest.fixture
def guarded() -> Iterator[JobServer]:
    with JobServer(token="right") as started:
        started.add("one", "RUNNING")
        yield started


@pytest.mark.parametrize("where", ["variable", "path", "home"])
def test_a_token_is_taken_from_where_ray_looks_for_one(guarded, tmp_path, where):
    (tmp_path / ".ray").mkdir()
    file = tmp_path / (".ray/auth_token" if where == "home" else "token")
    file.write_text("right")
    variables = {
        "variable": {"RAY_AUTH_TOKEN": "right", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "nothing")},
        "path": {"RAY_AUTH_TOKEN_PATH": str(file)},
        "home": {},
    }
    words = ("--address", guarded.address, "status", "one")
    ended = program(*words, HOME=str(tmp_path), **variables[where])
    assert ended == (0, "RUNNING\n", "")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"},
         "URL does not let us in: the token in $RAY_AUTH_TOKEN is not the cluster's (there `ray "
         "get-auth-token` shows it); set $RAY_AUTH_TOKEN to the cluster's, or $RAY_AUTH_TOKEN_PATH "
         "to a file with it"),
        ({}, "URL does not let us in: it wants a token, and there is none here; set $RAY_AUTH_TOKEN"
         " to the cluster's, or $RAY_AUTH_TOKEN_PATH to a file with it"),
        ({"RAY_AUTH_TOKEN": "right", "RAY_AUTH_MODE": "disabled"},
         "URL does not let us in: it wants a token, and RAY_AUTH_MODE=disabled keeps that in "
         "$RAY_AUTH_TOKEN back; unset it"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/token"},
         "$RAY_AUTH_TOKEN_PATH=/no/token is no file; it should hold the cluster's token"),
    ],
)  # fmt: skip
def test_who_is_not_let_in_is_told_in_one_line_what_to_do(guarded, tmp_path, variables, message):
    address = ("--address", guarded.address)
    status, out, err = program(*address, "list", HOME=str(tmp_path), **variables)
    assert (status, out) == (1, "")
    assert err == f"error: {message}\n".replace("URL", guarded.address)
