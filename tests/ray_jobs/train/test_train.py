import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from mm_model.calibration import log_loss
from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.config.inference_spec import EvaluateSpec
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.images import decode_stored
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.job import fit, require_trainable
from tests.ray_jobs.scenarios import SCENARIOS
from tests.ray_jobs.tiny import COLUMNS, write_prepared
from tests.ray_jobs.train.reading import recorded_reading, rows_read
from tests.ray_jobs.trained import damage_image, stored_rows
from tests.ray_jobs.tune.searches import require_nothing_left

RUN_FILES = {
    "checkpoints", "embeddings.parquet", "environment.json", "history.jsonl", "history.parquet",
    "manifest.json", "model", "reference.parquet", "run.yaml", "summary.json", "tensorboard",
    "validation.parquet",
}  # fmt: skip

SIZES = {"train": 101, "validation": 37, "test": 23}


def spec_in(folder: Path, **changes: Any) -> RunSpec:
    spec = RunSpec.model_validate(
        {
            "run": {"storage_path": str(folder / "runs"), "name": "first"},
            "data": {
                "prepared": str(folder / "prepared"),
                # Several windows per epoch, and less memory than they take.
                "cache": "none",
                "shuffle_window_rows": 16,
                "buffer_bytes": 100_000,
            },
            # With dropout and flips, but without the other operations, which are slow to trace.
            "model": SCENARIOS["random"]["model"],
            "train": {
                "num_workers": 2,
                "global_batch_size": 16,
                "epochs": 3,
                "learning_rate": 3e-3,
                "max_failures": 0,
            },
        }
    )
    return spec.overlay({name.replace("__", "."): value for name, value in changes.items()})


def prepared_in(folder: Path) -> Manifest:
    return write_prepared(folder / "prepared", SIZES)


def inputs_of(rows: pa.Table) -> dict[str, np.ndarray]:
    """Return the model's inputs of stored rows."""
    image = np.stack([decode_stored(content) for content in rows["image"].to_pylist()])
    numbers = np.stack([rows[name].to_numpy().astype(np.float32) for name in COLUMNS], axis=1)
    return {"image": image, "numeric": numbers}


def weights_of(run: Path) -> list[np.ndarray]:
    from mm_model import load_model

    return load_model(run / "model" / "model.keras").get_weights()


@contextmanager
def after_the_first_checkpoint(run: Path, act: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread once the run has a checkpoint."""
    ended, done = threading.Event(), threading.Event()

    def work() -> None:
        while not list((run / "checkpoints").glob("steps/*/state.json")):
            if ended.wait(0.05):
                return
        act()
        done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert done.is_set()


@pytest.fixture(scope="module")
def trained(ray_local, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("train")
    prepared_in(folder)
    with recorded_reading():
        return folder, fit(spec_in(folder))


@pytest.mark.multiworker
def test_a_run_writes_its_folder_and_leaves_an_empty_cluster(trained, capsys):
    folder, summary = trained
    run = folder / "runs" / "first"
    assert {path.name for path in run.iterdir()} == RUN_FILES
    assert json.loads((run / "summary.json").read_text()) == summary
    resolved = RunSpec.model_validate(yaml.safe_load((run / "run.yaml").read_text()))
    assert resolved == spec_in(folder)
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in history] == [0, 1, 2]
    assert [record["step"] for record in history] == [6, 12, 18]
    best = min(history, key=lambda record: record["val/log_loss"])
    assert summary["best_epoch"] == best["epoch"] + 1
    assert summary["decision_threshold"] == 0.5
    assert summary["num_workers"] == 2
    assert any(p.name.startswith("events.out") for p in (run / "tensorboard").iterdir())
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["keras"].startswith("3.")
    require_nothing_left()
    # A second job reports the finished run and does not change it.
    before = (run / "model" / "model.keras").stat().st_mtime_ns
    assert fit(spec_in(folder)) == summary
    assert "run first is already finished" in capsys.readouterr().out
    assert (run / "model" / "model.keras").stat().st_mtime_ns == before
    with pytest.raises(JobError, match=r"other settings \(train\); choose another --run.name"):
        fit(spec_in(folder, train__epochs=4))


@pytest.mark.multiworker
def test_each_epoch_takes_its_rows_from_the_datasets(trained):
    folder, _ = trained
    read = rows_read(folder / "runs")
    assert read["in_place"] == 0
    for split in ("train", "validation"):
        # A row group of several windows is read several times.
        assert read[split] >= 3 * SIZES[split]


@pytest.mark.multiworker
def test_the_saved_model_and_its_serving_signature_are_calibrated_and_accept_raw_rows(trained):
    import tensorflow as tf

    from mm_model import load_model

    folder, summary = trained
    manifest = read_manifest(Folder(folder / "prepared"))
    rows = stored_rows(folder / "prepared", manifest, "validation")
    inputs = inputs_of(rows)
    assert np.isnan(inputs["numeric"]).any()
    model = load_model(folder / "runs" / "first" / "model" / "model.keras")
    expected = np.asarray(model(inputs))
    saved = tf.saved_model.load(str(folder / "runs" / "first" / "model" / "saved_model"))
    served = saved.signatures["serve"](**{k: tf.constant(v) for k, v in inputs.items()})
    np.testing.assert_allclose(served["probability"], expected, atol=1e-6)
    assert expected.std() > 0.001
    calibration = summary["calibration"]
    assert (calibration["scale"], calibration["bias"]) != (1.0, 0.0)
    loss = log_loss(np.log(expected / (1 - expected))[:, 0], rows["label"].to_numpy())
    assert loss == pytest.approx(summary["validation"]["log_loss"], rel=1e-4)
    assert loss < calibration["validation_log_loss_before"]


@pytest.mark.multiworker
@pytest.mark.slow
def test_calibration_does_not_increase_the_test_log_loss(trained):
    from mm_model import load_model
    from ray_jobs.evaluate.job import evaluate

    folder, summary = trained
    run, prepared = folder / "runs" / "first", folder / "prepared"
    spec = EvaluateSpec(run=str(run), data=str(prepared), output=str(folder / "evaluation"))
    metrics = evaluate(spec)
    model = load_model(run / "model" / "model.keras")
    assert float(model.calibration.bias) == pytest.approx(summary["calibration"]["bias"], rel=1e-6)
    rows = stored_rows(prepared, read_manifest(Folder(prepared)), "test")
    logits = np.asarray(model.head_logits(inputs_of(rows)), np.float64).mean(axis=1)
    assert metrics["num_rows"] == len(logits) == 23
    assert metrics["log_loss"] <= log_loss(logits, rows["label"].to_numpy())


@pytest.mark.multiworker
@pytest.mark.slow
def test_a_run_without_a_summary_resumes_and_writes_the_same_model(trained):
    folder, summary = trained
    run = folder / "runs" / "first"
    before = weights_of(run)
    (run / "summary.json").unlink()
    # The number of workers may change, since rows and steps do not depend on it.
    again = fit(spec_in(folder, train__num_workers=1))
    varying = {"train_s": 0, "num_workers": 0}
    assert {**again, **varying} == {**summary, **varying}
    for a, b in zip(before, weights_of(run), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len((run / "history.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_class_weights_are_removed_without_calibration(ray_local, tmp_path):
    prepared_in(tmp_path)
    changes = {"train.epochs": 1, "train.calibrate": False, "train.decision_threshold": "f1"}
    summary = fit(spec_in(tmp_path, train__num_workers=1).overlay(changes))
    negatives, positives = 67, 34
    assert summary["calibration"]["scale"] == 1.0
    assert summary["calibration"]["bias"] == pytest.approx(-np.log(negatives / positives))
    assert summary["calibration"]["blend"] == pytest.approx(
        {"image": 1 / 3, "numeric": 1 / 3, "joint": 1 / 3}
    )
    assert 0 < summary["decision_threshold"] < 1
    assert summary["decision_threshold"] != 0.5


@pytest.mark.multiworker
@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_user_sees_the_error_of_the_first_failed_worker(ray_local, tmp_path, num_workers):
    damage_image(tmp_path / "prepared", prepared_in(tmp_path), "train", shard=0, row=0)
    message = r"worker \d failed: .*image of row 'train-0' is damaged"
    # Without random operations, which are slow to trace.
    model = SCENARIOS["patience"]["model"]
    with pytest.raises(JobError, match=message) as error:
        fit(spec_in(tmp_path, train__num_workers=num_workers, model=model))
    assert "Traceback" not in str(error.value)
    require_nothing_left()


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        (
            {"data.categorical": ["colour"]},
            {},
            r"no vocabulary for colour of data\.categorical \(it has none\)",
        ),
        ({"train.global_batch_size": 128}, {}, "global_batch_size=128 exceeds the 101 rows"),
        (
            {},
            {"numeric_columns": (), "statistics": None},
            r"no numeric columns and no categories; set model\.numeric",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data_fail_before_workers_start(
    tmp_path, settings, data, message
):
    manifest = prepared_in(tmp_path).model_copy(update=data)
    with pytest.raises((JobError, ValueError), match=message):
        require_trainable(spec_in(tmp_path, **settings), manifest)


def test_data_without_numbers_is_accepted_by_a_model_without_numbers(tmp_path):
    manifest = prepared_in(tmp_path).model_copy(update={"numeric_columns": (), "statistics": None})
    require_trainable(spec_in(tmp_path, model__numeric__kind="none"), manifest)


def test_more_workers_than_cpus_are_rejected(ray_local, tmp_path):
    prepared_in(tmp_path)
    message = r"num_workers=16 .* need 17 CPUs .* the cluster has 5; lower"
    with pytest.raises(JobError, match=message):
        fit(spec_in(tmp_path, train__num_workers=16))


def test_an_error_about_a_missing_manifest_names_prepare(tmp_path):
    with pytest.raises(JobError, match=r"has no manifest\.json; run `python -m ray_jobs\.prepare`"):
        fit(spec_in(tmp_path))


@pytest.mark.slow
@pytest.mark.multiworker
def test_a_stopped_run_is_resumed_and_tracked_in_mlflow(ray_local, tmp_path):
    from mlflow.tracking import MlflowClient

    from ray_jobs.train.telemetry.mlflow_logger import EXPERIMENT

    prepared_in(tmp_path)
    spec = spec_in(tmp_path, run__tracking="mlflow", train__epochs=20, train__patience=20)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")

    def the_run() -> Any:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        (run,) = client.search_runs([experiment.experiment_id])
        return run

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with (
        after_the_first_checkpoint(tmp_path / "runs/first", stop),
        pytest.raises(Interrupted, match="run the same command again to resume"),
    ):
        fit(spec)
    assert the_run().info.status == "KILLED"
    summary = fit(spec)
    assert summary["epochs"] == 20
    lines = (tmp_path / "runs/first/history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(20))
    run = the_run()
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(20))
    require_nothing_left()


@pytest.mark.slow
@pytest.mark.multiworker
def test_a_run_that_loses_a_worker_ends_with_the_same_weights(trained, tmp_path):
    """Kills a worker with SIGKILL after the first checkpoint; all workers restart from it."""
    import ray
    from ray.util.state import list_actors

    folder, _ = trained
    spec = spec_in(folder, run__storage_path=str(tmp_path), train__max_failures=1)

    def kill_one_worker() -> None:
        # By address, since other clusters may run on this machine.
        address = ray.get_runtime_context().gcs_address
        alive = list_actors(address=address, filters=[("state", "=", "ALIVE")], detail=True)
        workers = [actor for actor in alive if actor.class_name == "RayTrainWorker"]
        os.kill(workers[-1].pid, signal.SIGKILL)

    with after_the_first_checkpoint(tmp_path / "first", kill_one_worker):
        fit(spec)
    for a, b in zip(
        weights_of(folder / "runs" / "first"), weights_of(tmp_path / "first"), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert len((tmp_path / "first" / "history.jsonl").read_text().splitlines()) == 3
