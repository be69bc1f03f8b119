import io
import json
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_jobs.cluster import connection
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import EvaluateSpec
from ray_jobs.data.manifest import Manifest
from ray_jobs.evaluate.job import evaluate
from ray_jobs.predict.predictor import Predictor
from ray_jobs.predict.row_sources import PreparedRows, rows_per_task
from ray_jobs.predict.trained_run import open_run
from ray_jobs.storage.folder import Folder
from ray_jobs.train.metrics import binary_metrics
from tests.ray_jobs.tiny import COLUMNS, write_prepared
from tests.ray_jobs.trained import (
    THRESHOLD,
    damage_image,
    probabilities,
    stored_rows,
    write_run,
)

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
    }
    return EvaluateSpec(**(fields | changes))


def assert_no_actors_are_left() -> None:
    """Check that no actor of Ray Data and no placement group is left."""
    import ray
    from ray.util import placement_group_table
    from ray.util.state import list_actors

    def actors() -> list[str]:
        address = ray.get_runtime_context().gcs_address
        alive = [a.class_name for a in list_actors(address=address) if a.state != "DEAD"]
        return [name for name in alive if name.startswith("MapWorker")]

    # Actors stop asynchronously.
    deadline = time.monotonic() + 10
    while actors() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not actors()
    assert all(group["state"] == "REMOVED" for group in placement_group_table().values())


@pytest.mark.parametrize("num_workers", [1, 2])
def test_each_row_counts_once_with_any_number_of_workers(
    prepared_run, ray_local, num_workers, tmp_path
):
    folder, manifest, model = prepared_run
    found = evaluate(spec_of(folder, num_workers=num_workers, output=str(tmp_path)))

    rows = stored_rows(folder / "prepared", manifest, "test")
    probability = probabilities(model, rows, manifest)
    assert len(set(probability)) == NUM_TEST_ROWS
    expected = binary_metrics(rows["label"].to_numpy(), probability, THRESHOLD)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.ravel(found[name]) == pytest.approx(np.ravel(value), abs=1e-6), name
    assert np.sum(found["confusion"]) == found["num_rows"] == NUM_TEST_ROWS

    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    names = ["calibration.png", "confusion.png", "metrics.json", "pr.png", "roc.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with Image.open(io.BytesIO((tmp_path / "roc.png").read_bytes())) as image:
        assert np.ptp(np.asarray(image)) > 100

    assert_no_actors_are_left()


def test_the_error_for_a_damaged_image_names_its_shard_and_row(prepared_run, ray_local, tmp_path):
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
    assert_no_actors_are_left()
    assert raised.value.__traceback__


@pytest.fixture
def no_ray(monkeypatch):
    """Fail if the job connects to a cluster before it reports an error."""

    def connected(*_, **__):
        raise AssertionError("the job connected to a cluster")

    monkeypatch.setattr(connection, "connected", connected)


def test_a_folder_without_a_run_is_rejected(prepared_run, no_ray, tmp_path):
    folder, _, _ = prepared_run
    with pytest.raises(JobError, match=r"is not a run folder: it has no manifest\.json"):
        evaluate(spec_of(folder, run=str(tmp_path / "nowhere")))


def test_an_unfinished_run_is_rejected(prepared_run, no_ray, tmp_path):
    folder, manifest, _ = prepared_run
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
            {"numeric_columns": (COLUMNS[0], "delta", COLUMNS[2])},
            rf"of its numeric columns, \['{COLUMNS[1]}'\] are missing and \['delta'\] are unknown",
        ),
        (
            {"numeric_columns": COLUMNS[::-1]},
            rf"the order .* is \['{COLUMNS[2]}', .*'{COLUMNS[0]}'\], not \['{COLUMNS[0]}', ",
        ),
        (
            {"image": {"height": 32, "width": 32}},
            "its images have 32 × 32 pixels, not 16 × 16 pixels",
        ),
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


def test_the_inputs_of_a_model_are_read_from_its_file(prepared_run, tmp_path):
    folder, manifest, _ = prepared_run
    assert open_run(str(folder / "run")).input_shapes == {
        "image": (16, 16, 3),
        "numeric": (3,),
    }
    write_run(tmp_path / "image", manifest, numeric="none")
    assert open_run(str(tmp_path / "image")).input_shapes == {"image": (16, 16, 3)}
    write_run(tmp_path / "numeric", manifest, image="none")
    assert open_run(str(tmp_path / "numeric")).input_shapes == {"numeric": (3,)}


@pytest.mark.parametrize(
    ("num_rows", "workers", "expected"),
    [(47, 1, 8), (47, 2, 4), (3, 1, 4), (100_000, 2, 512), (400, 1, 100)],
)
def test_a_task_has_whole_batches_and_each_worker_several_tasks(num_rows, workers, expected):
    spec = EvaluateSpec(run="", data="", output="", batch_size=4, num_workers=workers)
    assert rows_per_task(num_rows, spec) == expected


@pytest.mark.parametrize("kinds", [("tiny", "mlp"), ("tiny", "none"), ("none", "mlp")])
def test_a_model_is_traced_once_and_receives_only_its_inputs(
    prepared_run, monkeypatch, tmp_path, kinds
):
    folder, manifest, _ = prepared_run
    model = write_run(tmp_path / "run", manifest, *kinds)
    # TensorFlow is already initialized in this process, so its threads cannot be set.
    monkeypatch.setattr("ray_jobs.cluster.strategy.set_devices", lambda num_cpus, use_gpu: None)
    run = open_run(str(tmp_path / "run"))
    source = PreparedRows(run, Folder(folder / "prepared"), manifest, ["test"], spec_of(folder))
    loaded = Predictor(run, batch_size=4, num_cpus=1, use_gpu=False)
    found = [
        (row["key"], row["probability"])
        for task in source.tasks()
        for rows in source.read(task)
        for table in loaded(rows)
        for row in table.to_pylist()
    ]
    rows = stored_rows(folder / "prepared", manifest, "test")
    assert [key for key, _ in found] == rows["key"].to_pylist()
    expected = probabilities(model, rows, manifest)
    np.testing.assert_allclose([p for _, p in found], expected, atol=1e-6)
    assert loaded.predict.experimental_get_tracing_count() == 1
    one_task = next(source.read(source.tasks()[0]))
    assert ("image" in one_task.column_names) == (kinds[0] != "none")
    assert ("numeric" in one_task.column_names) == (kinds[1] != "none")


def test_a_damaged_model_ends_the_job_with_a_one_line_error(prepared_run, monkeypatch, tmp_path):
    folder, manifest, _ = prepared_run
    monkeypatch.setattr("ray_jobs.cluster.strategy.set_devices", lambda num_cpus, use_gpu: None)
    shutil.copytree(folder / "run", tmp_path / "run")
    whole = tmp_path / "run/model/model.keras"
    with zipfile.ZipFile(folder / "run/model/model.keras") as file:
        config = file.read("config.json")
    with zipfile.ZipFile(whole, "w") as file:
        file.writestr("config.json", config)
        file.writestr("metadata.json", "{}")
        file.writestr("model.weights.h5", b"no weights")
    run = open_run(str(tmp_path / "run"))
    source = PreparedRows(run, Folder(folder / "prepared"), manifest, ["test"], spec_of(folder))
    rows = next(source.read(source.tasks()[0]))
    (table,) = Predictor(run, 64, 1, False)(rows)
    (failure,) = table["failure"].to_pylist()
    assert failure.startswith(f"could not load {whole}: Unable to")


def test_a_probability_that_is_not_finite_becomes_an_error(prepared_run, monkeypatch, tmp_path):
    folder, manifest, _ = prepared_run
    monkeypatch.setattr("ray_jobs.cluster.strategy.set_devices", lambda num_cpus, use_gpu: None)
    model = write_run(tmp_path / "run", manifest, image="none")
    model.calibration.set([float("nan")])
    model.save(tmp_path / "run/model/model.keras")
    run = open_run(str(tmp_path / "run"))
    source = PreparedRows(run, Folder(folder / "prepared"), manifest, ["test"], spec_of(folder))
    rows = next(source.read(source.tasks()[0]))
    (table,) = Predictor(run, 64, 1, False)(rows)
    assert table["probability"].null_count == table.num_rows
    assert set(table["error"].to_pylist()) == {"the model's probability is not finite"}
