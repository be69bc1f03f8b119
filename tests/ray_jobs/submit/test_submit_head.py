"""Jobs that a real head runs from a clean working directory, and what remains of them."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.ray_jobs.raw import Raw
from tests.ray_jobs.scenarios import PLAIN
from tests.ray_jobs.submit.submitting import run_program, start
from tests.ray_jobs.tiny import write_prepared
from tests.ray_jobs.trained import damage_image

pytestmark = [pytest.mark.slow, pytest.mark.multiworker]

ROOT = Path(__file__).parents[3]
TRAIN = {"num_workers": 2, "global_batch_size": 8, "epochs": 2}
REMAINS = """
import json
from ray.util.state import list_actors, list_placement_groups
# Ray keeps one of each per cluster, without a CPU, after the first job that reads data.
permanent = ("_StatsActor", "ActorLocationTracker", "_AutoscalingCoordinatorActor")
actors = [actor.class_name for actor in list_actors(limit=1000) if actor.state != "DEAD"]
print(json.dumps({
    "actors": [name for name in actors if name not in permanent],
    "groups": [g.placement_group_id for g in list_placement_groups() if g.state != "REMOVED"],
}))
"""


class Client:
    """A user with a clean copy of the project and a cluster."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def write(self, name: str, tree: dict[str, Any]) -> str:
        (self.folder / name).write_text(yaml.safe_dump(tree))
        return name

    def run(self, *arguments: str, **variables: str) -> tuple[int, str, str]:
        """Return exit status, stdout and stderr."""
        return run_program(arguments, self.folder, self.environment | variables)

    def succeed(self, *arguments: str) -> str:
        """Return the output of a job that must succeed."""
        status, out, err = self.run(*arguments)
        assert status == 0, out + err
        assert "Traceback" not in out + err
        return out

    def remains(self) -> dict[str, list[str]]:
        """Return what is alive in the cluster, after a grace period for the end of jobs."""
        remains: dict[str, list[str]] = {}
        for _ in range(20):
            command = [sys.executable, "-c", REMAINS]
            printed = subprocess.run(command, env=self.environment, capture_output=True, check=True)
            remains = json.loads(printed.stdout.splitlines()[-1])
            if not any(remains.values()):
                break
            time.sleep(1)
        return remains


@pytest.fixture(scope="module")
def client(head, tmp_path_factory) -> Client:
    folder = tmp_path_factory.mktemp("clean")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return Client(folder, head)


def summary_in(out: str) -> dict[str, Any]:
    """Return the summary, which follows the job's log."""
    return json.loads(out[out.rindex("\n{\n") :])


@pytest.mark.timeout(1800)
def test_every_job_succeeds_from_a_clean_working_directory(client, tmp_path):
    raw = Raw(tmp_path / "raw").add(range(120))
    prepare = raw.spec(image_size=16).prepare.model_dump(mode="json", exclude_defaults=True)
    tree = {
        "run": {"storage_path": str(tmp_path / "runs")},
        "prepare": prepare | {"validation_fraction": 0.2, "test_fraction": 0.2},
        "data": {"prepared": str(raw.out())},
        "model": PLAIN,
        "train": TRAIN,
        "tune": {
            "space": {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}},
            "budget": {"trials": 2},
        },
    }
    # It exists only in the uploaded folder.
    spec = client.write("small.yaml", tree)

    client.succeed("prepare", spec)
    assert (raw.out() / "manifest.json").exists()

    out = client.succeed("train", spec, "--run.name", "first")
    summary = tmp_path / "runs" / "first" / "summary.json"
    assert summary_in(out) == json.loads(summary.read_text())

    out = client.succeed("tune", spec, "--run.name", "search")
    assert summary_in(out)["trials"]["failed"] == 0
    assert (tmp_path / "runs" / "search" / "best.yaml").exists()

    words = ("--run", str(tmp_path / "runs" / "first"), "--data", str(raw.out()))
    test = ("--split", "test", "--output")
    out = client.succeed("evaluate", *words, *test, str(tmp_path / "evaluation"))
    assert summary_in(out)["num_rows"] == 24
    client.succeed("predict", *words, *test, str(tmp_path / "predictions"))
    assert pq.read_table(tmp_path / "predictions").num_rows == 24

    listed = [re.split(" *│ *", line) for line in client.succeed("list").splitlines()]
    jobs = [(row[5].partition(" ")[0], row[2]) for row in listed if "small.yaml" in str(row)]
    assert jobs == [(verb, "SUCCEEDED") for verb in ("prepare", "train", "tune")]
    # The jobs that read the summaries were deleted.
    assert not [row for row in listed if "ray_jobs.submit.summary" in str(row)]
    assert client.remains() == {"actors": [], "groups": []}


def test_a_failing_job_ends_with_its_workers_first_error(client, tmp_path):
    # The damage is found only when a worker decodes the image.
    manifest = write_prepared(tmp_path / "prepared", {"train": 40, "validation": 12, "test": 4})
    damage_image(tmp_path / "prepared", manifest, "train", shard=0, row=3)
    spec = client.write("damaged.yaml", {"model": PLAIN, "train": TRAIN})
    where = ("--data.prepared", str(tmp_path / "prepared"), "--run.storage_path", str(tmp_path))
    status, out, err = client.run("train", spec, *where)
    assert status == 1
    message = r"error: worker \d failed: .*the stored image of row 'train-3' is damaged"
    assert re.match(message, out.splitlines()[-1]), out
    assert re.fullmatch(r"error: job raysubmit_\w+ failed with exit status 1", err.splitlines()[-1])
    assert client.remains() == {"actors": [], "groups": []}


def test_a_job_continues_without_its_client_until_it_is_stopped(client, tmp_path):
    write_prepared(tmp_path / "prepared", {"train": 400, "validation": 40, "test": 4})
    long = TRAIN | {"epochs": 1000, "patience": 1000}
    spec = client.write("long.yaml", {"model": PLAIN, "train": long})
    where = ("--data.prepared", str(tmp_path / "prepared"), "--run.storage_path", str(tmp_path))
    words = ("train", spec, *where, "--run.name", "long")
    assert client.succeed("--no-wait", "--submission-id", "long", *words) == "long\n"
    with start(("logs", "long"), client.folder, client.environment) as process:
        assert process.stdout is not None
        # Until the first epoch is done.
        while not re.match(r" +1 +\d+ ", line := process.stdout.readline()):
            assert line, process.communicate()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith("error: job long continues without this terminal\n")
    assert client.succeed("status", "long") == "RUNNING\n"

    status, _, err = client.run("stop", "long")
    assert (status, err) == (0, "job long: STOPPED\n")
    status, out, err = client.run("logs", "long")
    assert (status, err) == (130, "error: job long was stopped\n")
    assert "saving a checkpoint" in out
    assert out.endswith("error: stopped; run the same command again to resume the run\n"), out
    assert list((tmp_path / "long" / "checkpoints").rglob("*")), out
    assert client.remains() == {"actors": [], "groups": []}


def test_a_wrong_token_is_refused(client):
    status, out, err = client.run("list", RAY_AUTH_TOKEN="f" * 64)
    assert (status, out) == (1, "")
    assert "denied access: the token in $RAY_AUTH_TOKEN is not the cluster's" in err
