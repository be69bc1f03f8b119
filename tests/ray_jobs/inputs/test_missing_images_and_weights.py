"""Rows without an image and weights of rows, from a table to probabilities and metrics; the ids are
the public threads they come from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight

from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import EvaluateSpec, PredictSpec
from ray_jobs.evaluate import evaluate
from ray_jobs.predict import predict
from ray_jobs.prepare.job import prepare
from ray_jobs.train import fit
from tests.ray_jobs.inputs.user_data import (
    FILES,
    UserData,
    cases,
    column_of,
    csv_text,
    plain_rows,
    totals,
    values,
)
from tests.ray_jobs.raw import SIZE, Raw, jpeg, rows_by_key

Cell = Callable[[int], Any]
pytestmark = pytest.mark.slow

BLANK = ["", "  ", "\t", "nan", "N/A", "\u00a0"]


def two(i: int) -> str:
    return f"{FILES[i]};{FILES[i ^ 1]}"


WITHOUT_IMAGE: dict[str, tuple[list[Any], Cell, dict[str, Any]]] = {
    "FAI-RL#97-blank": (BLANK, FILES.__getitem__, {}),
    "autogluon#2647-none": (["None"] * 6, FILES.__getitem__, {}),
    "keras-preprocessing#177-no-file": (["a/1.jpg"] * 6, FILES.__getitem__, {}),
    "Qwen-VL-Series-Finetune#11-null": ([None] * 6, FILES.__getitem__, {"json": True}),
    "LlamaFactory#6518-no-field": ([...] * 6, FILES.__getitem__, {"json": True}),
    "LlamaFactory#7157-none-of-two": (["", ";"] * 3, two, {"image_separator": ";"}),
}


@pytest.mark.parametrize(("missing", "path", "options"), cases(WITHOUT_IMAGE))
def test_rows_without_an_image_are_kept_and_counted(
    user: UserData, missing: list[Any], path: Cell, options: dict[str, Any]
) -> None:
    rows = plain_rows(path=lambda i: missing[i] if i < 6 else path(i))
    rows = [{name: cell for name, cell in row.items() if cell is not ...} for row in rows]
    options = {"image_column": "path", "missing_image": "keep"} | options
    as_json = options.pop("json", False)
    file, content = ("t.json", json.dumps(rows)) if as_json else ("t.csv", csv_text(rows))
    manifest = user.look(content, file, **options)
    assert totals(manifest) == [24, 12]
    assert "rows without an image, kept: 6" in user.text
    assert "6 of 36 rows" in user.refusal(
        content, file, **options | {"missing_image": "quarantine"}
    )


def test_a_row_with_one_of_two_images_has_an_image(user: UserData) -> None:
    """FAI-RL#97: a row is kept when at least one of its cells is valid."""
    rows = plain_rows(path=lambda i: f"{FILES[i]}; " if i < 6 else two(i))
    options = {"image_column": "path", "image_separator": ";"}
    assert totals(user.look(rows, **options)) == [24, 12]
    assert totals(user.look(rows, **options, missing_image="keep")) == [24, 12]
    assert "kept: 0" in user.text


def null_images(user: UserData) -> dict[str, Any]:
    """Write Hugging Face's Parquet, in which 6 of 36 rows have no image, and return settings."""
    frame = pd.DataFrame(plain_rows(image=lambda i: {"bytes": jpeg(i), "path": f"{i}.jpg"}))
    frame = frame.astype({"size": float, "weight": float})
    for i in range(6):
        frame.at[i, "image"] = {"bytes": None, "path": None} if i % 2 else None
    frame.to_parquet(user.folder / "data.parquet")
    images = str(user.folder / "data.parquet")
    return {"images": images, "table": "", "missing_image": "keep"}


def test_null_images_of_parquet_are_stored_as_null(
    user: UserData, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """datasets#3856: `image` is ['cat.jpg', None]."""
    manifest = prepare(user.spec("", **null_images(user)))
    rows = rows_by_key(user.folder / "prepared", manifest)
    assert {key for key, row in rows.items() if row["image"] is None} == {
        f"k0{i}" for i in range(6)
    }
    assert len(rows) == 36


def test_a_dry_run_counts_null_images_of_parquet(user: UserData) -> None:
    """datasets#3856."""
    user.look("", **null_images(user))
    assert "rows without an image, kept: 6" in user.text


def test_lists_of_images_in_json_are_read_or_pointed_out(user: UserData) -> None:
    """ms-swift#3940 and LlamaFactory#7157: the column holds lists, some of them empty."""
    rows = plain_rows(path=lambda i: [] if i < 6 else [FILES[i]])
    try:
        user.look(json.dumps(rows), "t.json", image_column="path", missing_image="keep")
    except JobError as error:
        user.text += str(error)
    assert "no column 'path'" not in user.text


UNITS = {
    "LightGBM#6856": (lambda i: [0.5, 2, 1, 4, 0.25][i % 5],),
    "LightGBM#2519-one-by-n": (lambda i: [0.5, 2, 1, 4, 0.25][i % 5] / 36,),
    "xgboost#8261-times-1000": (lambda i: [500, 2000, 1000, 4000, 250][i % 5],),
}


@pytest.mark.parametrize("weight", cases(UNITS))
def test_weights_are_no_feature_and_count_by_their_ratios(user: UserData, weight: Cell) -> None:
    options: dict[str, Any] = {"weight_column": "w", "exclude_columns": ["weight"]}
    manifest = user.look(plain_rows(w=weight), **options)
    assert (column_of(manifest, "w").role, "w" in values(manifest)["numbers"]) == ("weight", False)
    assert totals(manifest) == [24, 12]
    by_split = [split.class_weights for split in manifest.splits.values()]
    found = np.array(by_split).sum(axis=0)
    true = [UNITS["LightGBM#6856"][0](i) for i in range(36)]
    expected = np.bincount([i % 3 == 0 for i in range(36)], weights=true)
    assert found / found.sum() == pytest.approx(expected / expected.sum())


SPLITS = ["train", "train", "test", "validation"]
WEIGHTS = [0.5, 2, 1, 4, 0.25]
SETTINGS: dict[str, Any] = {
    "model": {
        "image": {"kind": "tiny", "weights": None, "units": 8},
        "numeric": {"units": [8]},
        "fusion": {"units": 8},
    },
    "train.global_batch_size": 4,
    "train.epochs": 2,
    "train.learning_rate": 0.02,
}


def train(raw: Raw, name: str, class_weight: str) -> None:
    """Prepare the rows and train a run of the same name."""
    options: dict[str, Any] = {"weight_column": "w", "split_column": "part"}
    options["missing_image"] = "keep"
    raw.prepare(name, **options)
    paths = {"data.prepared": str(raw.out(name)), "run.storage_path": str(raw.folder / "runs")}
    names = {"run.name": name, "train.class_weight": class_weight}
    fit(raw.spec(name, **options).overlay(SETTINGS | paths | names))


@pytest.fixture(scope="module")
def trained(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Raw:
    """Rows with a run `balanced`. Half of the rows of validation and test have an image, and 4 of
    36 training rows, so at least 5 of 9 batches are without images.
    """
    raw = Raw(tmp_path_factory.mktemp("trained") / "raw").add(range(72))
    for i, row in enumerate(raw.rows):
        signal = i * 7 % 5 + 3 * row["label"]
        row |= {"signal": signal, "part": SPLITS[i % 4], "w": WEIGHTS[i % 5]}
        if i >= 36 or (i % 4 < 2 and i >= 8):
            (raw.folder / "images" / f"k{i}.jpg").unlink()
    train(raw, "balanced", "balanced")
    return raw


def run_of(raw: Raw, name: str = "balanced") -> str:
    return str(raw.folder / "runs" / name)


def predicted(run: str, data: Path, output: Path, **options: Any) -> pd.DataFrame:
    """Return the predictions by key."""
    predict(PredictSpec(run=run, data=str(data), output=str(output), **options))
    return pq.read_table(output).to_pandas().set_index("key")


def rows_of(raw: Raw, split: str, output: Path) -> pd.DataFrame:
    """Return label, weight and probability of the rows of a split."""
    found = predicted(run_of(raw), raw.out("balanced"), output, split=split)
    rows = pq.read_table(raw.out("balanced") / split).to_pandas().set_index("key")
    return rows[["label"]].assign(
        weight=[WEIGHTS[int(key[1:]) % 5] for key in rows.index],
        probability=found["probability"].astype(float),
    )


def test_class_weights_multiply_weights_of_any_unit(
    trained: Raw, predict_here: None, tmp_path: Path
) -> None:
    """keras#497: one of both was ignored. sklearn#30056: balance weights instead of rows.
    xgboost#8261 and LightGBM#2519: weights times 1000."""
    rows = pd.DataFrame(trained.rows).query("part == 'train'")
    classes = np.array([0, 1])
    by_class = compute_class_weight(
        "balanced", classes=classes, y=rows["label"], sample_weight=rows["w"]
    )
    for row in trained.rows:
        factor = by_class[row["label"]] if row["part"] == "train" else 1
        row["w"] *= 1000 * factor
    train(trained, "multiplied", "none")
    balanced, multiplied = (
        predicted(run_of(trained, name), trained.out(name), tmp_path / name)["probability"]
        for name in ("balanced", "multiplied")
    )
    # Without class weights, the largest difference is 0.16; with those of the rows, 0.025.
    assert multiplied.to_dict() == pytest.approx(balanced.to_dict(), abs=1e-3)


def test_validation_calibration_and_evaluation_are_weighted(
    trained: Raw, predict_here: None, tmp_path: Path
) -> None:
    """xgboost#2355, keras#2298 and tensorflow#51902: validation ignored the weights; sklearn#20610:
    calibration did."""
    rows = rows_of(trained, "validation", tmp_path / "validation")
    summary = json.loads((trained.folder / "runs/balanced/summary.json").read_text())
    data, weight = (rows["label"], rows["probability"]), rows["weight"]
    for name, metric in {"log_loss": metrics.log_loss, "roc_auc": metrics.roc_auc_score}.items():
        expected = metric(*data, sample_weight=weight)
        assert summary["validation"][name] == pytest.approx(expected, abs=1e-5)
        assert metric(*data) != pytest.approx(expected, abs=1e-3)
    rate, plain_rate = np.average(rows["label"], weights=weight), rows["label"].mean()
    mean = np.average(rows["probability"], weights=weight)
    assert abs(mean - rate) < 0.01 < abs(rate - plain_rate)

    rows = rows_of(trained, "test", tmp_path / "test")
    run, prepared = run_of(trained), str(trained.out("balanced"))
    found = evaluate(EvaluateSpec(run=run, data=prepared, split="test", output=str(tmp_path)))
    data, weight = (rows["label"], rows["probability"]), rows["weight"]
    assert (found["weight_column"], found["num_rows"]) == ("w", 18)
    for name, metric in {
        "log_loss": metrics.log_loss,
        "roc_auc": metrics.roc_auc_score,
        "brier": metrics.brier_score_loss,
        "pr_auc": metrics.average_precision_score,
    }.items():
        assert found[name] == pytest.approx(metric(*data, sample_weight=weight), abs=1e-5), name
    decided = (rows["label"], rows["probability"] >= found["threshold"])
    for name, metric in {
        "accuracy": metrics.accuracy_score,
        "balanced_accuracy": metrics.balanced_accuracy_score,
        "precision": metrics.precision_score,
        "recall": metrics.recall_score,
        "f1": metrics.f1_score,
    }.items():
        assert found[name] == pytest.approx(metric(*decided, sample_weight=weight)), name
    assert found["confusion"] == metrics.confusion_matrix(*decided).tolist()


def test_batches_without_an_image_train(trained: Raw) -> None:
    """BM-MAE#2 and D2Net#7: the loss was NaN."""
    lines = (trained.folder / "runs/balanced/history.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 2
    for name in ("train/loss", "val/log_loss"):
        assert np.isfinite([record[name] for record in records]).all()


def test_rows_are_predicted_from_what_is_there(
    trained: Raw, predict_here: None, tmp_path: Path
) -> None:
    """CMU-MultimodalSDK#259 and nnUNet#513: some or all new rows have no image. D2Net#7: nothing at
    all. mosaiks#109: a missing image is no black one. datasets#7632: a damaged one."""
    images = trained.folder / "images"
    Image.new("RGB", (30, 20)).save(images / "black.jpg")
    (images / "bad.jpg").write_bytes(b"damaged")
    pattern = f"{images}/{{key}}.jpg"
    row = {"area": 12.0, "rooms": 3, "signal": 4}
    rows = [{"key": key} | row for key in ("k2", "none", "black", "bad")]
    rows += [{"key": "low"} | row | {"signal": 0}, {"key": "nothing"}]
    tables = {"all": rows, "no-image": [row for row in rows if row["key"] in ("none", "low")]}
    found = {}
    for name, table in tables.items():
        data = tmp_path / f"{name}.csv"
        pd.DataFrame(table).to_csv(data, index=False)
        found[name] = predicted(run_of(trained), data, tmp_path / name, images=pattern)
    error = found["all"].pop("error")
    assert error["bad"].startswith("unreadable_image")
    assert error.drop("bad").isna().all()
    probability = found["all"]["probability"].drop("bad")
    assert probability.between(0, 1).all()
    assert len({round(value, 6) for value in probability}) == 5
    alone = found["no-image"]["probability"]
    assert alone.to_dict() == pytest.approx(probability[["none", "low"]].to_dict(), abs=1e-6)


def test_the_pixels_of_a_masked_image_do_not_matter(trained: Raw) -> None:
    """ReT-2#1: a placeholder image with a mask; healnet#17: or no image at all."""
    from mm_model import load_model

    model = load_model(f"{run_of(trained)}/model/model.keras")
    pixels = np.random.default_rng(0).uniform(0, 255, (3, 1, SIZE, SIZE, 3)).astype("float32")
    numbers = np.ones((3, 3), "float32")  # area, rooms and signal
    for mask, num_values in ((0, 1), (1, 3)):
        inputs = {
            "image": pixels,
            "numeric": numbers,
            "image_mask": np.full((3, 1), mask, "float32"),
        }
        found = np.asarray(model(inputs))[:, 0]
        assert len(np.unique(np.asarray(found).round(5))) == num_values
