import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from ray_jobs.config.errors import JobError
from ray_jobs.storage.folder import Folder
from ray_jobs.train.telemetry import history_keys as keys
from ray_jobs.train.telemetry.history import Tracker, require_tracking
from ray_jobs.train.telemetry.mlflow_logger import EXPERIMENT, mask_credentials
from tests.ray_jobs.epochs import record, spec_in, write_epochs
from tests.ray_jobs.heads import free_ports


def client_of(folder: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")


def only_run(folder: Path) -> Any:
    """Return the only run of the store."""
    client = client_of(folder)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def points(folder: Path, key: str) -> list[tuple[int, float]]:
    run_id = only_run(folder).info.run_id
    return sorted((m.step, m.value) for m in client_of(folder).get_metric_history(run_id, key))


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mlflow")
    client_of(folder).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def runs(empty_store, tmp_path) -> Path:
    """A folder for runs with an initialized MLflow store, which takes seconds to create."""
    shutil.copy(empty_store, tmp_path)
    return tmp_path


def write_run_files(folder: Path) -> None:
    (folder / "model/saved_model").mkdir(parents=True)
    (folder / "model/model.keras").write_bytes(b"model \xff")
    (folder / "model/saved_model/saved_model.pb").write_bytes(b"graph")
    for name in ("run.yaml", "manifest.json", "environment.json", "summary.json"):
        (folder / name).write_text('{"git_revision": "abc", "uri": "s3://key:hunter2@bucket/x"}')


def test_a_finished_run_has_its_settings_epochs_and_files_without_secrets(runs, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "swordfish")
    columns = [f"column_{i:04d}" for i in range(1000)]
    spec = spec_in(runs, train__learning_rate=0.002, data__categorical=columns)
    spec = spec.overlay({"data.prepared": "s3://hunter2@bucket/prepared"})
    write_run_files(runs / "first")
    summary = {"best_epoch": 2, "validation": {"roc_auc": 0.75, "class_counts": [3, 4]}}
    with Tracker(Folder(runs / "first"), spec) as tracker:
        assert only_run(runs).info.status == "RUNNING"
        write_epochs(tracker, 0, 3)
        tracker.finish(summary)
    run = only_run(runs)
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["train.learning_rate"] == "0.002"
    assert run.data.params["model.numeric.units"] == "[256, 128]"
    assert run.data.params["run.tracking_uri"] == "none"
    assert run.data.params["data.prepared"] == "s3://***@bucket/prepared"
    assert len(run.data.params) > 80
    too_long = run.data.params["data.categorical"]
    assert len(too_long) == 6000
    assert too_long.startswith('["column_0000", "column_0001"')
    assert too_long.endswith("…")
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert points(runs, keys.TRAIN_LOSS) == [(0, 0.5), (1, 0.25), (2, 0.5 / 3)]
    assert set(run.data.metrics) == {
        keys.TRAIN_LOSS, keys.STEP, "summary/best_epoch", "summary/validation/roc_auc",
    }  # fmt: skip
    artifacts = runs / "mlflow-artifacts" / run.info.run_id / "artifacts"
    assert {str(p.relative_to(artifacts)) for p in artifacts.rglob("*") if p.is_file()} == {
        "run.yaml", "manifest.json", "environment.json", "history.jsonl", "history.parquet",
        "summary.json", "model/model.keras", "model/saved_model/saved_model.pb",
    }  # fmt: skip
    assert (artifacts / "model/model.keras").read_bytes() == b"model \xff"
    assert pq.read_table(artifacts / "history.parquet").num_rows == 3
    for path in (runs / "mlflow.db", *filter(Path.is_file, artifacts.rglob("*"))):
        assert b"hunter2" not in path.read_bytes()
        assert b"swordfish" not in path.read_bytes()


def test_a_resumed_run_is_the_same_run_with_one_point_per_epoch(runs):
    spec = spec_in(runs)

    def fail() -> None:
        with Tracker(Folder(runs / "first"), spec) as tracker:
            write_epochs(tracker, 0, 3)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    failed = only_run(runs)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["failure"] == "RuntimeError: out of memory"
    # A run can be resumed with another number of workers, but MLflow does not overwrite parameters.
    spec = spec.overlay({"train.num_workers": 2})
    with Tracker(Folder(runs / "first"), spec) as tracker:
        assert only_run(runs).info.status == "RUNNING"
        assert "failure" not in only_run(runs).data.tags
        write_epochs(tracker, 2, 5, attempt=7)
        tracker.finish({})
    run = only_run(runs)
    assert (run.info.run_id, run.info.status) == (failed.info.run_id, "FINISHED")
    losses = [record(e)[keys.TRAIN_LOSS] for e in range(3)]
    losses += [record(e, attempt=7)[keys.TRAIN_LOSS] for e in (3, 4)]
    assert points(runs, keys.TRAIN_LOSS) == list(enumerate(losses))
    assert run.data.params["train.num_workers"] == "1"


def test_the_driver_marks_a_run_whose_workers_died_as_failed_and_a_stopped_one_as_killed(runs):
    spec, folder = spec_in(runs), Folder(runs / "first")
    Tracker(folder, spec).fail("before the run was opened")
    assert client_of(runs).get_experiment_by_name(EXPERIMENT) is None
    with Tracker(folder, spec) as tracker:
        write_epochs(tracker, 0, 1)
    assert only_run(runs).info.status == "RUNNING"
    Tracker(folder, spec).fail("worker 1 died; it read s3://key:hunter2@b/x")
    assert only_run(runs).info.status == "FAILED"
    assert only_run(runs).data.tags["failure"] == "worker 1 died; it read s3://***@b/x"
    Tracker(folder, spec).stop()
    assert only_run(runs).info.status == "KILLED"
    with Tracker(folder, spec):
        assert only_run(runs).info.status == "RUNNING"


def test_finishing_logs_epochs_that_are_missing_in_the_store(runs):
    spec, folder = spec_in(runs), Folder(runs / "first")
    with Tracker(folder, spec) as tracker:
        write_epochs(tracker, 0, 1)
    without = spec_in(runs, "none")
    with Tracker(folder, without) as tracker:
        write_epochs(tracker, 1, 3)
    Tracker(folder, spec).finish({"train_s": 1.0})
    assert [step for step, _ in points(runs, keys.TRAIN_LOSS)] == [0, 1, 2]
    assert only_run(runs).info.status == "FINISHED"


def test_a_finished_run_stays_finished_until_it_is_resumed(runs):
    spec, folder = spec_in(runs), Folder(runs / "first")
    with Tracker(folder, spec) as tracker:
        write_epochs(tracker, 0, 1)
        tracker.finish({"train_s": 1.0})
    finished = only_run(runs)
    Tracker(folder, spec).finish({"train_s": 2.0})
    Tracker(folder, spec).stop()
    Tracker(folder, spec).fail("a second Ctrl-C")
    assert points(runs, "summary/train_s") == [(0, 1.0)]
    assert only_run(runs).to_dictionary() == finished.to_dictionary()
    with Tracker(folder, spec) as tracker:
        assert only_run(runs).info.status == "RUNNING"
        tracker.finish({})
    assert only_run(runs).info.status == "FINISHED"


def test_an_outage_of_the_store_is_one_warning_and_loses_nothing(runs):
    spec, warnings = spec_in(runs), []
    store = runs / "mlflow.db"
    with Tracker(Folder(runs / "first"), spec, warnings.append) as tracker:
        write_epochs(tracker, 0, 1)
        whole = store.read_bytes()
        store.write_bytes(b"no database any more" * 1000)
        write_epochs(tracker, 1, 3)
        assert len((runs / "first/history.jsonl").read_text().splitlines()) == 3
        (warning,) = warnings
        assert warning.startswith("could not write to MLflow (")
        assert "\n" not in warning
        store.write_bytes(whole)
        write_epochs(tracker, 3, 4)
        tracker.finish({})
    assert [step for step, _ in points(runs, keys.TRAIN_LOSS)] == [0, 1, 2, 3]
    assert only_run(runs).info.status == "FINISHED"
    assert len(warnings) == 1


def test_a_server_that_does_not_answer_prevents_a_run_but_does_not_end_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    warnings: list[str] = []
    (port,) = free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    spec = spec_in(tmp_path, run__tracking_uri=uri)
    with pytest.raises(JobError, match=rf"could not connect to MLflow at {uri}"):
        require_tracking(spec)
    with Tracker(Folder(tmp_path / "first"), spec, warnings.append) as tracker:
        write_epochs(tracker, 0, 2)
        tracker.finish({})
    assert len(warnings) == 1
    assert len((tmp_path / "first/history.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pass@host:5000/x", "http://***@host:5000/x"),
        ("at https://token@host and s3://k:s@b", "at https://***@host and s3://***@b"),
        ("http://host/a@b", "http://host/a@b"),
        ("mail@host.org", "mail@host.org"),
    ],
)
def test_credentials_in_uris_are_masked(text, shown):
    assert mask_credentials(text) == shown


def test_a_number_that_is_not_finite_is_null_in_json_and_not_logged_to_mlflow(runs):
    epoch = record(0, **{keys.STEP_S: float("inf")})
    with Tracker(Folder(runs / "first"), spec_in(runs)) as tracker:
        tracker.write((epoch,))
    line = json.loads((runs / "first/history.jsonl").read_text())
    assert line == {**epoch, keys.STEP_S: None}
    table = pq.read_table(runs / "first/history.parquet")
    assert table[keys.STEP_S].to_pylist() == [float("inf")]
    assert points(runs, keys.STEP_S) == []
    assert points(runs, keys.TRAIN_LOSS) == [(0, 0.5)]


# -- before the run -------------------------------------------------------------------------------


def test_the_store_is_created_before_the_run_and_its_uri_set_in_the_spec(tmp_path, monkeypatch):
    """The setting comes first, then the environment variable, then a file in the runs' folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    spec = require_tracking(spec_in(tmp_path))
    assert spec.run.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert client_of(tmp_path).get_experiment_by_name(EXPERIMENT) is not None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///there/of_all.db")
    assert require_tracking(spec) == spec
    there = require_tracking(spec_in(tmp_path))
    assert there.run.tracking_uri == f"sqlite:///{tmp_path}/there/of_all.db"
    assert (tmp_path / "there/of_all.db").exists()


CREDENTIALS = "https://me:hunter2@host/mlflow"
NO_CREDENTIALS = r"https://\*\*\*@host/mlflow contains credentials.*MLFLOW_TRACKING_PASSWORD"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (
            "storage_path",
            "memory://runs",
            r"needs a local run\.storage_path .*; set run\.tracking_uri to an MLflow",
        ),
        ("tracking_uri", "mlruns", r"tracking_uri=mlruns .*; use sqlite:////.*mlruns/mlflow"),
        ("tracking_uri", "file:///a", r"tracking_uri=file:///a .*; use sqlite:////a/mlflow"),
        ("tracking_uri", CREDENTIALS, NO_CREDENTIALS),
        ("variable", CREDENTIALS, NO_CREDENTIALS),
    ],
)
def test_an_unsuitable_location_is_rejected_with_an_alternative(
    tmp_path, monkeypatch, setting, value, message
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    spec = spec_in(tmp_path)
    if setting == "variable":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    else:
        spec = spec.overlay({f"run.{setting}": value})
    with pytest.raises(JobError, match=message) as error:
        require_tracking(spec)
    assert "hunter2" not in str(error.value)


def test_a_missing_package_is_reported_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(JobError, match=r"packages that are not installed .*\.\[mlflow\]"):
        require_tracking(spec_in(tmp_path))


def test_two_runs_that_open_the_store_at_the_same_time_share_its_experiment(runs, monkeypatch):
    class Late(MlflowClient):
        """Does not find the experiment at first, as if another run were just creating it."""

        looked = False

        def get_experiment_by_name(self, name: str) -> Any:
            if Late.looked:
                return super().get_experiment_by_name(name)
            Late.looked = True
            return None

    made = client_of(runs).create_experiment(EXPERIMENT)
    monkeypatch.setattr("mlflow.tracking.MlflowClient", Late)
    with Tracker(Folder(runs / "first"), spec_in(runs)):
        assert only_run(runs).info.experiment_id == made


def test_mlflow_sends_no_usage_statistics(runs, monkeypatch):
    from mlflow.telemetry import utils

    for name in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(utils, "_IS_IN_CI_ENV_OR_TESTING", False)
    assert not utils.is_telemetry_disabled()
    require_tracking(spec_in(runs))
    assert utils.is_telemetry_disabled()
