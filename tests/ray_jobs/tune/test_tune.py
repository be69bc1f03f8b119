"""The whole job, from the spec to the results."""

import csv
import json
import os
import random
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
from tests.ray_jobs.config.usage import unframed
from tests.ray_jobs.tune.searches import require_nothing_left, spec_in

RESULTS = {
    "best.yaml", "evaluation", "leaderboard.csv", "manifest.json", "summary.json", "trials",
    "tune.html", "tune.yaml",
}  # fmt: skip


def read_leaderboard(folder: Path) -> list[dict[str, str]]:
    with open(folder / "leaderboard.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_an_empty_space_is_rejected_before_anything_is_written(data, tmp_path):
    with pytest.raises(JobError, match=r"tune\.space is empty"):
        search(spec_in(data, tune__space={}, run__storage_path=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_rejects_an_invalid_space(tmp_path):
    (tmp_path / "wrong.yaml").write_text("tune: {space: {train.epoch: {randint: [1, 5]}}}")
    command = [sys.executable, "-m", "ray_jobs.tune", str(tmp_path / "wrong.yaml")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    message = "tune.space: no setting train.epoch; did you mean 'train.epochs'?"
    assert message in unframed(result.stderr)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_search_trains_and_evaluates_the_best_trial(ray_local, data, capsys):
    spec = spec_in(data, run__name="whole", tune__budget__trials=3, tune__scheduler="fifo")
    summary = search(spec)
    folder = data / "runs/whole"
    assert {path.name for path in folder.iterdir()} == RESULTS
    rows = read_leaderboard(folder)
    losses = [float(row["val/log_loss"]) for row in rows]
    assert losses == sorted(losses)
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert summary["best_trial"] == rows[0]["trial"]
    assert summary["scores"] == {"val/log_loss": losses[0]}
    best = Path(summary["run"])
    record = json.loads((best / "summary.json").read_text())
    history = [json.loads(line) for line in (best / "history.jsonl").read_text().splitlines()]
    # The run continues the trial and keeps its best epoch.
    assert history[record["best_epoch"] - 1]["val/log_loss"] == losses[0]
    test = summary["test"]
    metrics = json.loads((folder / "evaluation/best/metrics.json").read_text())
    assert test["best"] == metrics["roc_auc"]
    assert test["low"] <= test["best"] - test["untuned"] <= test["high"]
    # Tune's checkpoints are deleted, those of the best trial included.
    assert not list(folder.glob("trials/*/checkpoint_*"))
    out = capsys.readouterr().out
    assert "on 32 test rows: AUC" in out or "AUC 0" in out.partition("no trial was better")[2]
    require_nothing_left()
    # `train` accepts the best trial's spec and gets the same result.
    tree = yaml.safe_load((folder / "best.yaml").read_text())
    again = RunSpec.model_validate(tree)
    assert (again.run.name, again.run.storage_path) == ("whole-best", str(data / "runs"))
    assert fit(again)["best_epoch"] == record["best_epoch"]
    before = (folder / "summary.json").stat().st_mtime
    assert search(spec) == summary
    assert "already finished" in capsys.readouterr().out
    assert (folder / "summary.json").stat().st_mtime == before
    with pytest.raises(JobError, match=r"contains a search with other settings \(train\)"):
        search(spec.overlay({"train.epochs": 9}))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_best_trials_on_features_are_trained_on_images(ray_local, data):
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
    rows = read_leaderboard(folder)
    in_full = {row["trial"]: row["val/log_loss in full"] for row in rows}
    assert sum(value != "" for value in in_full.values()) in (1, 2)
    assert Path(summary["run"]).parent.name == "full"
    for row in rows:
        if in_full[row["trial"]]:
            # A frozen backbone gives similar scores on features and on images.
            on_features, on_images = float(row["val/log_loss"]), float(in_full[row["trial"]])
            assert on_features == pytest.approx(on_images, rel=0.2)
    assert len(list((data / "runs/features").glob("trials/*/run.yaml"))) == 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("on_features", [False, True])
def test_trials_are_scored_by_folds_and_the_best_is_trained_from_the_start(
    ray_local, data, on_features
):
    spec = spec_in(
        data,
        run__name=f"folds-{on_features}",
        model__image__trainable=not on_features,
        tune__space={"model.dropout": {"uniform": [0.1, 0.5]}},
        tune__budget__trials=2,
        tune__folds=2,
        tune__scheduler="fifo",
    )
    summary = search(spec)
    folder = data / f"runs/folds-{on_features}"
    best = Path(summary["run"])
    assert best.parent.name == "full"
    assert len((best / "history.jsonl").read_text().splitlines()) == 4
    folds = folder / "trials" / summary["best_trial"] / "folds"
    splits = [
        json.loads((folds / name / "manifest.json").read_text())["splits"]
        for name in ("1-1", "1-2")
    ]
    sizes = [
        [of_fold[split]["num_rows"] for split in ("train", "validation")] for of_fold in splits
    ]
    assert sizes == [[48, 48], [48, 48]]
    # Each fold validates on the rows that the other one trains on.
    assert splits[0]["train"]["class_counts"] == splits[1]["validation"]["class_counts"]
    require_nothing_left()


class Driver:
    """Runs a search in a process that can be killed."""

    def __init__(self, spec: RunSpec, folder: Path) -> None:
        self.folder = folder / str(spec.run.name)
        self.spec, self.log = self.folder.with_suffix(".yaml"), self.folder.with_suffix(".log")
        self.spec.write_text(yaml.safe_dump(spec.model_dump(mode="json")))

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray_jobs.tune", str(self.spec)]
        environment = {**os.environ, "RAY_JOBS_TRACEBACK": "1"}
        with open(self.log, "ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def finish(self, num_trials: int) -> list[dict[str, str]]:
        """Run the search to its end, and return its leaderboard."""
        before = ended_trials(self.folder)
        assert self.start().wait() == 0, self.log.read_text()
        now = ended_trials(self.folder)
        # A repeated trial would have other times.
        assert {trial: now[trial] for trial in before} == before
        rows = read_leaderboard(self.folder)
        assert len(rows) == len(now) == num_trials
        return rows


def ended_trials(folder: Path) -> dict[str, str]:
    """Return the last result, with its time stamp, of each trial that has ended."""
    return {path.parent.name: path.read_text() for path in folder.glob(f"trials/*/{ENDED}")}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_search_with_a_killed_driver_repeats_no_finished_trial(data, tmp_path):
    choose = random.Random(0)
    settings = {
        "tune__budget__trials": 20,
        "tune__searcher": "random",
        "tune__scheduler": "fifo",
        "tune__checkpoint_every_s": 1,
        # Long enough that the search does not finish between two kills.
        "train__epochs": 40,
        "train__patience": 40,
        "run__storage_path": str(tmp_path),
    }
    scores = {}
    for name in ("killed", "whole"):
        driver, before = Driver(spec_in(data, run__name=name, **settings), tmp_path), {}
        for _ in range(5 if name == "killed" else 0):
            process = driver.start()
            # After two more trials, at a random moment.
            while len(ended_trials(driver.folder)) < len(before) + 2 and process.poll() is None:
                time.sleep(0.1)
            time.sleep(choose.uniform(0, 2))
            assert process.poll() is None, driver.log.read_text()
            process.kill()
            process.wait()
            now = ended_trials(driver.folder)
            assert {trial: now[trial] for trial in before} == before
            before = now
        rows = driver.finish(num_trials=20)
        assert {row["state"] for row in rows} == {"finished"}
        scores[name] = sorted(float(row["val/log_loss"]) for row in rows)
    # The same values were tried, with the same results.
    assert scores["killed"] == pytest.approx(scores["whole"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median", "pbt", "pb2"])
def test_a_killed_search_resumes_and_finishes_under_every_scheduler(data, tmp_path, scheduler):
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
    driver = Driver(spec, tmp_path)
    process = driver.start()
    # In the middle of the search, when trials were stopped, paused or cloned.
    while len(list(driver.folder.glob("trials/*/checkpoint_*"))) < 8 and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    rows = driver.finish(num_trials=6)
    assert {row["state"] for row in rows} <= {"finished", "stopped"}
    assert "finished" in {row["state"] for row in rows}
