from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.neighbors import NearestNeighbors

from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import EvaluateSpec, PredictSpec
from ray_jobs.config.spec import DataSpec, RunSpec
from ray_jobs.data.manifest import Manifest
from ray_jobs.evaluate.job import evaluate
from ray_jobs.predict.job import predict
from ray_jobs.predict.predictor import Predictor
from ray_jobs.predict.row_distance import RowDistance
from ray_jobs.predict.row_sources import PreparedRows
from ray_jobs.predict.trained_run import open_run
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import EMBEDDINGS, write_embeddings
from tests.ray_jobs.tiny import write_prepared
from tests.ray_jobs.trained import write_run

RNG = np.random.default_rng(0)
TRAIN, VALIDATION, ROWS = (
    [RNG.normal(size=(n, 5)), 100 * RNG.normal(size=(n, 3))] for n in (300, 200, 50)
)


def test_the_distance_is_that_of_the_10th_neighbor_in_units_of_the_validation_rows():
    def expected(rows: list[np.ndarray]) -> np.ndarray:
        relative = []
        for train, validation, row in zip(TRAIN, VALIDATION, rows, strict=True):
            tree = NearestNeighbors(n_neighbors=10).fit(train)
            distances = [tree.kneighbors(each)[0][:, -1] for each in (row, validation)]
            relative.append(distances[0] / np.quantile(distances[1], 0.99))
        return np.max(relative, axis=0)

    distance = RowDistance(TRAIN, VALIDATION)
    unit = np.quantile(expected(VALIDATION), 0.99)
    np.testing.assert_allclose(distance(ROWS), expected(ROWS) / unit, rtol=1e-6)
    assert np.mean(distance(VALIDATION) > 1) == pytest.approx(0.01)


def test_a_row_that_is_far_for_one_head_is_far():
    distance = RowDistance(TRAIN, VALIDATION)
    far = [rows.copy() for rows in ROWS]
    far[1][7] += 1000
    before, after = distance(ROWS), distance(far)
    assert after[7] > 2 > before[7]
    np.testing.assert_array_equal(np.delete(after, 7), np.delete(before, 7))


def test_equal_rows_have_a_finite_distance():
    same = [np.ones((4, 2))]
    distance = RowDistance(same, same)
    assert distance(same).tolist() == [0.0] * 4
    assert distance([np.zeros((1, 2))])[0] > 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Manifest]:
    """A folder with `prepared` data and a `run` that stores embeddings."""
    folder = tmp_path_factory.mktemp("distance")
    manifest = write_prepared(
        folder / "prepared", {"train": 300, "validation": 150, "test": 100}, weights=(1, 2)
    )
    model = write_run(folder / "run", manifest)
    spec = RunSpec(data=DataSpec(prepared=str(folder / "prepared")))
    write_embeddings(Folder(folder / "run"), model, spec, manifest)
    return folder, manifest


def test_noise_is_far_from_the_training_rows(finished, predict_here):
    folder, manifest = finished
    run, spec = open_run(str(folder / "run")), PredictSpec(run="", data="", output="")
    source = PreparedRows(run, Folder(folder / "prepared"), manifest, ["test"], spec)
    rows = pa.concat_tables(part for task in source.tasks() for part in source.read(task))
    predictor = Predictor(run, 16, 1, False, with_distance=True)
    index = rows.column_names.index("image")
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, 16 * 16 * 3).astype(np.uint8).tobytes() for _ in range(100)]
    noisy = rows.set_column(index, rows.field(index), pa.array(noise, rows.field(index).type))
    usual, far = (
        pa.concat_tables(predictor(each))["distance"].to_numpy() for each in (rows, noisy)
    )
    assert np.mean(usual > 1) <= 0.05
    assert np.mean(far > 1) >= 0.8  # the model is untrained


def test_distances_are_predicted_and_reported(finished, predict_here, tmp_path, capsys):
    folder, _ = finished
    settings = {"run": str(folder / "run"), "data": str(folder / "prepared"), "split": "test"}
    predict(PredictSpec(**settings, output=str(tmp_path / "predictions"), distance=True))
    predicted = pq.read_table(tmp_path / "predictions")
    assert predicted.column_names[-1] == "distance"
    distance = predicted["distance"].to_numpy()
    num_far = int((distance > 1).sum())
    found = evaluate(EvaluateSpec(**settings, output=str(tmp_path / "eval"), explain="none"))
    assert found["num_unfamiliar"] == num_far
    assert set(found["training_gap"]) == {"training", "validation", "difference", "low", "high"}
    rows = pq.read_table(tmp_path / "eval/rows.parquet")
    written = rows["column_(distance from the training rows)"].to_numpy()
    np.testing.assert_allclose(written, distance, rtol=1e-5)


def test_a_run_without_embeddings_has_no_distances(finished, no_ray, tmp_path):
    folder, manifest = finished
    write_run(tmp_path / "run", manifest)
    spec = PredictSpec(
        run=str(tmp_path / "run"), data=str(folder / "prepared"), output="", distance=True
    )
    with pytest.raises(JobError, match=f"--distance=true needs {EMBEDDINGS}, which .* lacks"):
        predict(spec)
