import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from mm_model.calibration import log_loss
from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.config.spec import EvaluateSpec, RunSpec
from ray_jobs.data.manifest import Manifest
from ray_jobs.train.job import fit
from tests.ray_jobs.tiny import write_prepared

RUN_FILES = {
    "checkpoints", "environment.json", "history.jsonl", "history.parquet", "manifest.json", "model",
    "run.yaml", "summary.json", "tensorboard",
}  # fmt: skip


def spec_in(folder: Path, **changes: Any) -> RunSpec:
    spec = RunSpec.model_validate(
        {
            "run": {"storage_path": str(folder / "runs"), "name": "first"},
            "data": {"prepared": str(folder / "prepared")},
            "model": {
                "image": {"kind": "tiny", "weights": None, "units": 16},
                "numeric": {"units": [16, 16]},
                "fusion": {"units": 16},
            },
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
    return write_prepared(folder / "prepared", {"train": 101, "validation": 37, "test": 23})


def weights_of(run: Path) -> list[np.ndarray]:
    from mm_model import load_model

    return load_model(run / "model" / "model.keras").get_weights()


def live_actors() -> list[Any]:
    import ray
    from ray.util.state import list_actors

    # By address, since other clusters may run on this machine.
    address = ray.get_runtime_context().gcs_address
    return list_actors(address=address, filters=[("state", "=", "ALIVE")], detail=True)


def require_empty_cluster() -> None:
    """Wait until Ray has removed all actors and placement groups, which it does after a job."""
    from ray.util import placement_group_table

    deadline = time.monotonic() + 60
    left: list[str] = ["not checked yet"]
    while left and time.monotonic() < deadline:
        states = [group["state"] for group in placement_group_table().values()]
        left = [state for state in states if state != "REMOVED"]
        # Ray Data's detached actors, without CPUs, live as long as the cluster.
        left += [actor.class_name for actor in live_actors() if not actor.is_detached]
        time.sleep(0.2)
    assert left == []


@pytest.fixture(scope="module")
def trained(ray_local, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("train")
    prepared_in(folder)
    return folder, fit(spec_in(folder))


@pytest.mark.multiworker
def test_a_run_writes_its_folder_and_leaves_an_empty_cluster(trained):
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
    require_empty_cluster()


@pytest.mark.multiworker
def test_the_saved_model_and_its_serving_signature_accept_raw_rows(trained):
    import tensorflow as tf

    from mm_model import load_model
    from ray_jobs.data.images import decode_stored

    folder, _ = trained
    table = pq.read_table(folder / "prepared" / "test")
    image = np.stack([decode_stored(content) for content in table["image"].to_pylist()])
    numbers = np.stack(
        [table[n].to_numpy().astype(np.float32) for n in ("alpha", "beta", "row")], axis=1
    )
    assert np.isnan(numbers).any()
    model = load_model(folder / "runs" / "first" / "model" / "model.keras")
    expected = np.asarray(model({"image": image, "numeric": numbers}))
    saved = tf.saved_model.load(str(folder / "runs" / "first" / "model" / "saved_model"))
    served = saved.signatures["serve"](image=tf.constant(image), numeric=tf.constant(numbers))
    np.testing.assert_allclose(served["probability"], expected, atol=1e-6)
    assert expected.std() > 0.001


@pytest.mark.multiworker
def test_calibration_does_not_increase_the_test_log_loss(trained):
    from mm_model import load_model
    from ray_jobs.evaluate.job import evaluate

    folder, summary = trained
    run = folder / "runs" / "first"
    metrics = evaluate(
        EvaluateSpec(run=str(run), data=str(folder / "prepared"), output=str(folder / "evaluation"))
    )
    scale, bias = summary["calibration"]["scale"], summary["calibration"]["bias"]
    assert (scale, bias) != (1.0, 0.0)
    model = load_model(run / "model" / "model.keras")
    assert float(model.calibration.bias) == pytest.approx(bias, rel=1e-6)
    table = pq.read_table(folder / "prepared" / "test")
    from ray_jobs.data.images import decode_stored

    logits = np.asarray(
        model.head_logits(
            {
                "image": np.stack([decode_stored(c) for c in table["image"].to_pylist()]),
                "numeric": np.stack(
                    [table[n].to_numpy().astype(np.float32) for n in ("alpha", "beta", "row")],
                    axis=1,
                ),
            }
        ),
        np.float64,
    )
    before = log_loss(logits.mean(axis=1), table["label"].to_numpy())
    assert metrics["num_rows"] == 23
    assert metrics["log_loss"] <= before


@pytest.mark.multiworker
def test_a_finished_run_is_reported_and_not_changed(trained, capsys):
    folder, summary = trained
    model = folder / "runs" / "first" / "model" / "model.keras"
    before = model.stat().st_mtime_ns
    assert fit(spec_in(folder)) == summary
    assert "run first is already finished" in capsys.readouterr().out
    assert model.stat().st_mtime_ns == before


@pytest.mark.multiworker
def test_another_spec_under_the_same_name_is_rejected(trained):
    folder, _ = trained
    with pytest.raises(JobError, match=r"other settings \(train\); choose another --run.name"):
        fit(spec_in(folder, train__epochs=4))


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
    summary = fit(
        spec_in(
            tmp_path,
            train__num_workers=1,
            train__epochs=1,
            train__calibrate=False,
            train__decision_threshold="f1",
        )
    )
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
    manifest = prepared_in(tmp_path)
    shard = tmp_path / "prepared" / manifest.splits["train"].shards[0].path
    table = pq.read_table(shard)
    images = [b"no jpeg", *table["image"].to_pylist()[1:]]
    at = table.column_names.index("image")
    pq.write_table(table.set_column(at, "image", [images]), shard, row_group_size=5)
    path = tmp_path / "prepared" / "manifest.json"
    tree = json.loads(path.read_text())
    tree["splits"]["train"]["shards"][0]["num_bytes"] = shard.stat().st_size
    path.write_text(json.dumps(tree))
    message = r"worker \d failed: .*image of row 'train-0' is damaged"
    with pytest.raises(JobError, match=message) as error:
        fit(spec_in(tmp_path, train__num_workers=num_workers))
    assert "Traceback" not in str(error.value)
    require_empty_cluster()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.categorical": ["colour"]},
            r"no vocabulary for colour of data\.categorical \(it has none\)",
        ),
        ({"train.global_batch_size": 128}, "global_batch_size=128 exceeds the 101 rows"),
    ],
)
def test_settings_that_do_not_fit_the_data_fail_before_workers_start(tmp_path, changes, message):
    from ray_jobs.train.job import require_trainable

    manifest = prepared_in(tmp_path)
    with pytest.raises((JobError, ValueError), match=message):
        require_trainable(spec_in(tmp_path, **changes), manifest)


def test_missing_numeric_columns_fail_before_workers_start(tmp_path):
    from ray_jobs.train.job import require_trainable

    bare = {"numeric_columns": (), "statistics": None}
    manifest = prepared_in(tmp_path).model_copy(update=bare)
    with pytest.raises(JobError, match=r"no numeric columns and no categories; set model\.numeric"):
        require_trainable(spec_in(tmp_path), manifest)
    require_trainable(spec_in(tmp_path, **{"model.numeric.kind": "none"}), manifest)


def test_more_workers_than_cpus_are_rejected(ray_local, tmp_path):
    prepared_in(tmp_path)
    with pytest.raises(
        JobError, match=r"num_workers=16 .* need 17 CPUs .* the cluster has 5; lower"
    ):
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

    ended = threading.Event()

    def stop() -> None:
        while not list((tmp_path / "runs/first/checkpoints").glob("steps/*/state.json")):
            if ended.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    try:
        with pytest.raises(Interrupted, match="run the same command again to resume"):
            fit(spec)
    finally:
        ended.set()
        stopper.join()
    assert the_run().info.status == "KILLED"
    summary = fit(spec)
    assert summary["epochs"] == 20
    lines = (tmp_path / "runs/first/history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(20))
    run = the_run()
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(20))
    require_empty_cluster()


@pytest.mark.slow
@pytest.mark.multiworker
def test_a_run_that_loses_a_worker_ends_with_the_same_weights(trained, tmp_path):
    """Kills a worker with SIGKILL after the first checkpoint; all workers restart from it."""
    folder, _ = trained
    spec = spec_in(folder, run__storage_path=str(tmp_path), train__max_failures=1)
    killed = threading.Event()

    def kill_one_worker() -> None:
        checkpoints = tmp_path / "first" / "checkpoints"
        while not list(checkpoints.glob("steps/*/state.json")):
            if killed.wait(0.05):
                return
        workers = [actor for actor in live_actors() if actor.class_name == "RayTrainWorker"]
        os.kill(workers[-1].pid, signal.SIGKILL)
        killed.set()

    killer = threading.Thread(target=kill_one_worker, daemon=True)
    killer.start()
    try:
        fit(spec)
    finally:
        was_killed = killed.is_set()
        killed.set()
        killer.join()
    assert was_killed
    for a, b in zip(
        weights_of(folder / "runs" / "first"), weights_of(tmp_path / "first"), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert len((tmp_path / "first" / "history.jsonl").read_text().splitlines()) == 3
