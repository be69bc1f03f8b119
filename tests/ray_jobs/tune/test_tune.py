"""The whole job, from the command line's specification to the results."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.train.job import fit
from ray_jobs.tune.job import search
from ray_jobs.tune.trials.trial import ENDED
from tests.ray_jobs.tune.searches import prepared_in, require_nothing_left, spec_in

RESULTS = {
    "best.yaml", "evaluation", "leaderboard.csv", "manifest.json", "summary.json", "trials",
    "tune.html", "tune.yaml",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    prepared_in(folder)
    return folder


def leaderboard_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "leaderboard.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_an_empty_space_and_a_wrong_one_are_refused_at_once(data, tmp_path):
    with pytest.raises(JobError, match=r"tune\.space is empty"):
        search(spec_in(data, tune__space={}, run__storage_path=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_space_that_does_not_fit_is_refused_by_the_command_line(tmp_path):
    (tmp_path / "wrong.yaml").write_text("tune: {space: {train.epoch: {randint: [1, 5]}}}")
    command = [sys.executable, "-m", "ray_jobs.tune", str(tmp_path / "wrong.yaml")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "tune.space: train.epoch is no setting; did you mean 'train.epochs'?" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_search_ends_with_the_best_trained_and_evaluated(ray_local, data, capsys):
    spec = spec_in(data, run__name="whole", tune__budget__trials=3, tune__scheduler="fifo")
    summary = search(spec)
    folder = data / "runs/whole"
    assert {path.name for path in folder.iterdir()} == RESULTS
    rows = leaderboard_of(folder)
    losses = [float(row["val/log_loss"]) for row in rows]
    assert losses == sorted(losses)
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert summary["best_trial"] == rows[0]["trial"]
    assert summary["scores"] == {"val/log_loss": losses[0]}
    best = Path(summary["run"])
    record = json.loads((best / "summary.json").read_text())
    history = [json.loads(line) for line in (best / "history.jsonl").read_text().splitlines()]
    # The run goes on from the trial, whose best epoch it keeps.
    assert history[record["best_epoch"] - 1]["val/log_loss"] == losses[0]
    test = summary["test"]
    metrics = json.loads((folder / "evaluation/best/metrics.json").read_text())
    assert test["best"] == metrics["roc_auc"]
    assert test["low"] <= test["best"] - test["untuned"] <= test["high"]
    # Checkpoints of trials that lost are gone, and so are Tune's of the best.
    assert not list(folder.glob("trials/*/checkpoint_*"))
    said = capsys.readouterr().out
    assert "on 32 test rows: AUC" in said or "AUC 0" in said.partition("no trial was better")[2]
    require_nothing_left()
    # The best trial's specification is one that `train` takes, and it trains the same.
    tree = yaml.safe_load((folder / "best.yaml").read_text())
    again = RunSpec.model_validate(tree)
    assert (again.run.name, again.run.storage_path) == ("whole-best", str(data / "runs"))
    assert fit(again)["best_epoch"] == record["best_epoch"]
    before = (folder / "summary.json").stat().st_mtime
    assert search(spec) == summary
    assert "finished already" in capsys.readouterr().out
    assert (folder / "summary.json").stat().st_mtime == before
    with pytest.raises(JobError, match=r"holds a search with other settings \(train\)"):
        search(spec.overlay({"train.epochs": 9}))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trials_on_features_are_promoted_to_images(ray_local, data):
    spec = spec_in(
        data,
        run__name="features",
        model__image__trainable=False,
        tune__space={
            "model.dropout": {"uniform": [0, 0.5]},
            "model.image.kind": {"choice": ["tiny"]},
        },
        tune__budget__trials=3,
        tune__promote=1,
        tune__scheduler="fifo",
    )
    summary = search(spec)
    folder = data / "runs/features"
    rows = leaderboard_of(folder)
    in_full = {row["trial"]: row["val/log_loss in full"] for row in rows}
    assert sum(value != "" for value in in_full.values()) in (1, 2)
    assert Path(summary["run"]).parent.name == "full"
    for row in rows:
        if in_full[row["trial"]]:
            # A frozen backbone gives the same on images as before them.
            ours, theirs = float(row["val/log_loss"]), float(in_full[row["trial"]])
            assert ours == pytest.approx(theirs, rel=0.2)
    assert len(list((data / "runs/features").glob("trials/*/run.yaml"))) == 3


def start(spec: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray_jobs.tune", str(spec)]
    environment = {**os.environ, "RAY_JOBS_TRACEBACK": "1"}
    with open(spec.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def ended(folder: Path) -> dict[str, str]:
    """What was written down of each trial that has ended, with the time at which it was."""
    return {path.parent.name: path.read_text() for path in folder.glob(f"trials/*/{ENDED}")}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_search_whose_driver_is_killed_runs_no_finished_trial_again(data, tmp_path):
    choose = random.Random(0)
    settings = {
        "tune__budget__trials": 20,
        "tune__searcher": "random",
        "tune__scheduler": "fifo",
        "tune__checkpoint_every_s": 1,
        # So long that the search does not come to its end between two kills.
        "train__epochs": 40,
        "train__patience": 40,
        "run__storage_path": str(tmp_path),
    }
    scores = {}
    for name in ("killed", "whole"):
        spec = spec_in(data, run__name=name, **settings)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
        folder, before = tmp_path / name, {}
        for _ in range(5 if name == "killed" else 0):
            process = start(path)
            # Some trials further on, at any moment of one.
            while len(ended(folder)) < len(before) + 2 and process.poll() is None:
                time.sleep(0.1)
            time.sleep(choose.uniform(0, 2))
            assert process.poll() is None, path.with_suffix(".log").read_text()
            process.send_signal(signal.SIGKILL)
            process.wait()
            now = ended(folder)
            # Not run again, or their times would be others.
            assert {trial: now[trial] for trial in before} == before
            before = now
        process = start(path)
        assert process.wait() == 0, path.with_suffix(".log").read_text()
        now = ended(folder)
        assert {trial: now[trial] for trial in before} == before
        rows = leaderboard_of(folder)
        assert len(rows) == len(now) == 20
        assert {row["state"] for row in rows} == {"finished"}
        scores[name] = sorted(float(row["val/log_loss"]) for row in rows)
    # The same values were tried, to the same end.
    assert scores["killed"] == pytest.approx(scores["whole"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median", "pbt", "pb2"])
def test_a_killed_search_goes_on_to_its_end_under_every_scheduler(data, tmp_path, scheduler):
    spec = spec_in(
        data,
        run__name="killed",
        run__storage_path=str(tmp_path),
        tune__scheduler=scheduler,
        tune__budget__trials=6,
        tune__checkpoint_every_s=0.01,
        tune__perturbation_epochs=2,
        train__epochs=9,
    )
    path, folder = tmp_path / "killed.yaml", tmp_path / "killed"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    process = start(path)
    # In the middle: trials have stopped, wait for each other, or were cloned.
    while len(list(folder.glob("trials/*/checkpoint_*"))) < 8 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = ended(folder)
    process = start(path)
    assert process.wait() == 0, path.with_suffix(".log").read_text()
    now = ended(folder)
    assert {trial: now[trial] for trial in before} == before
    rows = leaderboard_of(folder)
    assert len(rows) == len(now) == 6
    assert {row["state"] for row in rows} <= {"finished", "stopped"}
    assert "finished" in {row["state"] for row in rows}
