"""What comes back of a job: its log, how it ended, its summary, and what the cluster says of it."""

import gc
import re
import signal
import socket
import sys
import time

import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.submit import job as submit_job
from ray_jobs.submit import logs, summary
from tests.ray_jobs.submit.submitting import (
    OF_THE_CLIENT,
    ROOT,
    SHARED,
    SPEC,
    run,
    start,
    without_ray,
)

pytestmark = OF_THE_CLIENT


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
    monkeypatch.setattr(logs, "_RETRY_S", 0.01)
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
    monkeypatch.setattr(logs, "_RETRY_S", 0.01)
    monkeypatch.setattr(logs, "_GIVE_UP_S", 0.1)
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
    monkeypatch.setattr(logs, "_RETRY_S", 0.01)
    monkeypatch.setattr(logs, "_GIVE_UP_S", 0.5)
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
    monkeypatch.setattr("ray_jobs.submit.client._SILENT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(JobError, match=r"does not answer as Ray does: .*[Tt]imed out"):
            submit_job.command(["--address", address, "list"])()


def test_silence_is_asked_about(server, capsys, monkeypatch):
    monkeypatch.setattr(logs, "_SILENCE_S", 0.2)
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
    summary.main()
    log = f"content: of another kind\n{capsys.readouterr().out}a warning\n"
    assert summary.shown_in(log) == {"name": "größer", "epochs": 3}
    assert summary.shown_in("no line of it") is None


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
