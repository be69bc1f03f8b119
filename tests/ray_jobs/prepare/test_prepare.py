import csv
import hashlib
import io
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mm_model.statistics import fit_numeric_statistics
from ray_jobs.config.command_line import main
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS, RunSpec
from ray_jobs.data.images import decode_stored
from ray_jobs.data.manifest import read_manifest
from ray_jobs.prepare import job
from ray_jobs.prepare.job import prepare
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.raw import SIZE, Raw, files, jpeg, quarantine, shard_rows, split_of

HOUSES = Path(__file__).parents[3].parent / "shared" / "data" / "houses"

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture
def raw(tmp_path: Path) -> Raw:
    return Raw(tmp_path / "raw").add(range(48))


def test_the_manifest_describes_the_shards(raw):
    manifest = raw.prepare()
    assert read_manifest(Folder(raw.out())) == manifest
    assert manifest.numeric_columns == ("area", "rooms")
    assert (manifest.negative_label, manifest.positive_label) == ("0", "1")
    assert manifest.quarantine == {}
    assert quarantine(raw.out()) == {}
    tables = shard_rows(raw.out(), manifest)
    assert sum(table.num_rows for table in tables.values()) == 48
    for split, info in manifest.splits.items():
        labels = Counter(tables[split].column("label").to_pylist())
        assert info.class_counts == (labels[0], labels[1])
        assert info.num_rows == tables[split].num_rows
        for shard in info.shards:
            content = (raw.out() / shard.path).read_bytes()
            assert (shard.num_bytes, shard.sha256) == (
                len(content),
                hashlib.sha256(content).hexdigest(),
            )
            parquet = pq.ParquetFile(raw.out() / shard.path).metadata
            groups = [parquet.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            assert list(shard.row_groups) == groups
            assert max(groups) <= 4
            assert shard.num_rows == sum(groups) <= 10
    listed = {s.path for info in manifest.splits.values() for s in info.shards}
    assert set(files(raw.out())) == listed | {"quarantine/part-00000.parquet"}


def test_shards_hold_the_key_jpeg_numbers_and_label_of_each_row(raw):
    manifest = raw.prepare()
    table = shard_rows(raw.out(), manifest)["train"]
    assert table.schema.names == ["key", "image", "area", "rooms", "label"]
    kinds = [pa.string(), pa.binary(), pa.float32(), pa.float32(), pa.int8()]
    assert table.schema.types == kinds
    source = {row["key"]: row for row in raw.rows}
    for row in table.to_pylist():
        expected = source[row["key"]]
        assert row["area"] == (float(expected["area"]) if expected["area"] else None)
        assert (row["rooms"], row["label"]) == (expected["rooms"], expected["label"])
        pixels = decode_stored(row["image"])
        assert pixels.shape == (SIZE, SIZE, 3)
        content = (raw.folder / "images" / f"{row['key']}.jpg").read_bytes()
        colour = np.asarray(Image.open(io.BytesIO(content)))[0, 0]
        np.testing.assert_allclose(pixels[12, 12].astype(int), colour.astype(int), atol=4)


def test_the_splits_are_stratified(raw):
    manifest = raw.prepare(validation_fraction=0.25, test_fraction=0.25)
    counts = {split: info.class_counts for split, info in manifest.splits.items()}
    assert counts == {"train": (16, 8), "validation": (8, 4), "test": (8, 4)}


def test_statistics_come_from_training_rows_only(raw):
    manifest = raw.prepare()
    train = shard_rows(raw.out(), manifest)["train"]
    area = train.column("area").to_numpy().astype(np.float64)
    assert np.isnan(area).any()
    statistics = manifest.statistics
    assert statistics is not None
    assert statistics.num_rows == train.num_rows
    assert statistics.mean[0] == pytest.approx(np.nanmean(area), rel=1e-12)
    assert statistics.std[0] == pytest.approx(np.nanstd(area), rel=1e-12)
    assert statistics.missing == (int(np.isnan(area).sum()), 0)
    both = np.stack([area, train.column("rooms").to_numpy()], axis=1)
    assert statistics == fit_numeric_statistics(both, ("area", "rooms"))


def test_the_same_rows_in_another_order_give_bitwise_equal_files(raw):
    raw.prepare("a")
    raw.rows.reverse()
    raw.prepare("b")
    assert files(raw.out("a")) == files(raw.out("b"))


def test_splits_do_not_depend_on_the_number_of_shards(raw):
    few = raw.prepare("few", rows_per_shard=1000, rows_per_group=1000)
    many = raw.prepare("many", rows_per_shard=3, rows_per_group=2)
    assert [len(info.shards) for info in few.splits.values()] == [1, 1, 1]
    assert len(many.splits["train"].shards) > 10
    assert split_of(raw.out("few"), few) == split_of(raw.out("many"), many)
    assert few.statistics == many.statistics


def test_another_seed_gives_other_splits(raw):
    first, second = raw.prepare("a", seed=0), raw.prepare("b", seed=1)
    assert split_of(raw.out("a"), first) != split_of(raw.out("b"), second)


def test_a_row_stays_in_its_split_when_rows_are_added_or_labels_change(raw):
    before = raw.prepare()
    old = split_of(raw.out(), before)
    raw.add(range(48, 120))
    raw.rows[0]["label"] = 1 - raw.rows[0]["label"]
    after = raw.prepare()
    new = split_of(raw.out(), after)
    assert len(new) == 120
    assert {key: new[key] for key in old} == old
    assert after.cuts == before.cuts
    assert {new[key] for key in new.keys() - old.keys()} == set(SPLITS)


def test_preparing_again_leaves_only_the_files_of_the_new_manifest(raw):
    raw.prepare(rows_per_shard=5)
    (raw.out() / "train" / "notes.txt").write_text("a foreign file")
    manifest = raw.prepare()
    listed = {s.path for info in manifest.splits.values() for s in info.shards}
    ours = {"quarantine/part-00000.parquet", "train/notes.txt"}
    assert set(files(raw.out())) == listed | ours


def test_a_damaged_earlier_manifest_raises_an_error_with_a_remedy(raw):
    raw.out().mkdir()
    (raw.out() / "manifest.json").write_text('{"schema_version": 2}')
    with pytest.raises(JobError, match=r"(?s)is damaged.*delete this folder to make new splits"):
        raw.prepare()


def test_a_group_is_in_one_split(raw):
    for i, row in enumerate(raw.rows):
        row["patient"] = f"p{i // 3}"
    manifest = raw.prepare(group_column="patient")
    assert manifest.numeric_columns == ("area", "rooms")
    patient = {row["key"]: row["patient"] for row in raw.rows}
    splits = defaultdict(set)
    for key, split in split_of(raw.out(), manifest).items():
        splits[patient[key]].add(split)
    assert len(splits) == 16
    assert all(len(of_patient) == 1 for of_patient in splits.values())


def test_a_column_can_name_the_splits(raw):
    for i, row in enumerate(raw.rows):
        row["fold"] = SPLITS[i // 3 % 3]
    manifest = raw.prepare(split_column="fold")
    assert manifest.cuts is None
    assert split_of(raw.out(), manifest) == {row["key"]: row["fold"] for row in raw.rows}
    with pytest.raises(JobError, match="rooms '0' has rows in both"):
        raw.prepare("grouped", split_column="fold", group_column="rooms")


def test_every_bad_row_is_in_quarantine_with_its_reason(raw):
    raw.image("k1", jpeg(1)[:-200])
    raw.image("k2", b"no photo")
    (raw.folder / "images" / "k3.jpg").unlink()
    frames = [Image.new("L", (8, 8), value) for value in (0, 255)]
    frames[0].save(raw.folder / "images" / "k4.jpg", "GIF", save_all=True, append_images=frames[1:])
    raw.image("k5", b"")
    raw.image("k8", jpeg(8, mode="CMYK"))
    grey = np.full((9, 9), 40_000, np.uint16)
    Image.fromarray(grey).save(raw.folder / "images" / "k10.jpg", "PNG")
    raw.image("k11", jpeg(11, kind="PNG"))
    big = Image.new("1", (3000, 3000))
    big.save(raw.folder / "images" / "k13.jpg", "PNG")
    raw.rows[16]["area"] = "many"
    raw.rows[17]["area"] = "-inf"
    raw.rows[19]["area"] = "NaN"
    raw.rows[20]["key"] = ""
    raw.rows[22]["label"] = ""
    raw.rows.append({"key": "k23", "area": 1, "rooms": 2, "label": 0})
    raw.rows.append({"key": "../table", "area": 1, "rooms": 2, "label": 0})
    raw.rows.append({"key": "/etc/passwd", "area": 1, "rooms": 2, "label": 0})
    (raw.folder / "images" / "folder.jpg").mkdir()
    raw.rows.append({"key": "folder", "area": 1, "rooms": 2, "label": 0})
    manifest = raw.prepare(max_bad_fraction=0.5, max_image_pixels=1_000_000)
    found = quarantine(raw.out())
    assert {key: reason for key, (reason, _) in found.items()} == {
        "k1": "unreadable_image",
        "k2": "unreadable_image",
        "k3": "missing_image",
        "k4": "animated_image",
        "k5": "unreadable_image",
        "k13": "too_large_image",
        "k16": "non_numeric_text",
        "k17": "non_finite_number",
        None: "missing_key",
        "k22": "missing_label",
        "k23": "duplicate_key",
        "../table": "image_outside_folder",
        "/etc/passwd": "image_outside_folder",
        "folder": "unreadable_file",
    }
    assert "k1.jpg" in found["k1"][1]
    assert found["k16"][1] == "area is 'many'"
    assert manifest.quarantine == Counter(reason for reason, _ in found.values())
    where = split_of(raw.out(), manifest)
    assert not where.keys() & (found.keys() - {"k23"})
    assert {"k8", "k10", "k11", "k19", "k23"} <= where.keys()
    assert len(where) + len(found) == len(raw.rows)
    tables = shard_rows(raw.out(), manifest)
    stored = {row["key"]: row for table in tables.values() for row in table.to_pylist()}
    assert stored["k19"]["area"] is None
    assert decode_stored(stored["k10"]["image"])[5, 5] == pytest.approx([156] * 3, abs=2)


def test_too_many_bad_images_raise_an_error_and_write_no_manifest(raw):
    for i in range(5):
        raw.image(f"k{i}", b"no photo")
    (raw.folder / "images" / "k9.jpg").unlink()
    message = (
        r"6 of 48 rows \(12.5%\) cannot be used, more than prepare.max_bad_fraction=0.1 allows: "
        r"missing_image 1, unreadable_image 5. The first: 'k0', k0.jpg: no image .*correct them"
    )
    with pytest.raises(JobError, match=message):
        raw.prepare(max_bad_fraction=0.1)
    assert len(quarantine(raw.out())) == 6
    assert set(files(raw.out())) == {"quarantine/part-00000.parquet"}
    assert not (raw.out() / "manifest.json").exists()


def test_a_failure_leaves_existing_data_unchanged(raw):
    manifest = raw.prepare()
    before = {s.path for info in manifest.splits.values() for s in info.shards}
    raw.add(range(48, 58))
    for i in range(48, 58):
        raw.image(f"k{i}", b"no photo")
    with pytest.raises(JobError, match="10 of 58 rows"):
        raw.prepare()
    assert read_manifest(Folder(raw.out())) == manifest
    assert before == set(files(raw.out())) - {"quarantine/part-00000.parquet"}


def test_too_many_bad_cells_raise_an_error_before_images_are_read(raw):
    raw.rows[0]["key"] = raw.rows[1]["key"]
    with pytest.raises(JobError, match="duplicate_key 1"):
        raw.prepare()
    assert quarantine(raw.out())["k1"][0] == "duplicate_key"
    assert not (raw.out() / "train").exists()


def test_a_split_without_a_class_raises_an_error_with_a_remedy(raw):
    for row in raw.rows:
        row["fold"] = "train" if row["label"] else "test"
    message = r"would have 0 rows of class 0 and 16 of class 1 \(splits from the column fold\)"
    with pytest.raises(JobError, match=message):
        raw.prepare(split_column="fold")


def test_a_single_class_raises_an_error(raw):
    for row in raw.rows:
        row["label"] = 1
    with pytest.raises(JobError, match="only one class"):
        raw.prepare()


def test_labels_may_be_two_strings(raw):
    for row in raw.rows:
        row["label"] = "sick" if row["label"] else "well"
    manifest = raw.prepare(positive_label="sick")
    assert (manifest.negative_label, manifest.positive_label) == ("well", "sick")
    assert sum(info.class_counts[1] for info in manifest.splits.values()) == 16


def test_images_alone_have_no_statistics(raw):
    manifest = raw.prepare(numeric_columns=[])
    assert manifest.numeric_columns == ()
    assert manifest.statistics is None
    names = shard_rows(raw.out(), manifest)["test"].schema.names
    assert names == ["key", "image", "label"]


def test_input_and_output_may_be_uris(raw):
    by_path = raw.prepare("a")
    by_uri = raw.prepare(
        images=(raw.folder / "images").as_uri(),
        table=(raw.folder / "table.csv").as_uri(),
        output=raw.out("b").as_uri(),
    )
    assert files(raw.out("a")) == files(raw.out("b"))
    assert by_uri.splits == by_path.splits


def test_a_glob_matches_subfolders_and_ambiguous_images_are_quarantined(raw):
    images = raw.folder / "images"
    for i in range(48):
        folder = images / f"site{i % 3}" / "photos"
        folder.mkdir(parents=True, exist_ok=True)
        (images / f"k{i}.jpg").rename(folder / f"k{i}.jpg")
    (images / "site0" / "photos" / "k1.jpg").write_bytes(jpeg(1))
    (images / "site0" / "k2.png").write_bytes(jpeg(2))
    (images / "site2" / "photos" / "k5.jpg").unlink()
    manifest = raw.prepare(images=f"{images}/**/photos/*.jpg", max_bad_fraction=0.1)
    found = quarantine(raw.out())
    assert {key: reason for key, (reason, _) in found.items()} == {
        "k1": "ambiguous_image",
        "k5": "missing_image",
    }
    assert found["k1"][1] == "k1.jpg may be site0/photos/k1.jpg or site1/photos/k1.jpg"
    assert sum(info.num_rows for info in manifest.splits.values()) == 46
    with pytest.raises(JobError, match="matches no file"):
        raw.prepare(images=f"{images}/**/*.webp")


def test_a_column_can_hold_the_paths(raw):
    for row in raw.rows:
        row["photo"] = f"{row['key']}.jpg"
    raw.rows[0]["photo"] = str(raw.folder / "images" / "k0.jpg")
    manifest = raw.prepare("a", image_column="photo")
    raw.prepare("b", image_pattern="{photo}")
    assert sum(info.num_rows for info in manifest.splits.values()) == 48
    assert files(raw.out("a")) == files(raw.out("b"))


@pytest.mark.parametrize(
    ("images", "message"),
    [("", r"prepare\.images is not set"), ("nowhere", "there is no .*nowhere")],
)
def test_a_missing_image_folder_raises_an_error(raw, images, message):
    with pytest.raises(JobError, match=message):
        raw.prepare(images=images)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_read_only_folder_raises_an_error(raw):
    raw.out().mkdir(mode=0o500)
    with pytest.raises((JobError, OSError), match="Permission"):
        raw.prepare()


def test_the_command_line_prints_a_summary(raw, monkeypatch, capsys):
    raw.image("k1", b"no photo")
    for i, row in enumerate(raw.rows):
        row |= {"": i, "town": "Lima"}
    raw.prepare(max_bad_fraction=0.1)
    capsys.readouterr()
    flags = {
        "images": raw.folder / "images",
        "table": raw.folder / "table.csv",
        "output": raw.out("shown"),
        "image_size": SIZE,
        "max_bad_fraction": 0.1,
    }
    arguments = [f"--prepare.{name}={value}" for name, value in flags.items()]
    arguments.append("--data.categorical=town")
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    main(RunSpec, prepare, job.__doc__)
    shown = capsys.readouterr().out
    assert f"Prepared {raw.out('shown')}" in shown
    assert "splits: by hash of key, seed 0" in shown
    assert "numeric columns: area, rooms, ''\n" in shown
    assert "categorical column town: 1 word\n" in shown
    assert f"quarantine: unreadable_image 1 ({raw.out('shown')}/quarantine/part" in shown


def test_the_command_line_reports_an_error_in_one_line(tmp_path):
    table = str(tmp_path / "none.csv")
    flags = ["--prepare.table", table, "--prepare.images", str(tmp_path), "--prepare.source=folder"]
    command = [sys.executable, "-m", "ray_jobs.prepare", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == f"error: the table {table} does not exist\n"


@pytest.mark.skipif(not HOUSES.exists(), reason="needs the houses data")
def test_the_houses_are_prepared(tmp_path):
    section = {
        "images": str(HOUSES / "images"),
        "table": str(HOUSES / "houses.csv"),
        "output": str(tmp_path),
        "image_pattern": "{house_id}_frontal.jpg",
        "key_column": "house_id",
        "label_column": "expensive",
        "numeric_columns": ["bedrooms", "bathrooms", "area", "zipcode"],
        "image_size": 64,
    }
    manifest = prepare(RunSpec.model_validate({"prepare": section}))
    assert manifest.numeric_columns == ("bedrooms", "bathrooms", "area", "zipcode")
    assert manifest.quarantine == {}
    tables = shard_rows(tmp_path, manifest)
    assert {split: table.num_rows for split, table in tables.items()} == {
        "train": 280,
        "validation": 60,
        "test": 60,
    }
    with open(HOUSES / "houses.csv", newline="") as file:
        rows = {row["house_id"]: row for row in csv.DictReader(file)}
    row = tables["test"].to_pylist()[0]
    assert row["area"] == float(rows[row["key"]]["area"])
    assert row["label"] == int(rows[row["key"]]["expensive"])
    original = cv2.imread(str(HOUSES / "images" / f"{row['key']}_frontal.jpg"))
    small = cv2.resize(original, (64, 64), interpolation=cv2.INTER_AREA)[..., ::-1]
    assert np.abs(decode_stored(row["image"]).astype(float) - small).mean() < 8
