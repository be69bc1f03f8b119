"""What is sent to a cluster, what is refused before, and what comes back."""

import gc
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_jobs import submit
from ray_jobs.cli import JobError, UsageError
from ray_jobs.submission import follow, sent, show
from ray_jobs.submission.server import server_address
from tests.ray_jobs.job_server import JobServer
from tests.ray_jobs.submitting import outcome, start

pytestmark = [
    # Ray's own client gives aiohttp no context where it wants the usual one,
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
    # and leaves it to the collector to close a connection that it is told to leave.
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
]

ROOT = Path(__file__).parents[2]
SPEC = "ray_jobs/specs/houses.yaml"
SHARED = ("--run.storage_path", "/shared/runs", "--run.name", "first")
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
NOBODY = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> Iterator[None]:
    """The variables that tests set, and what the client sets, end with the test."""
    monkeypatch.chdir(ROOT)
    before = dict(os.environ)
    for name in ADDRESSES:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def server() -> Iterator[JobServer]:
    with JobServer() as started:
        yield started


def run(server: JobServer, *arguments: str) -> int:
    return submit.command(["--address", server.address, *arguments])()


def program(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr."""
    return outcome(arguments, ROOT, without_ray() | variables)


def without_ray() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


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
    assert submit.split(line) == (flags, "train", rest)


def test_a_line_of_flags_alone_has_no_verb():
    assert submit.split(["--address"]) == (["--address"], "", [])
    with pytest.raises(UsageError, match="the verb is missing"):
        submit.command([])


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
        submit.command(line.split())


def test_a_specification_elsewhere_does_not_go_along(tmp_path):
    (tmp_path / "own.yaml").write_text("run: {storage_path: /shared/runs}")
    with pytest.raises(UsageError, match=r"own\.yaml is not in /.*, which goes along with the job"):
        submit.command(["train", str(tmp_path / "own.yaml")])
    job = submit.checked("train", [str(tmp_path / "own.yaml"), *SHARED], tmp_path)
    assert job.arguments[0] == job.spec == "own.yaml"


def test_a_job_has_a_name_so_that_its_summary_is_found():
    job = submit.checked("train", [SPEC, *SHARED], ROOT)
    assert job.entrypoint == f"python -m ray_jobs.train {SPEC} {' '.join(SHARED)}"
    assert job.metadata == {"folder": "/shared/runs", "summary": "first/summary.json"}
    assert job.results == "/shared/runs/first"
    job = submit.checked("tune", ["--run.storage_path", "s3://b/r?region=x"], ROOT)
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
    job = submit.checked(verb, words, ROOT)
    assert (job.folder, job.results, job.summary) == (folder, folder, summary)
    assert job.arguments == tuple(words)


def test_words_with_blanks_come_to_the_job_as_they_are():
    words = ["--run.storage_path", "/shared/my runs", "--run.name", "a b"]
    assert submit.checked("train", words, ROOT).entrypoint == (
        "python -m ray_jobs.train --run.storage_path '/shared/my runs' --run.name 'a b'"
    )


def test_help_is_of_submit_or_of_the_verb():
    assert submit.help_text(["--help"]).startswith("usage: python -m ray_jobs.submit [--key value")
    assert "--submission_id TEXT|none  (default none)" in submit.help_text(["--help"])
    of_train = submit.help_text(["train", "--help"])
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
    environment = sent.runtime_env(ROOT, ())
    assert ".venv" in environment["excludes"]
    assert environment["env_vars"]["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.5"
    assert environment["working_dir"] == str(ROOT)
    assert "secret" not in json.dumps(environment)
    named = sent.runtime_env(ROOT, ["AWS_SECRET_ACCESS_KEY"])
    assert named["env_vars"] == environment["env_vars"] | {"AWS_SECRET_ACCESS_KEY": "secret"}


def test_this_project_is_small_and_goes_whole():
    environment = sent.runtime_env(ROOT, ())
    sizes = sent._sent_bytes(ROOT, environment["excludes"])
    assert {"ray_jobs/train.py", "mm_model/model.py", "ray_jobs/inspection/page.css"} < set(sizes)
    assert not [name for name in sizes if name.startswith((".git/", ".venv/")) or ".pyc" in name]
    assert sum(sizes.values()) < sent.MOST_BYTES / 10


def test_the_limit_is_rays():
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert sent.MOST_BYTES == DASHBOARD_CLIENT_MAX_SIZE


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
        sent.require_sendable(environment)
    sent.require_sendable(environment | {"excludes": ["photos/a"]})


def test_a_specification_that_is_left_out_is_refused(tmp_path):
    big(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "best.yaml").touch()
    environment: dict[str, Any] = {"working_dir": str(tmp_path), "excludes": ["photos"]}
    sent.require_sendable(environment, "d.yaml")
    with pytest.raises(JobError, match=r"runs/best\.yaml does not go with the job: runtime_env"):
        sent.require_sendable(environment, "runs/best.yaml")


def test_nothing_is_sent_of_what_is_too_large(server, tmp_path):
    big(tmp_path)
    with pytest.raises(JobError, match="Ray takes"):
        run(server, "--working-dir", str(tmp_path), "train", *SHARED)
    assert (server.uploads, server.sent) == (0, [])


# -- what comes back ------------------------------------------------------------------------------


def test_a_job_is_sent_followed_and_summed_up(server, capsys, monkeypatch):
    monkeypatch.setenv("KEY", "value")
    server.log_of_sent = 'epoch 1\ncontent: {"best_epoch": 1}\n'
    assert run(server, "--env", "KEY", "train", SPEC, *SHARED) == 0
    train, reader = server.sent
    assert train["entrypoint"] == f"python -m ray_jobs.train {SPEC} {' '.join(SHARED)}"
    assert train["runtime_env"]["working_dir"].startswith("gcs://_ray_pkg_")
    assert train["runtime_env"]["env_vars"]["KEY"] == "value"
    assert not [name for name in train if name.startswith("entrypoint_")]
    assert reader["entrypoint"].endswith("submission.show /shared/runs first/summary.json")
    assert reader["runtime_env"] == train["runtime_env"]
    assert set(server.jobs) == {"sent_1"}
    output = capsys.readouterr()
    assert output.out == server.log_of_sent + '{\n  "best_epoch": 1\n}\n'
    assert output.err == (
        "job sent_1: train → /shared/runs/first\n"
        f"  dashboard: {server.address}/#/jobs/sent_1\n"
        "job sent_1 succeeded\n"
    )


def test_a_job_that_succeeded_has_done_so_even_where_its_summary_cannot_be_read(server, capsys):
    server.log_of_sent = "error: no such file\n"
    assert run(server, "train", *SHARED) == 0
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "/shared/runs/first/summary.json cannot be read there: error: no such file",
        f"  again: python -m ray_jobs.submit --address {server.address} fetch sent_1",
    ]


def test_without_waiting_the_id_alone_is_on_stdout(server, capsys):
    assert run(server, "--no-wait", "--submission-id", "mine", "inspect", "/p") == 0
    output = capsys.readouterr()
    assert output.out == "mine\n"
    assert output.err.startswith("job mine: inspect → /p\n  dashboard: http://127.0.0.1:")
    with pytest.raises(JobError, match=r"refuses: ValueError: Job mine already exists\."):
        run(server, "--no-wait", "--submission-id", "mine", "inspect", "/p")


@pytest.mark.parametrize(
    ("details", "status", "last"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0, "job one succeeded\n"),
        ({"status": "FAILED", "driver_exit_code": 2}, 2,
         "error: job one failed with exit status 2\n"),
        ({"status": "FAILED", "driver_exit_code": -9}, 137,
         "error: job one failed with exit status 137\n"),
        ({"status": "FAILED", "message": "no node for it"}, 1,
         "no node for it\nerror: job one failed\n"),
        ({"status": "STOPPED"}, 130, "error: job one was stopped\n"),
    ],
)  # fmt: skip
def test_the_exit_status_is_the_jobs(server, capsys, details, status, last):
    server.add("one", log="epoch 1\nerror: its first error\n", **details)
    assert run(server, "logs", "one") == status
    output = capsys.readouterr()
    assert output.out == "epoch 1\nerror: its first error\n"
    assert output.err == last


def test_what_ray_misses_of_a_log_is_shown_when_the_job_has_ended(server, capsys):
    server.add("one", "RUNNING", log="epoch 1\nepoch 2\nerror: its first error\n")
    server.tails["one"] = [("epoch 1\n", False)]
    server.on_tail = lambda job: server.jobs[job].update(status="FAILED", driver_exit_code=1)
    assert run(server, "logs", "one") == 1
    assert capsys.readouterr().out == server.logs["one"]


def test_a_connection_that_breaks_is_made_anew_and_shows_nothing_twice(server, capsys, monkeypatch):
    monkeypatch.setattr(follow, "_RETRY_S", 0.01)
    server.add("one", "RUNNING", log="epoch 1\nepoch 2\nepoch 3\n")
    server.tails["one"] = [
        ("epoch 1\n", True),
        ("epoch 1\nepoch 2\n", True),
        ("epoch 1\nepoch 2\nepoch 3\n", False),
    ]

    def on_tail(job: str) -> None:
        server.broken = 3
        if not server.tails[job]:
            server.jobs[job]["status"] = "SUCCEEDED"

    server.on_tail = on_tail
    # What breaks is the connection of the log, then some answers to how the job fares.
    assert run(server, "logs", "one") == 0
    assert capsys.readouterr().out == server.logs["one"]


def test_a_cluster_that_is_lost_ends_the_following(server, monkeypatch):
    monkeypatch.setattr(follow, "_RETRY_S", 0.01)
    monkeypatch.setattr(follow, "_GIVE_UP_S", 0.1)
    server.add("one", "RUNNING")
    server.tails["one"] = [("", True)]

    def on_tail(job: str) -> None:
        server.broken = 10**6

    server.on_tail = on_tail
    message = (
        r"(?s)refuses: .*503: No head yet.*Perhaps job one goes on.*follow it again: .* logs one"
    )
    with pytest.raises(JobError, match=message):
        run(server, "logs", "one")


def test_a_connection_that_was_good_for_long_is_made_anew(server, capsys, monkeypatch):
    monkeypatch.setattr(follow, "_RETRY_S", 0.01)
    monkeypatch.setattr(follow, "_GIVE_UP_S", 0.5)
    server.add("one", "RUNNING", log="epoch 1\n")
    server.tails["one"] = [("epoch 1\n", False)]

    def on_tail(job: str) -> None:
        time.sleep(1)  # longer than the cluster may be lost
        server.broken = 2
        server.jobs[job]["status"] = "SUCCEEDED"

    server.on_tail = on_tail
    assert run(server, "logs", "one") == 0
    assert capsys.readouterr().out == "epoch 1\n"


def test_a_server_that_takes_a_connection_and_is_silent_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("ray_jobs.submission.server._SILENT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(JobError, match=r"does not answer as Ray does: .*[Tt]imed out"):
            submit.command(["--address", address, "list"])()


def test_silence_is_asked_about(server, capsys, monkeypatch):
    monkeypatch.setattr(follow, "_SILENCE_S", 0.2)
    server.add("one", "RUNNING", log="epoch 1\n")
    server.tails["one"] = [("epoch 1\n", False)]
    server.silent_s = 30.0
    server.on_tail = lambda job: server.jobs[job].update(status="SUCCEEDED")
    assert run(server, "logs", "one") == 0
    assert capsys.readouterr().out == "epoch 1\n"
    gc.collect()


def test_jobs_are_listed_the_newest_at_the_end(server, capsys):
    long = "--run.storage_path s3://bucket/" + 200 * "x"
    entry = f"python -m ray_jobs.train {long}"
    server.add("two", "RUNNING", start_time=2_000_000, entrypoint=entry)
    server.add("one", "FAILED", start_time=1_000_000, end_time=4_725_000, entrypoint="echo [x]")
    server.jobs["a driver"] = {"type": "DRIVER", "status": "RUNNING", "entrypoint": "python"}
    assert run(server, "list") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = [re.split(" *│ *", line)[1:-1] for line in lines]
    assert [row[:2] for row in rows] == [["one", "FAILED"], ["two", "RUNNING"]]
    assert rows[0][3:] == ["1:02:05", "echo [x]"]
    assert rows[1][4] == f"train {long}"


def test_a_job_is_stopped_and_asked_how_it_fares(server, capsys):
    server.add("one", "RUNNING")
    assert run(server, "status", "one") == 0
    assert run(server, "stop", "one") == 0
    assert run(server, "status", "one", "--address", server.address) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("RUNNING\nSTOPPED\n", "job one: STOPPED\n")


@pytest.mark.parametrize("verb", ["status", "stop", "logs", "fetch"])
def test_a_job_that_is_not_there_is_an_error_with_a_remedy(server, verb):
    message = r"knows no job 'nine'; `python -m ray_jobs\.submit --address \S+ list` shows those"
    with pytest.raises(JobError, match=message):
        run(server, verb, "nine")


def test_only_a_success_has_a_summary(server):
    server.add("one", "FAILED", metadata={"folder": "/f", "summary": "summary.json"})
    server.add("two", "SUCCEEDED", metadata={"folder": "/f"})
    with pytest.raises(JobError, match="job one is FAILED; a summary comes with success"):
        run(server, "fetch", "one")
    with pytest.raises(JobError, match=r"job two leaves no summary \(python -m ray_jobs\.train\)"):
        run(server, "fetch", "two")


def test_a_file_comes_back_through_a_log(tmp_path, capsys, monkeypatch):
    (tmp_path / "summary.json").write_text('{"name": "größer", "epochs": 3}')
    monkeypatch.setattr(sys, "argv", ["show", str(tmp_path), "summary.json"])
    show.main()
    log = f"content: of another kind\n{capsys.readouterr().out}a warning\n"
    assert show.shown_in(log) == {"name": "größer", "epochs": 3}
    assert show.shown_in("no line of it") is None


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


def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(server):
    server.add("one", "RUNNING")
    server.tails["one"] = [("epoch 1\n", False)]
    server.silent_s = 30
    with start(("--address", server.address, "logs", "one"), ROOT, without_ray()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "epoch 1\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    command = f"python -m ray_jobs.submit --address {server.address}"
    assert process.returncode == 130
    assert err == (
        "error: job one goes on without this terminal\n"
        f"  follow it again: {command} logs one\n"
        f"  stop it: {command} stop one\n"
    )
    assert server.jobs["one"]["status"] == "RUNNING"


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
