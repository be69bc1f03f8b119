import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import EvaluateSpec
from ray_jobs.data.manifest import Manifest
from ray_jobs.evaluate.job import evaluate
from ray_jobs.predict.predictor import Predictor
from ray_jobs.predict.row_sources import PreparedRows, rows_per_task
from ray_jobs.predict.trained_run import TrainedRun, open_run
from ray_jobs.storage.folder import Folder
from ray_jobs.train.metrics import binary_metrics
from tests.ray_jobs.tiny import COLUMNS, write_prepared
from tests.ray_jobs.trained import THRESHOLD, damage_image, probabilities, stored_rows, write_run
from tests.ray_jobs.tune.searches import require_nothing_left

NUM_TEST_ROWS = 47  # in shards of 20, 20 and 7 rows


@pytest.fixture(scope="module")
def prepared_run(tmp_path_factory) -> tuple[Path, Manifest, Any]:
    """A folder with `prepared` data and a `run`, the manifest and the model."""
    folder = tmp_path_factory.mktemp("evaluate")
    num_rows = {"train": 30, "validation": 11, "test": NUM_TEST_ROWS}
    manifest = write_prepared(folder / "prepared", num_rows)
    return folder, manifest, write_run(folder / "run", manifest)


def spec_of(folder: Path, **changes) -> EvaluateSpec:
    fields: dict[str, Any] = {
        "run": str(folder / "run"),
        "data": str(folder / "prepared"),
        "output": str(folder / "evaluation"),
        # Does not divide the split, a shard or a row group.
        "batch_size": 4,
        "explain": "none",
    }
    return EvaluateSpec(**(fields | changes))


def test_each_row_counts_once_with_several_workers(prepared_run, ray_local, tmp_path):
    folder, manifest, model = prepared_run
    found = evaluate(spec_of(folder, num_workers=2, output=str(tmp_path), explain="rows"))

    rows = stored_rows(folder / "prepared", manifest, "test")
    probability = probabilities(model, rows, manifest)
    assert len(set(probability)) == NUM_TEST_ROWS
    expected = binary_metrics(rows["label"].to_numpy(), probability, THRESHOLD)
    for name, value in expected.items():
        assert np.ravel(found[name]) == pytest.approx(np.ravel(value), abs=1e-6), name
    assert np.sum(found["confusion"]) == found["num_rows"] == NUM_TEST_ROWS

    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "calibration.png", "confusion.png", "metrics.json", "pr.png", "report.html", "roc.png",
        "rows.parquet",
    ]  # fmt: skip
    written = pq.read_table(tmp_path / "rows.parquet")
    assert written["key"].to_pylist() == rows["key"].to_pylist()
    pixels = written["column_(pixels of the original image)"]
    assert pixels.to_pylist() == rows["original_pixels"].to_pylist()
    np.testing.assert_allclose(written["probability"].to_numpy(), probability, atol=1e-6)
    explanation = found["explanation"]
    importance = [name for entry in explanation["importance"] for name in entry["columns"]]
    assert sorted(importance) == sorted([*COLUMNS, "image"])
    assert explanation["map_similarity"] is not None
    assert set(explanation["contributions"]) <= set(rows["key"].to_pylist())
    card = (folder / "run" / "model_card.md").read_text()
    assert f"| ROC AUC | {found['roc_auc']:.3f} |" in card
    assert "- test: 47 rows, 16 of them '1'." in card
    assert {len(row) for row in explanation["contributions"].values()} == {len(COLUMNS)}
    with Image.open(io.BytesIO((tmp_path / "roc.png").read_bytes())) as image:
        assert np.ptp(np.asarray(image)) > 100

    require_nothing_left()


def test_the_error_for_a_damaged_image_names_its_shard_and_row(
    prepared_run, predict_here, tmp_path
):
    folder, manifest, _ = prepared_run
    shutil.copytree(folder / "prepared", tmp_path / "prepared")
    damage_image(tmp_path / "prepared", manifest, "test", shard=1, row=3)
    message = (
        "1 of 47 rows of the test split of .* cannot be evaluated; the first is 'test-23': "
        r"the stored image in test/part-00001\.parquet is damaged: .*; prepare the data again"
    )
    with pytest.raises(JobError, match=message):
        evaluate(spec_of(folder, data=str(tmp_path / "prepared"), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_runs_are_compared_and_costs_choose_a_threshold(prepared_run, predict_here, tmp_path):
    folder, manifest, _ = prepared_run
    other = tmp_path / "other"
    model = write_run(other, manifest, image="none")
    changes = {"compare": (str(other),), "cost_false_negative": 10.0, "output": str(tmp_path)}
    found = evaluate(spec_of(folder, **changes))
    (run,) = [each for each in found["comparisons"] if each["kind"] == "run"]
    rows = stored_rows(folder / "prepared", manifest, "test")
    expected = binary_metrics(
        rows["label"].to_numpy(), probabilities(model, rows, manifest), THRESHOLD
    )
    assert run["name"] == str(other)
    assert run["metrics"]["roc_auc"] == pytest.approx(expected["roc_auc"], abs=1e-6)
    difference = run["differences"]["roc_auc"]["difference"]
    assert difference == pytest.approx(found["roc_auc"] - expected["roc_auc"], abs=1e-6)
    assert found["thresholds"]["cost_false_negative"] == 10
    assert str(other) in (tmp_path / "report.html").read_text()


def test_rows_count_as_held_out_unless_the_run_used_them(prepared_run, predict_here, tmp_path):
    folder, manifest, _ = prepared_run
    out = str(tmp_path / "out")
    used = evaluate(spec_of(folder, split="validation", output=out))
    assert "not_held_out" in {finding["code"] for finding in used["findings"]}
    num_rows = {split: info.num_rows for split, info in manifest.splits.items()}
    write_prepared(tmp_path / "new", num_rows, seed=5)
    # Whatever the split is called, the run has seen none of its rows.
    new = evaluate(spec_of(folder, data=str(tmp_path / "new"), split="train", output=out))
    assert "not_held_out" not in {finding["code"] for finding in new["findings"]}
    assert "does not contain" in new["baselines_skipped"]


@pytest.mark.slow
def test_an_unreadable_shard_ends_the_job_with_a_one_line_error(prepared_run, ray_local, tmp_path):
    folder, _, _ = prepared_run
    shutil.copytree(folder / "prepared", tmp_path / "prepared")
    shard = tmp_path / "prepared/test/part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[4:-400] = bytes(len(content) - 404)
    shard.write_bytes(content)
    message = r"^could not read /.*/test/part-00001\.parquet: .*is damaged; prepare it again$"
    # The exception and its traceback must not reference the actors.
    with pytest.raises(JobError, match=message) as raised:
        evaluate(spec_of(folder, data=str(tmp_path / "prepared"), output=str(tmp_path)))
    require_nothing_left()
    assert raised.value.__traceback__


def test_a_folder_without_a_finished_run_is_rejected(prepared_run, no_ray, tmp_path):
    folder, manifest, _ = prepared_run
    with pytest.raises(JobError, match=r"is not a run folder: it has no manifest\.json"):
        evaluate(spec_of(folder, run=str(tmp_path)))
    manifest.write(Folder(tmp_path))
    (tmp_path / "run.yaml").write_text("run: {}\n")
    with pytest.raises(JobError, match=r"is an unfinished run: it has no summary\.json"):
        evaluate(spec_of(folder, run=str(tmp_path)))


@pytest.mark.parametrize("content", [b"no archive", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_not_a_model_is_rejected(prepared_run, no_ray, tmp_path, content):
    folder, _, _ = prepared_run
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run/model/model.keras").write_bytes(content)
    with pytest.raises(JobError, match=r"model\.keras is damaged or not a fusion model"):
        evaluate(spec_of(folder, run=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"numeric_columns": ("alpha", "x", "row")},
            r"\['beta'\] are missing and \['x'\] are unknown",
        ),
        ({"numeric_columns": COLUMNS[::-1]}, r"order .* is \['row', .*'alpha'\], not \['alpha', "),
        ({"image": {"height": 32, "width": 32}}, "images have 32 × 32 pixels, not 16 × 16 pixels"),
        ({"positive_label": "sold"}, "its positive label is 'sold', not '1'"),
    ],
)
def test_the_error_for_data_that_does_not_fit_the_run_names_the_difference(
    prepared_run, no_ray, tmp_path, changes, message
):
    folder, manifest, _ = prepared_run
    other = Manifest.model_validate({**manifest.model_dump(mode="json"), **changes})
    other.write(Folder(tmp_path))
    with pytest.raises(JobError, match=f"does not match the run in .*{message}"):
        evaluate(spec_of(folder, data=str(tmp_path)))


def test_a_split_without_rows_is_rejected(prepared_run, no_ray, tmp_path):
    folder, manifest, _ = prepared_run
    empty = manifest.splits["test"].model_copy(update={"num_rows": 0, "shards": ()})
    splits = {**manifest.splits, "test": empty}
    manifest.model_copy(update={"splits": splits}).write(Folder(tmp_path))
    with pytest.raises(JobError, match=r"the test split of .* has no rows; choose another --split"):
        evaluate(spec_of(folder, data=str(tmp_path)))


def test_a_missing_or_truncated_shard_is_rejected_by_name(prepared_run, no_ray, tmp_path):
    folder, _, _ = prepared_run
    shutil.copytree(folder / "prepared", tmp_path / "prepared")
    spec = spec_of(folder, data=str(tmp_path / "prepared"))
    shard = tmp_path / "prepared/test/part-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(
        JobError, match=r"test/part-00002\.parquet has \d+ bytes, but should have \d+"
    ):
        evaluate(spec)
    shard.unlink()
    with pytest.raises(JobError, match=r"test/part-00002\.parquet is missing, but should have \d+"):
        evaluate(spec)


@pytest.fixture
def rows_of_run(prepared_run, monkeypatch) -> Callable[[Path], tuple[TrainedRun, list[pa.Table]]]:
    """Return a run and the test rows as it receives them, by task."""
    folder, manifest, _ = prepared_run
    # TensorFlow is already initialized in this process, so its threads cannot be set.
    monkeypatch.setattr("ray_jobs.cluster.strategy.set_devices", lambda num_cpus, use_gpu: None)

    def read(path: Path) -> tuple[TrainedRun, list[pa.Table]]:
        run = open_run(str(path))
        source = PreparedRows(run, Folder(folder / "prepared"), manifest, ["test"], spec_of(folder))
        return run, [rows for task in source.tasks() for rows in source.read(task)]

    return read


@pytest.mark.parametrize(
    ("num_rows", "workers", "expected"),
    [(47, 1, 8), (47, 2, 4), (3, 1, 4), (100_000, 2, 512), (400, 1, 100)],
)
def test_a_task_has_whole_batches_and_each_worker_several_tasks(num_rows, workers, expected):
    spec = EvaluateSpec(run="", data="", output="", batch_size=4, num_workers=workers)
    assert rows_per_task(num_rows, spec) == expected


@pytest.mark.parametrize("kinds", [("tiny", "mlp"), ("tiny", "none"), ("none", "mlp")])
def test_a_model_is_traced_once_and_receives_only_its_inputs(
    prepared_run, rows_of_run, tmp_path, kinds
):
    folder, manifest, _ = prepared_run
    model = write_run(tmp_path, manifest, *kinds)
    run, tables = rows_of_run(tmp_path)
    shapes = {"image": (16, 16, 3), "numeric": (3,)}
    needed = {name for name, kind in zip(shapes, kinds, strict=True) if kind != "none"}
    assert run.input_shapes == {name: shapes[name] for name in needed}
    assert needed == shapes.keys() & set(tables[0].column_names)
    loaded = Predictor(run, batch_size=4, num_cpus=1, use_gpu=False)
    found = pa.concat_tables([table for rows in tables for table in loaded(rows)])
    rows = stored_rows(folder / "prepared", manifest, "test")
    assert found["key"].to_pylist() == rows["key"].to_pylist()
    expected = probabilities(model, rows, manifest)
    np.testing.assert_allclose(found["probability"].to_numpy(), expected, atol=1e-6)
    assert loaded.predict.experimental_get_tracing_count() == 1


def test_a_damaged_model_ends_the_job_with_a_one_line_error(prepared_run, rows_of_run, tmp_path):
    folder, _, _ = prepared_run
    shutil.copytree(folder / "run", tmp_path / "run")
    whole = tmp_path / "run/model/model.keras"
    with zipfile.ZipFile(folder / "run/model/model.keras") as file:
        config = file.read("config.json")
    with zipfile.ZipFile(whole, "w") as file:
        file.writestr("config.json", config)
        file.writestr("metadata.json", "{}")
        file.writestr("model.weights.h5", b"no weights")
    run, (rows, *_) = rows_of_run(tmp_path / "run")
    (table,) = Predictor(run, 64, 1, False)(rows)
    (failure,) = table["failure"].to_pylist()
    assert failure.startswith(f"could not load {whole}: Unable to")


def test_a_probability_that_is_not_finite_becomes_an_error(prepared_run, rows_of_run, tmp_path):
    _, manifest, _ = prepared_run
    model = write_run(tmp_path, manifest, image="none")
    model.calibration.set([float("nan")])
    model.save(tmp_path / "model/model.keras")
    run, (rows, *_) = rows_of_run(tmp_path)
    (table,) = Predictor(run, 64, 1, False)(rows)
    assert table["probability"].null_count == table.num_rows
    assert set(table["error"].to_pylist()) == {"the model's probability is not finite"}


def test_metrics_are_weighted_if_the_data_has_weights(prepared_run, predict_here, tmp_path, capsys):
    """Weights count in evaluation as in training (autogluon#942, autogluon#5185)."""
    folder, manifest, model = prepared_run
    num_rows = {split: info.num_rows for split, info in manifest.splits.items()}
    weighted = write_prepared(tmp_path / "data", num_rows, weights=(1, 5, 0.5))
    found = evaluate(spec_of(folder, data=str(tmp_path / "data"), output=str(tmp_path / "out")))
    rows = stored_rows(tmp_path / "data", weighted, "test")
    probability = probabilities(model, rows, weighted)
    by = rows["weight"].to_numpy()
    expected = binary_metrics(rows["label"].to_numpy(), probability, THRESHOLD, by)
    assert found.pop("weight_column") == "weight"
    for name, value in expected.items():
        assert np.ravel(found[name]) == pytest.approx(np.ravel(value), abs=1e-6), name
    plain = binary_metrics(rows["label"].to_numpy(), probability, THRESHOLD)
    assert found["roc_auc"] != pytest.approx(plain["roc_auc"], abs=1e-4)
    assert found["confusion"] == plain["confusion"]
    assert "weighted by weight, except for the numbers of rows" in capsys.readouterr().out
