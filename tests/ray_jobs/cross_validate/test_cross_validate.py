"""A real cross-validation of raw rows with groups, categories and missing numbers."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics

from mm_model.statistics import fit_vocabulary
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import EvaluateSpec
from ray_jobs.config.spec import CrossValidateSpec
from ray_jobs.cross_validate.job import cross_validate
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.data.reader import ShardReader
from ray_jobs.evaluate.job import evaluate
from ray_jobs.predict.trained_run import open_run
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.raw import Raw
from tests.ray_jobs.scenarios import PLAIN
from tests.ray_jobs.trained import damage_image
from tests.ray_jobs.tune.searches import require_nothing_left

pytestmark = [pytest.mark.multiworker, pytest.mark.timeout(600)]

COLOURS = ("red", "green", "blue")
FOLDS = ("1-1", "1-2")


@pytest.fixture(scope="module")
def prepared(ray_local, tmp_path_factory) -> Path:
    raw = Raw(tmp_path_factory.mktemp("raw")).add(range(90))
    for i, row in enumerate(raw.rows):
        note = "" if i % 6 == 0 else f"a {'worn' if row['label'] else 'new'} part {i}"
        row |= {"home": f"h{i // 2}", "colour": COLOURS[i * i % 5 % 3], "note": note}
    from ray_jobs.prepare.job import prepare

    spec = raw.spec(categorical=("colour",), group_column="home")
    prepare(spec.overlay({"data.text": ["note"]}))
    return raw.out()


def spec_in(folder: Path, prepared: Path, **changes: Any) -> CrossValidateSpec:
    spec = CrossValidateSpec.model_validate(
        {
            "run": {"storage_path": str(folder), "name": "cv"},
            "data": {"prepared": str(prepared), "categorical": ["colour"], "text": ["note"]},
            "model": PLAIN,
            "train": {"global_batch_size": 8, "epochs": 3, "decision_threshold": "f1"},
            "cv": {"folds": len(FOLDS)},
        }
    )
    return spec.overlay({name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def crossed(prepared, tmp_path_factory) -> tuple[Path, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder / "cv", prepared, cross_validate(spec_in(folder, prepared))


def stored(prepared: Path, manifest: Manifest, split: str, columns: list[str]) -> pa.Table:
    shards = manifest.splits[split].shards
    reader = ShardReader(Folder(prepared), shards, columns)
    keys = [(i, g) for i, s in enumerate(shards) for g, n in enumerate(s.row_groups) if n]
    return pa.concat_tables(reader.read_keys(keys).values())


def test_each_row_is_predicted_by_a_model_that_used_neither_it_nor_its_group(crossed):
    folder, prepared, _ = crossed
    predicted, used = pq.read_table(folder / "rows.parquet"), set()
    for name in FOLDS:
        manifest = read_manifest(Folder(folder / "folds" / name))
        columns = ["key", "group"]
        rows = {s: stored(prepared, manifest, s, columns) for s in manifest.splits}
        for column in columns:
            train, validation, scored = (set(t[column].to_pylist()) for t in rows.values())
            assert not scored & (train | validation)
            assert not train & validation
        of_fold = pq.read_table(folder / "folds" / name / "rows.parquet")
        assert of_fold["key"].to_pylist() == rows["test"]["key"].to_pylist()
        used |= set(of_fold["key"].to_pylist())
        colours = stored(prepared, manifest, "train", ["colour"])["colour"].to_pylist()
        assert manifest.vocabularies == (fit_vocabulary(colours, "colour"),)
    whole = read_manifest(Folder(prepared))
    expected = [
        key
        for split in ("train", "validation")
        for key in stored(prepared, whole, split, ["key"])["key"].to_pylist()
    ]
    assert predicted["key"].to_pylist() == expected
    assert used == set(expected)


def test_the_metrics_are_those_of_scikit_learn_for_the_same_predictions(crossed):
    folder, _, result = crossed
    written = json.loads((folder / "metrics.json").read_text())
    assert written["metrics"] == result["metrics"]
    rows = pq.read_table(folder / "rows.parquet")
    label, probability = (rows[name].to_numpy() for name in ("label", "probability"))
    predicted = probability >= rows["threshold"].to_numpy()
    expected = {
        "roc_auc": metrics.roc_auc_score(label, probability),
        "pr_auc": metrics.average_precision_score(label, probability),
        "log_loss": metrics.log_loss(label, probability),
        "brier": metrics.brier_score_loss(label, probability),
        "accuracy": metrics.accuracy_score(label, predicted),
        "f1": metrics.f1_score(label, predicted),
    }
    for name, value in expected.items():
        found = result["metrics"][name]
        assert found["value"] == pytest.approx(value), name
        assert found["low"] <= value <= found["high"]
    assert result["metrics"]["ece"]["value"] is not None
    assert result["metrics"]["ece"]["low"] is None
    aucs = [
        metrics.roc_auc_score(label[mask], probability[mask])
        for mask in (rows["fold"].to_numpy() == fold for fold in (1, 2))
    ]
    assert result["metrics"]["roc_auc"]["mean_of_folds"] == pytest.approx(np.mean(aucs))
    assert result["metrics"]["roc_auc"]["std_of_folds"] == pytest.approx(np.std(aucs, ddof=1))
    assert result["num_groups"] < result["num_rows"]


@pytest.mark.slow
def test_the_mean_model_averages_the_folds_and_is_evaluated_on_the_test_split(crossed):
    from mm_model import load_model

    folder, prepared, before = crossed
    result = cross_validate(spec_in(folder.parent, prepared, cv__export="mean"))
    assert result == {**before, "mean": result["mean"]}
    # Later runs keep its metrics.
    assert cross_validate(spec_in(folder.parent, prepared)) == result
    runs = [folder / "folds" / name for name in FOLDS]
    probabilities = []
    for run in (*runs, folder / "mean"):
        decoder = open_run(str(run)).decoder
        rows = stored(prepared, read_manifest(Folder(prepared)), "test", decoder.columns)
        model = load_model(run / "model" / "model.keras")
        probabilities.append(np.asarray(model(decoder.decode(rows)))[:, 0])
    np.testing.assert_allclose(probabilities[-1], np.mean(probabilities[:-1], axis=0), atol=1e-6)
    label = rows["label"].to_numpy()
    assert result["mean"]["roc_auc"] == pytest.approx(
        metrics.roc_auc_score(label, probabilities[-1])
    )
    assert (folder / "mean" / "model" / "saved_model").is_dir()

    spec = EvaluateSpec(
        run=str(folder / "mean"), data=str(prepared), output=str(folder.parent / "evaluation")
    )
    report = evaluate(spec)
    assert report["roc_auc"] == pytest.approx(result["mean"]["roc_auc"])
    explanation = report["explanation"]
    importance = [name for entry in explanation["importance"] for name in entry["columns"]]
    assert sorted(importance) == ["area", "colour", "image", "note", "rooms"]
    contributions = explanation["contributions"].values()
    assert all(set(row) == {"area", "colour", "rooms"} for row in contributions)
    assert explanation["map_similarity"] is not None


def test_a_finished_cross_validation_is_not_repeated_and_leaves_an_empty_cluster(crossed):
    folder, prepared, result = crossed
    model = folder / "folds" / "1-1" / "model" / "model.keras"
    before = model.stat().st_mtime_ns
    assert not (folder / "folds" / "1-1" / "checkpoints").exists()
    again = cross_validate(spec_in(folder.parent, prepared))
    assert again["metrics"] == result["metrics"]
    assert model.stat().st_mtime_ns == before
    require_nothing_left()
    with pytest.raises(JobError, match=r"with other settings \(train\); choose another --run"):
        cross_validate(spec_in(folder.parent, prepared, train__epochs=4))


def test_unsuitable_folders_and_specs_are_rejected_before_anything_is_trained(
    prepared, tmp_path, no_ray
):
    (tmp_path / "cv").mkdir()
    (tmp_path / "cv" / "run.yaml").write_text("")
    with pytest.raises(JobError, match=r"cv contains something else; choose another --run\.name"):
        cross_validate(spec_in(tmp_path, prepared))
    files = [tmp_path / name / "same.yaml" for name in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text("train: {global_batch_size: 8}")
    compare = [str(file) for file in files]
    with pytest.raises(JobError, match=r"--compare names two files same\.yaml; rename one of them"):
        cross_validate(spec_in(tmp_path, prepared, compare=compare))


@pytest.mark.slow
def test_a_fold_whose_process_is_killed_continues_and_ends_with_the_same_bits(crossed, tmp_path):
    import ray
    from ray.util.state import list_actors

    folder, prepared, _ = crossed
    checkpoints, ended = tmp_path / "cv" / "folds", threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while not list(checkpoints.glob("*/checkpoints/steps/*/state.json")):
            if ended.wait(0.02):
                return
        address = ray.get_runtime_context().gcs_address
        for actor in list_actors(address=address, filters=[("state", "=", "ALIVE")], detail=True):
            if actor.class_name == "FoldWorker":
                os.kill(actor.pid, signal.SIGKILL)
                killed.append(actor.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    cross_validate(spec_in(tmp_path, prepared))
    ended.set()
    thread.join()
    assert killed
    for name in ("rows.parquet", *(f"folds/{fold}/rows.parquet" for fold in FOLDS)):
        assert pq.read_table(tmp_path / "cv" / name).equals(pq.read_table(folder / name)), name
    require_nothing_left()


@pytest.mark.slow
def test_two_workers_report_a_damaged_image_without_a_retry(prepared, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    damage_image(data, read_manifest(Folder(data)), "train", shard=0, row=0)
    with pytest.raises(JobError, match=r"image of row 'k\d+' is damaged.*run the same command"):
        cross_validate(spec_in(tmp_path, data, train__num_workers=2))
    assert "restarted" not in capsys.readouterr().out
    require_nothing_left()


@pytest.mark.slow
def test_specs_are_compared_on_the_same_folds_and_a_failed_fold_is_named(crossed, tmp_path):
    folder, prepared, _ = crossed
    (tmp_path / "numbers.yaml").write_text(
        "model: {image: {kind: none}}\ntrain: {global_batch_size: 8, epochs: 20}\n"
    )
    spec = spec_in(folder.parent, prepared, compare=[str(tmp_path / "numbers.yaml")])
    compared = cross_validate(spec)["comparisons"]["cv-numbers"]["roc_auc"]
    ours, theirs = (
        pq.read_table(folder.parent / name / "rows.parquet") for name in ("cv", "cv-numbers")
    )
    for column in ("key", "fold", "label"):
        assert ours[column].equals(theirs[column])
    aucs = [metrics.roc_auc_score(t["label"], t["probability"]) for t in (ours, theirs)]
    assert compared["difference"] == pytest.approx(aucs[0] - aucs[1])
    assert compared["low"] <= compared["difference"] <= compared["high"]
    is_clear = not compared["low"] <= 0 <= compared["high"]
    assert (compared["verdict"] != "cannot be told apart") == is_clear
    with pytest.raises(JobError, match=r"2 of 2 folds failed: 1-1: ValueError: .*not finite"):
        cross_validate(spec_in(tmp_path, prepared, train__learning_rate=1e30))
    require_nothing_left()
