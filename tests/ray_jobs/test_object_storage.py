"""All jobs on a local S3 server, whose output contains no secret."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from ray_jobs.storage.folder import Folder
from tests.ray_jobs.raw import Raw
from tests.ray_jobs.scenarios import PLAIN
from tests.ray_jobs.storage.s3 import s3_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
CANARY = "canary-4f1d9c"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}-aws",
    "AWS_SESSION_TOKEN": f"{CANARY}-session",
    "MLFLOW_TRACKING_PASSWORD": f"{CANARY}-mlflow",
    "SOME_TOKEN": f"{CANARY}-token",
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Folder]:
    """A bucket, with its address and keys in the environment and Ray's logs below `tmp_path`."""
    # A short path, since the path of a socket is limited in length.
    environment = {**SECRETS, "RAY_TMPDIR": str(tmp_path.parent / "r")}
    with s3_folder() as folder, patch.dict(os.environ, environment):
        yield folder


def test_all_jobs_work_on_object_storage_and_write_no_secret(store, tmp_path):
    raw = Raw(tmp_path / "raw").add(range(90))
    prepared, runs = store / "prepared", store / "runs"
    spec = raw.spec().overlay(
        {
            "prepare.output": prepared.uri,
            "data.prepared": prepared.uri,
            "run.storage_path": runs.uri,
            "model": PLAIN,
            "train.global_batch_size": 8,
            "train.epochs": 2,
            "train.num_workers": 2,
            "train.cpus_per_worker": 0.5,
            "tune.space": {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}},
            "tune.budget": {"trials": 2},
            "tune.workers_per_trial": 1,
        }
    )
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    run = ("--run", (runs / "first").uri, "--data", prepared.uri)
    outputs = [
        run_job("prepare", file),
        run_job("doctor", file),
        run_job("train", file, "--run.name", "first"),
        run_job("train", file, "--run.name", "first"),
        run_job("tune", file, "--run.name", "search"),
        run_job("evaluate", *run, "--output", (store / "evaluation").uri),
        run_job("predict", *run, "--output", (store / "predictions").uri),
    ]
    assert "run first is already finished" in outputs[3]
    names = set(store.names())
    assert {
        "prepared/manifest.json", "runs/first/summary.json", "runs/first/model/model.keras",
        "runs/search/leaderboard.csv", "runs/search/best.yaml", "runs/search/tune.html",
        "evaluation/metrics.json", "evaluation/roc.png", "predictions/part-00000.parquet",
    } <= names  # fmt: skip
    assert json.loads(store.read_bytes("evaluation/metrics.json"))["num_rows"] > 0
    logs = [path for path in Path(os.environ["RAY_TMPDIR"]).rglob("*") if path.is_file()]
    assert any("logs" in path.parts for path in logs)
    written = {name: store.read_bytes(name) for name in names}
    saved = [n for n in names if re.search(r"/(model|checkpoints)/", n)]
    assert len(saved) > 5
    assert [name for name in saved if written[name].startswith(b"\x80")] == [], "a pickle"
    written |= {str(path): path.read_bytes() for path in logs}
    written |= {f"output {i}": text.encode() for i, text in enumerate(outputs)}
    assert [name for name, content in written.items() if CANARY.encode() in content] == []


def run_job(verb: str, *words: Any) -> str:
    """Run a job and return its output."""
    command = [sys.executable, "-m", f"ray_jobs.{verb}", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{verb}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr
