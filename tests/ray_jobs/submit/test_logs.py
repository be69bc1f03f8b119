"""Following jobs: log, exit status and summary; and listing and stopping them."""

import gc
import re
import signal
import socket
import sys

import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.submit import job as submit_job
from ray_jobs.submit import logs, summary
from tests.ray_jobs.submit.submitting import (
    IGNORED_WARNINGS,
    ROOT,
    SHARED,
    SPEC,
    run,
    start,
    without_ray,
)

pytestmark = IGNORED_WARNINGS


class Clock:
    """Time that passes only while the client waits for its next request."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


def test_submit_follows_the_job_and_prints_its_summary(server, capsys, monkeypatch):
    monkeypatch.setenv("KEY", "value")
    server.log_of_submitted = 'epoch 1\ncontent: {"best_epoch": 1}\n'
    assert run(server, "--env", "KEY", "train", SPEC, *SHARED) == 0
    train, reader = server.submitted
    assert train["entrypoint"] == f"python -m ray_jobs.train {SPEC} {' '.join(SHARED)}"
    assert train["runtime_env"]["working_dir"].startswith("gcs://_ray_pkg_")
    assert train["runtime_env"]["env_vars"]["KEY"] == "value"
    assert not [name for name in train if name.startswith("entrypoint_")]
    assert reader["entrypoint"].endswith("submit.summary /shared/runs first/summary.json")
    assert reader["runtime_env"] == train["runtime_env"]
    assert set(server.jobs) == {"job_1"}
    output = capsys.readouterr()
    assert output.out == server.log_of_submitted + '{\n  "best_epoch": 1\n}\n'
    assert output.err == (
        "job job_1: train → /shared/runs/first\n"
        f"  dashboard: {server.address}/#/jobs/job_1\n"
        "job job_1 succeeded\n"
    )


def test_an_unreadable_summary_does_not_change_the_exit_status_of_a_successful_job(server, capsys):
    server.log_of_submitted = "error: no such file\n"
    assert run(server, "train", *SHARED) == 0
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "the cluster could not read /shared/runs/first/summary.json: error: no such file",
        f"  try again: python -m ray_jobs.submit --address {server.address} fetch job_1",
    ]


def test_no_wait_prints_only_the_job_id_to_stdout(server, capsys):
    assert run(server, "--no-wait", "--submission-id", "mine", "inspect", "/p") == 0
    output = capsys.readouterr()
    assert output.out == "mine\n"
    assert output.err.startswith("job mine: inspect → /p\n  dashboard: http://127.0.0.1:")
    with pytest.raises(JobError, match=r"failed: ValueError: Job mine already exists\."):
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
def test_the_exit_status_is_that_of_the_job(server, capsys, details, status, last):
    server.add("one", log="epoch 1\nerror: its first error\n", **details)
    assert run(server, "logs", "one") == status
    output = capsys.readouterr()
    assert output.out == "epoch 1\nerror: its first error\n"
    assert output.err == last


def test_the_end_of_a_log_that_ray_omits_is_printed_after_the_job_has_ended(server, capsys):
    server.add("one", "RUNNING", log="epoch 1\nepoch 2\nerror: its first error\n")
    server.tails["one"] = [("epoch 1\n", False)]
    server.on_tail = lambda job: server.jobs[job].update(status="FAILED", driver_exit_code=1)
    assert run(server, "logs", "one") == 1
    assert capsys.readouterr().out == server.logs["one"]


def test_a_broken_connection_is_reopened_without_printing_anything_twice(server, capsys, clock):
    server.add("one", "RUNNING", log="epoch 1\nepoch 2\nepoch 3\n")
    server.tails["one"] = [
        ("epoch 1\n", True),
        ("epoch 1\nepoch 2\n", True),
        ("epoch 1\nepoch 2\nepoch 3\n", False),
    ]

    def on_tail(job: str) -> None:
        # The time limit for a lost cluster starts at the first failed request after this.
        clock.now += 2 * logs._GIVE_UP_S
        server.broken = 3
        if not server.tails[job]:
            server.jobs[job]["status"] = "SUCCEEDED"

    server.on_tail = on_tail
    # First the log connection breaks, then some status requests fail.
    assert run(server, "logs", "one") == 0
    assert capsys.readouterr().out == server.logs["one"]


def test_following_ends_if_the_cluster_is_lost(server, monkeypatch):
    monkeypatch.setattr(logs, "_GIVE_UP_S", 10.0)
    server.add("one", "RUNNING")
    server.tails["one"] = [("", True)]
    server.on_tail = lambda job: setattr(server, "broken", 10**6)
    message = (
        r"(?s)failed: .*503: No head yet.*If the cluster is alive, job one continues.* logs one"
    )
    with pytest.raises(JobError, match=message):
        run(server, "logs", "one")


def test_a_missing_or_silent_server_is_an_error_with_a_remedy(monkeypatch):
    nowhere = "http://127.0.0.1:1"
    message = f"could not connect to a Ray dashboard at {nowhere}; set --address or RAY_API_SERVER"
    with pytest.raises(JobError, match=message):
        submit_job.parse(["--address", nowhere, "list"])()
    monkeypatch.setattr("ray_jobs.submit.client._REQUEST_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(JobError, match=r"request to http://\S+ failed: .*[Tt]imed out"):
            submit_job.parse(["--address", address, "list"])()


def test_a_silent_log_connection_is_replaced(server, capsys, monkeypatch):
    monkeypatch.setattr(logs, "_SILENCE_S", 0.2)
    server.add("one", "RUNNING", log="epoch 1\n")
    server.tails["one"] = [("epoch 1\n", False)]
    server.silent_s = 30.0
    server.on_tail = lambda job: server.jobs[job].update(status="SUCCEEDED")
    assert run(server, "logs", "one") == 0
    assert capsys.readouterr().out == "epoch 1\n"
    gc.collect()


def test_jobs_are_listed_with_the_newest_last(server, capsys):
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


def test_stop_and_status_print_the_status_of_a_job(server, capsys):
    server.add("one", "RUNNING")
    assert run(server, "status", "one") == 0
    assert run(server, "stop", "one") == 0
    assert run(server, "status", "one", "--address", server.address) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("RUNNING\nSTOPPED\n", "job one: STOPPED\n")


def test_an_unknown_job_is_an_error_with_a_remedy(server):
    message = r"no job 'nine' at \S+; `python -m ray_jobs\.submit --address \S+ list` "
    for verb in ("status", "stop", "logs", "fetch"):
        with pytest.raises(JobError, match=message):
            run(server, verb, "nine")


def test_only_a_successful_job_has_a_summary(server):
    server.add("one", "FAILED", metadata={"folder": "/f", "summary": "summary.json"})
    server.add("two", "SUCCEEDED", metadata={"folder": "/f"})
    with pytest.raises(JobError, match="job one is FAILED; only a successful job has a summary"):
        run(server, "fetch", "one")
    with pytest.raises(JobError, match=r"job two writes no summary \(python -m ray_jobs\.train\)"):
        run(server, "fetch", "two")


def test_a_summary_is_read_from_the_log_of_its_reader(tmp_path, capsys, monkeypatch):
    (tmp_path / "summary.json").write_text('{"name": "größer", "epochs": 3}')
    monkeypatch.setattr(sys, "argv", ["summary", str(tmp_path), "summary.json"])
    summary.main()
    log = f"content: of another kind\n{capsys.readouterr().out}a warning\n"
    assert summary.parse_log(log) == {"name": "größer", "epochs": 3}
    assert summary.parse_log("no line of it") is None


def test_ctrl_c_leaves_the_job_running_and_prints_how_to_follow_it_again(server):
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
        "error: job one continues without this terminal\n"
        f"  follow it again: {command} logs one\n"
        f"  stop it: {command} stop one\n"
    )
    assert server.jobs["one"]["status"] == "RUNNING"
