"""All jobs with several images per row, categorical columns and both image formats."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import csv

from ray_jobs.config.inference_spec import EvaluateSpec, PredictSpec
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.evaluate.job import evaluate
from ray_jobs.predict.job import predict
from ray_jobs.prepare.job import prepare
from ray_jobs.storage.folder import Folder
from ray_jobs.train.job import fit

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.multiworker, pytest.mark.slow]

NAMES = ("front", "back", "side")
WORDS = ("brick", "wood", "clay")
NUM_ROWS = 120


def write_raw(folder: Path) -> None:
    """Some rows lack one of three images; the category determines most of the labels."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    words = rng.choice(WORDS, NUM_ROWS)
    label = ((words == "wood") ^ (rng.random(NUM_ROWS) < 0.1)).astype(int)
    for i in range(NUM_ROWS):
        for n, name in enumerate(NAMES):
            if (i + n) % 5:
                pixels = rng.integers(0, 80, (20, 20, 3)) + 80 * (name == "side") * label[i]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}_{name}.jpg")
    table = pa.table(
        {
            "key": [str(i) for i in range(NUM_ROWS)],
            "area": np.where(np.arange(NUM_ROWS) % 7, rng.normal(size=NUM_ROWS), np.nan),
            "material": [None if i % 9 == 0 else word for i, word in enumerate(words.tolist())],
            "label": label,
        }
    )
    csv.write_csv(table, folder / "table.csv")


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def trained(request, ray_local, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    write_raw(folder / "photos")
    spec = RunSpec.model_validate(
        {
            "run": {"storage_path": str(folder / "runs"), "name": "all"},
            "prepare": {
                "images": str(folder / "photos"),
                "table": str(folder / "photos" / "table.csv"),
                "output": str(folder / "prepared"),
                "image_columns": NAMES,
                "image_pattern": "{key}_{image}.jpg",
                "image_size": 32,
                "store": request.param,
                "validation_fraction": 0.25,
                "test_fraction": 0.25,
                "rows_per_group": 7,
            },
            "data": {
                "prepared": str(folder / "prepared"),
                "categorical": ["material"],
                "image_size": 16,
                # Each place of decoding is used once.
                "decode": "workers" if request.param == "raw" else "trainer",
            },
            "model": {
                "image": {"kind": "tiny", "weights": None, "units": 8},
                "numeric": {"units": [16]},
                "fusion": {"units": 16},
            },
            "train": {
                "num_workers": 2, "global_batch_size": 12, "epochs": 12, "learning_rate": 0.01,
            },
        }
    )  # fmt: skip
    prepare(spec)
    return folder, fit(spec)


def predict_rows(folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    output = folder / "predictions"
    predict(PredictSpec(run=str(folder / "runs/all"), output=str(output), **options))
    return {row["key"]: row for row in pq.read_table(output).to_pylist()}


def test_the_model_uses_all_inputs_and_is_evaluated_on_every_row(trained, tmp_path):
    folder, summary = trained
    manifest = read_manifest(Folder(folder / "prepared"))
    assert manifest.image.columns == ("image_front", "image_back", "image_side")
    assert manifest.vocabularies[0].words == tuple(sorted(WORDS))
    assert summary["validation"]["roc_auc"] > 0.8
    metrics = evaluate(
        EvaluateSpec(
            run=str(folder / "runs/all"), data=str(folder / "prepared"), output=str(tmp_path)
        )
    )
    assert metrics["num_rows"] == manifest.splits["test"].num_rows
    assert metrics["roc_auc"] > 0.7


def test_raw_and_prepared_rows_have_the_same_probabilities(trained):
    folder, _ = trained
    prepared = predict_rows(folder, data=str(folder / "prepared"), num_workers=1)
    raw = predict_rows(
        folder,
        data=str(folder / "photos" / "table.csv"),
        images=str(folder / "photos" / "{key}_{image}.jpg"),
    )
    assert set(raw) == {str(i) for i in range(NUM_ROWS)}
    assert set(prepared) == set(raw)
    for key, row in prepared.items():
        assert raw[key]["error"] is row["error"] is None
        assert raw[key]["probability"] == pytest.approx(row["probability"], abs=1e-6)


def test_an_unknown_category_is_accepted_and_a_damaged_image_is_an_error(trained, tmp_path):
    folder, _ = trained
    photos = sorted((folder / "photos").glob("*_front.jpg"))
    for key in ("new", "bad"):
        (tmp_path / f"{key}_front.jpg").write_bytes(photos[0].read_bytes())
    (tmp_path / "bad_back.jpg").write_bytes(b"no image")
    (tmp_path / "table.csv").write_text(
        "key,area,material\nnew,1,marble\nbad,1,wood\nnone,1,wood\n"
    )
    rows = predict_rows(
        folder, data=str(tmp_path / "table.csv"), images=f"{tmp_path}/{{key}}_{{image}}.jpg"
    )
    assert 0 < rows["new"]["probability"] < 1
    assert rows["bad"]["probability"] is None
    assert "unreadable_image" in rows["bad"]["error"]
    assert rows["none"]["probability"] is None
    assert "missing_image" in rows["none"]["error"]
