"""Rows without an image from raw files to probabilities, with `prepare.missing_image=keep`."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import PredictSpec
from ray_jobs.data.decoder import RowDecoder
from ray_jobs.predict.job import predict
from ray_jobs.train.job import fit
from tests.ray_jobs.raw import Raw
from tests.ray_jobs.trained import stored_rows, train_here

pytestmark = [pytest.mark.multiworker, pytest.mark.timeout(600)]

MODEL = {
    "image": {"kind": "tiny", "weights": None, "units": 8},
    "numeric": {"units": [8]},
    "fusion": {"units": 8},
}


def predictions(folder: Path) -> dict[str, dict[str, Any]]:
    rows = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))
    return {row["key"]: row for row in rows.to_pylist()}


def test_raw_and_prepared_rows_without_an_image_are_predicted_alike(predict_here, tmp_path, capsys):
    raw = Raw(tmp_path / "raw").add(range(48))
    for i in range(0, 48, 4):
        (raw.folder / "images" / f"k{i}.jpg").unlink()
    manifest = raw.prepare(missing_image="keep")
    spec = raw.spec().overlay(
        {
            "data.prepared": str(raw.out()),
            "run.storage_path": str(tmp_path),
            "run.name": "run",
            "model": MODEL,
            "train.global_batch_size": 8,
            "train.epochs": 2,
        }
    )
    with pytest.raises(JobError, match=r"model\.numeric\.kind=none leaves no input for rows"):
        fit(spec.overlay({"model.numeric.kind": "none"}))
    train_here(spec, manifest)
    common: dict[str, Any] = {"run": str(tmp_path / "run"), "batch_size": 8}
    counts = predict(PredictSpec(**common, data=str(raw.out()), output=str(tmp_path / "a")))
    assert (counts["num_errors"], counts["num_without_image"]) == (0, 12)
    assert "12 rows without an image, predicted from numbers" in capsys.readouterr().out
    (raw.folder / "images" / "k1.jpg").write_bytes(b"damaged")
    table, images = str(raw.folder / "table.csv"), str(raw.folder / "images/{key}.jpg")
    counts = predict(PredictSpec(**common, data=table, images=images, output=str(tmp_path / "b")))
    assert (counts["num_errors"], counts["num_without_image"]) == (1, 12)
    prepared, found = predictions(tmp_path / "a"), predictions(tmp_path / "b")
    assert found.pop("k1")["error"].startswith("unreadable_image")
    for key, row in found.items():
        assert row["probability"] == pytest.approx(prepared[key]["probability"], abs=1e-6)
    # The model in this process says the same.
    from mm_model import load_model

    model = load_model(tmp_path / "run/model/model.keras")
    rows = stored_rows(raw.out(), manifest, "train")
    batch = RowDecoder(manifest, with_image=True).decode(rows)
    expected = np.asarray(model(batch))[:, 0]
    assert 0 < batch["image_mask"].mean() < 1
    for key, probability in zip(rows["key"].to_pylist(), expected, strict=True):
        assert prepared[key]["probability"] == pytest.approx(float(probability), abs=1e-6)
