import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mm_model.statistics import Vocabulary, fit_numeric_statistics
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import PredictSpec
from ray_jobs.config.prepare_spec import PrepareSpec, Split
from ray_jobs.data.images import prepare_image
from ray_jobs.data.manifest import Manifest
from ray_jobs.predict import job as predict_job
from ray_jobs.predict.job import PREDICTIONS, predict
from ray_jobs.predict.row_sources import RawRows
from ray_jobs.predict.trained_run import open_run, require_match
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.pixels import png_16
from tests.ray_jobs.tiny import write_prepared
from tests.ray_jobs.trained import THRESHOLD, damage_image, probabilities, stored_rows, write_run

COLUMNS = ("error", "rooms")
"""The predictions also have a column `error`."""
Range = tuple[float, float] | None
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def spec_of(folder: Path, **changes) -> PredictSpec:
    fields: dict[str, Any] = {
        "run": str(folder / "run"),
        "data": str(folder / "houses.csv"),
        "output": str(folder / "predictions"),
        "batch_size": 4,
    }
    return PredictSpec(**(fields | changes))


def predictions(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def test_prepared_rows_are_predicted_in_order_and_a_damaged_one_has_its_reason(
    tmp_path, ray_local, capsys
):
    manifest = write_prepared(tmp_path / "data", {"train": 21, "validation": 6, "test": 13})
    model = write_run(tmp_path / "run", manifest)
    rows = pa.concat_tables([stored_rows(tmp_path / "data", manifest, s) for s in SPLITS])
    damage_image(tmp_path / "data", manifest, "validation", shard=0, row=2)
    stale = tmp_path / "predictions/part-00007.parquet"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier job")
    counts = predict(spec_of(tmp_path, data=str(tmp_path / "data"), num_workers=2))

    assert [path.name for path in stale.parent.iterdir()] == ["part-00000.parquet"]
    found = predictions(stale.parent)
    assert found.schema == PREDICTIONS
    assert found["key"].to_pylist() == rows["key"].to_pylist()
    bad = 21 + 2
    error = found["error"].to_pylist()
    assert error.pop(bad).startswith(
        "the stored image in validation/part-00000.parquet is damaged: its 40 bytes"
    )
    assert set(error) == {None}
    probability = found["probability"].to_numpy()
    expected = probabilities(model, rows, manifest)
    np.testing.assert_allclose(np.delete(probability, bad), np.delete(expected, bad), atol=1e-6)
    labels = [None if np.isnan(p) else int(p >= THRESHOLD) for p in probability]
    assert found["predicted_label"].to_pylist() == labels
    assert found["probability"].null_count == 1
    assert counts == {"num_rows": 40, "num_positive": labels.count(1), "num_errors": 1}
    printed = capsys.readouterr().out
    assert "40 rows: 39 predicted" in printed
    assert "1 × the stored image in validation/part-00000.parquet is damaged" in printed


# Key, `error` and rooms of each row, why it cannot be used, and a part of its error.
RAW_ROWS = [
    ("h1", "101.5", "3", None, ""),
    ("h2", "", "4", None, ""),
    ("no_photo", "90", "3", "missing_image", "no_photo_front.jpg"),
    ("broken", "90", "3", "unreadable_image", "broken_front.jpg"),
    ("text", "ninety", "3", "non_numeric_text", "error is 'ninety'"),
    ("infinite", "inf", "3", "non_finite_number", "error is inf"),
    ("", "90", "3", "missing_key", "row 7 has no house"),
    ("h3", "nan", "2", None, ""),
    ("h1", "101.5", "3", "duplicate_key", "row 9 has the house of row 1"),
    ("h4", "60.25", "1", None, ""),
    ("h5", "1e3", "", None, ""),
]
GOOD = [row for row in RAW_ROWS if row[3] is None]


@pytest.fixture(scope="module")
def houses(tmp_path_factory) -> Path:
    """Photos of several shapes and a table without labels, with some unusable rows."""
    folder = tmp_path_factory.mktemp("houses")
    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i, key in enumerate([row[0] for row in GOOD] + ["text", "infinite"]):
        pixels = rng.integers(0, 255, (24 + 5 * i, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(photos / f"{key}_front.jpg", "PNG" if i % 2 else "JPEG")
    whole = (photos / "h1_front.jpg").read_bytes()
    (photos / "broken_front.jpg").write_bytes(whole[: len(whole) // 2])
    # Columns in another order than in the manifest, and an additional one.
    lines = ["rooms,house,note,error", *(f"{r[2]},{r[0]},x,{r[1]}" for r in RAW_ROWS)]
    (folder / "houses.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def rules(tmp_path_factory) -> Manifest:
    """The manifest of the run, with settings that are not the defaults."""
    numbers = np.random.default_rng(1).normal([90, 3], [30, 1], (40, 2))
    prepare = PrepareSpec(
        key_column="house", label_column="sold", image_pattern="{house}_front.jpg", image_size=16,
        aspect="pad", jpeg_quality=80,
        # New rows have no such columns.
        fold_column="fold", weight_column="importance",
    )  # fmt: skip
    changes = {
        "prepare": prepare,
        "numeric_columns": COLUMNS,
        "statistics": fit_numeric_statistics(numbers, COLUMNS),
    }
    written = write_prepared(tmp_path_factory.mktemp("rules"), dict.fromkeys(SPLITS, 9))
    return written.model_copy(update=changes)


@pytest.fixture(scope="module")
def model(houses, rules) -> Any:
    return write_run(houses / "run", rules)


def prepared_rows(houses: Path, rules: Manifest) -> pa.Table:
    """Return the usable rows as `prepare` stores them."""
    images = [
        prepare_image((houses / f"photos/{key}_front.jpg").read_bytes(), rules.prepare).content
        for key, *_ in GOOD
    ]
    numbers = {name: [float(row[1 + i] or "nan") for row in GOOD] for i, name in enumerate(COLUMNS)}
    return pa.table({"key": [row[0] for row in GOOD], "image": images, **numbers})


def test_raw_rows_get_the_probabilities_of_equal_prepared_rows_or_a_reason(
    houses, rules, model, predict_here, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(houses)
    spec = spec_of(houses, images="photos/{key}_front.jpg", output=str(tmp_path))
    counts = predict(spec)

    found = predictions(tmp_path)
    assert found["key"].to_pylist() == [row[0] or None for row in RAW_ROWS]
    for row, error in zip(RAW_ROWS, found["error"].to_pylist(), strict=True):
        if row[3] is None:
            assert error is None, row
        else:
            assert error.startswith(f"{row[3]}: "), row
            assert row[4] in error
    good = found.filter(found["error"].is_null())
    expected = probabilities(model, prepared_rows(houses, rules), rules)
    np.testing.assert_allclose(good["probability"].to_numpy(), expected, atol=1e-6)
    assert np.ptp(expected) > 0.1
    assert found["probability"].null_count == found["predicted_label"].null_count == 6
    assert (counts["num_rows"], counts["num_errors"]) == (len(RAW_ROWS), 6)
    first = found["probability"][0].as_py()
    printed = capsys.readouterr().out
    assert f"  {RAW_ROWS[0][0]}  {first:.4f}\n" in printed
    # Rows with an error are not among them.
    for name, value in zip(COLUMNS, ("1,000", "1"), strict=True):
        note = rf"  {name}: 1 row outside the training range of .*, such as {value}\n"
        assert len(re.findall(note, printed)) == 1


def raw_rows(spec: PredictSpec) -> pa.Table:
    """Return raw rows as the model receives them."""
    source = RawRows(open_run(spec.run), spec)
    return pa.concat_tables([rows for task in source.tasks() for rows in source.read(task)])


def numbers_of(row: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(row["numeric"], np.float32)


def test_a_model_needs_only_its_own_inputs(houses, rules, tmp_path):
    write_run(tmp_path / "numeric", rules, image="none")
    rows = raw_rows(spec_of(houses, run=str(tmp_path / "numeric")))
    assert "image" not in rows.column_names
    # Missing and broken photos do not matter.
    assert [e and e.partition(":")[0] for e in rows["error"].to_pylist()] == [
        None if "image" in (row[3] or "") else row[3] for row in RAW_ROWS
    ]
    np.testing.assert_array_equal(numbers_of(rows.to_pylist()[9]), [60.25, 1.0])

    write_run(tmp_path / "image", rules, numeric="none")
    table = tmp_path / "keys.csv"
    table.write_text("house\n" + "\n".join(row[0] for row in GOOD) + "\n")
    photos = str(houses / "photos")
    rows = raw_rows(spec_of(houses, run=str(tmp_path / "image"), data=str(table), images=photos))
    assert rows["error"].to_pylist() == [None] * len(GOOD)
    assert "numeric" not in rows.column_names
    assert len(set(rows["image"].to_pylist())) == len(GOOD)


def test_a_parquet_table_with_a_path_column_is_read_and_no_image_outside_the_folder(
    houses, rules, tmp_path
):
    options = rules.prepare.model_copy(update={"image_column": "photo", "image_pattern": "?"})
    write_run(tmp_path / "run", rules.model_copy(update={"prepare": options}))
    columns = {
        "house": [7, 8], "error": [80.0, 1.0], "rooms": [None, 1.0],
        "photo": ["h4_front.jpg", "../houses.csv"],
    }  # fmt: skip
    table, photos = tmp_path / "table.parquet", str(houses / "photos")
    pq.write_table(pa.table(columns), table)
    spec = spec_of(houses, run=str(tmp_path / "run"), data=str(table), images=photos)
    row, outside = raw_rows(spec).to_pylist()
    assert (row["key"], row["error"]) == ("7", None)
    np.testing.assert_array_equal(numbers_of(row), [80.0, np.nan])
    assert np.ptp(np.frombuffer(row["image"], np.uint8)) > 0
    assert outside["error"].startswith("image_outside_folder: ")


def test_numbers_and_words_that_training_has_not_seen_are_counted(houses, rules, tmp_path):
    vocabulary = Vocabulary(column="wall", words=("brick", "wood"))
    seen = rules.model_copy(update={"vocabularies": (vocabulary,)})
    write_run(tmp_path, seen, image="none")
    table = tmp_path / "new.csv"
    table.write_text("house;error;rooms;wall\nh1;90;3;straw\nh2;900;3;brick\nh3;-900;;\n")
    source = RawRows(open_run(str(tmp_path)), spec_of(houses, run=str(tmp_path), data=str(table)))
    of_table, word, number = source.notes
    assert of_table == "table: ';' between cells"
    assert word == "wall: 1 row with an unknown word, such as straw"
    assert re.fullmatch(
        r"error: 2 rows outside the training range of .* to .*, such as 900", number
    )


def test_deep_images_are_scaled_by_the_range_of_the_run_and_not_their_own(houses, rules, tmp_path):
    image = rules.image.model_copy(update={"pixel_range": (0.0, 4095.0)})
    options = rules.prepare.model_copy(update={"store": "raw"})
    raw_image = image.model_copy(update={"encoding": "raw"})
    for name, greys in (("h1", 300), ("h2", 4000), ("h3", 60_000)):
        (tmp_path / f"{name}_front.jpg").write_bytes(png_16(np.full((20, 20), greys)))
    table = tmp_path / "table.csv"
    table.write_text("house,error,rooms\nh1,1,1\nh2,1,1\nh3,1,1\n")
    changed = rules.model_copy(update={"image": raw_image, "prepare": options})
    write_run(tmp_path / "run", changed)
    spec = spec_of(houses, run=str(tmp_path / "run"), data=str(table), images=str(tmp_path))
    dark, bright, other = raw_rows(spec).to_pylist()
    for row, grey in ((dark, round(300 / 4095 * 255)), (bright, round(4000 / 4095 * 255))):
        assert row["error"] is None
        assert set(np.frombuffer(row["image"], np.uint8)) == {grey}
    assert "its values, 60000 to 60000, are far outside 0 to 4095" in other["error"]


def test_prepared_rows_of_another_pixel_range_are_refused_unless_they_are_of_8_bits(
    houses, model, rules, tmp_path
):
    def require(of_run: Range, of_data: Range) -> None:
        trained, data = (
            rules.model_copy(
                update={"image": rules.image.model_copy(update={"pixel_range": pixel_range})}
            )
            for pixel_range in (of_run, of_data)
        )
        run = replace(open_run(str(houses / "run")), manifest=trained)
        require_match(run, data, Folder(tmp_path))

    require((0.0, 4095.0), (0.0, 4095.0))
    require((0.0, 4095.0), (0.0, 255.0))
    require(None, (0.0, 65535.0))
    with pytest.raises(JobError, match=r"prepare\.pixel_range is 0,1023, not 0,4095; prepare it"):
        require((0.0, 4095.0), (0.0, 1023.0))


TABLE = "house,error,rooms\nh1,1,1\n"


@pytest.mark.parametrize(
    ("table", "images", "message"),
    [
        (
            "house,error\nh1,1\n",
            "photos",
            r"prepare\.numeric_columns: the table has no column 'rooms' \(it has: house, error\); "
            r"these settings come from the run, in .*/run/manifest\.json",
        ),
        ("hous,error,rooms\nh1,1,1\n", "photos", "no column 'house'; did you mean 'hous'"),
        (TABLE, "photos/{id}.jpg", r"^--images: the table has no column 'id' \(it has: house, "),
        (TABLE, "photo", "^--images='photo': there is no "),
        (TABLE, None, r"set --images to a pattern such as 'photos/\{house\}_front\.jpg'"),
    ],
)
def test_a_table_that_does_not_fit_the_run_is_rejected(
    houses, model, no_ray, monkeypatch, tmp_path, table, images, message
):
    monkeypatch.chdir(houses)
    (tmp_path / "table.csv").write_text(table)
    with pytest.raises(JobError, match=message):
        predict(spec_of(houses, data=str(tmp_path / "table.csv"), images=images))


def test_flags_for_the_other_kind_of_data_are_rejected(houses, rules, model, no_ray, tmp_path):
    with pytest.raises(JobError, match=r"--split=test is for prepared data, but .* has no"):
        predict(spec_of(houses, split="test", images="photos"))
    rules.write(Folder(tmp_path))
    with pytest.raises(
        JobError, match=r"--images=photos is for a table .*, but .* is prepared data"
    ):
        predict(spec_of(houses, data=str(tmp_path), images="photos"))


def test_a_table_is_not_overwritten_by_its_predictions(houses, model, no_ray, tmp_path):
    table = tmp_path / "part-00000.parquet"
    pq.write_table(pa.table({"house": ["h1"]}), table)
    with pytest.raises(JobError, match="would be replaced by the predictions"):
        predict(spec_of(houses, data=str(table), output=str(tmp_path), images="photos"))


def test_many_rows_are_written_in_parts_and_zero_rows_in_one(monkeypatch, tmp_path):
    monkeypatch.setattr(predict_job, "_ROWS_PER_PART", 10)
    rows = [{"key": str(i), "probability": i / 40} for i in range(32)]
    tables = [pa.Table.from_pylist(rows[i : i + 4], PREDICTIONS) for i in range(0, 32, 4)]
    predict_job._write_parts(tables, PREDICTIONS, str(tmp_path))
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert parts == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert predictions(tmp_path).equals(pa.concat_tables(tables))

    (tmp_path / "none").mkdir()
    predict_job._write_parts([], PREDICTIONS, str(tmp_path / "none"))
    empty = predictions(tmp_path / "none")
    assert (empty.num_rows, empty.schema) == (0, PREDICTIONS)
