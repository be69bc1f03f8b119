import hashlib
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mm_model.statistics import fit_numeric_statistics
from ray_jobs.config.command_line import main
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.prepare import job
from ray_jobs.prepare.job import prepare
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.raw import (
    assert_has_colour,
    files,
    jpeg,
    quarantine,
    rows_by_key,
    shard_rows,
    split_of,
)

pytestmark = pytest.mark.usefixtures("ray_local")


def test_the_manifest_describes_the_shards_and_the_training_rows(raw):
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
            assert shard.num_bytes == len(content)
            assert shard.sha256 == hashlib.sha256(content).hexdigest()
            parquet = pq.ParquetFile(raw.out() / shard.path).metadata
            groups = [parquet.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            assert list(shard.row_groups) == groups
            assert max(groups) <= 4
            assert shard.num_rows == sum(groups) <= 10
    listed = {s.path for info in manifest.splits.values() for s in info.shards}
    assert set(files(raw.out())) == listed | {"quarantine/part-00000.parquet"}

    table = tables["train"]
    assert table.schema.names == ["key", "image", "area", "rooms", "label", "original_pixels"]
    kinds = [pa.string(), pa.binary(), pa.float32(), pa.float32(), pa.int8(), pa.int32()]
    assert table.schema.types == kinds
    source = {row["key"]: row for row in raw.rows}
    for row in table.to_pylist():
        expected = source[row["key"]]
        assert row["area"] == (float(expected["area"]) if expected["area"] else None)
        assert (row["rooms"], row["label"]) == (expected["rooms"], expected["label"])
        photo = raw.folder / "images" / f"{row['key']}.jpg"
        assert_has_colour(row["image"], photo)
        with Image.open(photo) as image:
            assert row["original_pixels"] == image.width * image.height

    area, rooms = (table.column(name).to_numpy().astype(np.float64) for name in ("area", "rooms"))
    assert np.isnan(area).any()
    both = np.stack([area, rooms], axis=1)
    assert manifest.statistics == fit_numeric_statistics(both, ("area", "rooms"))


def test_the_same_rows_in_another_order_and_by_uris_give_bitwise_equal_files(raw):
    by_path = raw.prepare("a")
    raw.rows.reverse()
    by_uri = raw.prepare(
        images=(raw.folder / "images").as_uri(),
        table=(raw.folder / "table.csv").as_uri(),
        output=raw.out("b").as_uri(),
    )
    assert files(raw.out("a")) == files(raw.out("b"))
    assert by_uri.splits == by_path.splits


def test_splits_are_stratified_and_do_not_depend_on_the_number_of_shards(raw):
    fractions = {"validation_fraction": 0.25, "test_fraction": 0.25}
    few = raw.prepare("few", rows_per_shard=1000, rows_per_group=1000, **fractions)
    many = raw.prepare("many", rows_per_shard=2, rows_per_group=1, **fractions)
    counts = {split: info.class_counts for split, info in few.splits.items()}
    assert counts == {"train": (16, 8), "validation": (8, 4), "test": (8, 4)}
    assert [len(info.shards) for info in few.splits.values()] == [1, 1, 1]
    assert len(many.splits["train"].shards) > 10
    assert split_of(raw.out("few"), few) == split_of(raw.out("many"), many)
    assert few.statistics == many.statistics


def test_preparing_again_leaves_only_the_files_of_the_new_manifest_and_foreign_ones(raw):
    raw.prepare(rows_per_shard=5)
    (raw.out() / "train" / "notes.txt").write_text("a foreign file")
    manifest = raw.prepare()
    listed = {s.path for info in manifest.splits.values() for s in info.shards}
    ours = {"quarantine/part-00000.parquet", "train/notes.txt"}
    assert set(files(raw.out())) == listed | ours


def test_a_damaged_earlier_manifest_raises_an_error_with_a_remedy(raw):
    raw.out().mkdir()
    (raw.out() / "manifest.json").write_text('{"schema_version": 3}')
    with pytest.raises(JobError, match=r"(?s)is damaged.*delete this folder to make new splits"):
        raw.prepare()


def test_a_group_is_in_one_split(raw):
    for i, row in enumerate(raw.rows):
        row["patient"] = f"p{i // 3}"
    manifest = raw.prepare(group_column="patient")
    assert manifest.numeric_columns == ("area", "rooms")
    split = split_of(raw.out(), manifest)
    assert len({(row["patient"], split[row["key"]]) for row in raw.rows}) == 16


def test_a_column_can_name_the_splits(raw):
    for i, row in enumerate(raw.rows):
        row["fold"] = SPLITS[i // 3 % 3]
    manifest = raw.prepare(split_column="fold")
    assert manifest.cuts is None
    assert split_of(raw.out(), manifest) == {row["key"]: row["fold"] for row in raw.rows}
    with pytest.raises(JobError, match="rooms '0' has rows in both"):
        raw.prepare("grouped", split_column="fold", group_column="rooms")


def test_validation_is_cut_from_the_training_rows_of_given_splits_and_test_stays(raw, capsys):
    """The cut is stored, so rows keep their splits when rows are added."""
    for i, row in enumerate(raw.rows):
        row["part"] = " Tst " if i % 4 == 0 else "Training"
    options = {"split_column": "part", "validation_fraction": 0.25}
    before = raw.prepare(**options)
    assert (
        "splits: from the column part; validation cut from train by hash" in capsys.readouterr().out
    )
    old = split_of(raw.out(), before)
    assert {key for key, split in old.items() if split == "test"} == {
        row["key"] for row in raw.rows[::4]
    }
    assert before.splits["validation"].class_counts == (6, 3)
    raw.add(range(48, 96))
    for row in raw.rows[48:]:
        row["part"] = "train"
    after = raw.prepare(**options)
    new = split_of(raw.out(), after)
    assert after.cuts == before.cuts
    assert {key: new[key] for key in old} == old
    assert {new[f"k{i}"] for i in range(48, 96)} == {"train", "validation"}
    # Rows that now have given validation rows are no longer cut.
    raw.rows[50]["part"] = raw.rows[51]["part"] = "Dev"
    given = raw.prepare(**options)
    assert given.cuts is None
    assert given.splits["validation"].class_counts == (1, 1)


def test_files_of_keys_name_the_splits(raw, capsys):
    keys = raw.folder / "test.txt"
    keys.write_text("\ufeffkey\r\n k3 \r\n\r\nk4\r\nk5\r\ngone\r\n")
    manifest = raw.prepare(split_keys={"test": keys.as_uri()})
    splits = split_of(raw.out(), manifest)
    assert {key for key, split in splits.items() if split == "test"} == {"k3", "k4", "k5"}
    note = (
        "splits: from the files in prepare.split_keys; 1 key of test not in the table, such as "
        "'gone'; validation cut from train by hash of key"
    )
    assert note in capsys.readouterr().out


def test_folds_and_groups_are_stored_and_are_no_input(raw):
    for i, row in enumerate(raw.rows):
        row["cv"] = i % 5
        row["home"] = f"h{i % 10}"
    raw.rows[9]["cv"] = ""
    options = {"fold_column": "cv", "max_bad_fraction": 0.1}
    before = raw.prepare(group_column="home", **options)
    assert before.numeric_columns == ("area", "rooms")
    table = shard_rows(raw.out(), before)["train"]
    assert table.schema.names == [
        *("key", "image", "area", "rooms", "fold", "group", "label", "original_pixels")
    ]
    assert table.schema.field("fold").equals(pa.field("fold", pa.string(), nullable=False))
    for key, row in rows_by_key(raw.out(), before).items():
        assert row["fold"] == str(int(key[1:]) % 5)
        assert row["group"] == f"h{int(key[1:]) % 10}"
    assert quarantine(raw.out()) == {"k9": ("missing_fold", "cv is empty")}
    # Another fold rewrites the row's shard.
    raw.rows[10]["cv"] = 3
    after = raw.prepare(**options)
    assert rows_by_key(raw.out(), after)["k10"]["fold"] == "3"
    with pytest.raises(
        JobError, match=r"home 'h0' has rows in both 0 and 3 \(from the column cv\)"
    ):
        raw.prepare("grouped", group_column="home", **options)


def test_every_bad_row_is_in_quarantine_with_its_reason(raw):
    raw.image("k1", jpeg(1)[:-200])
    raw.image("k2", b"no photo")
    (raw.folder / "images" / "k3.jpg").unlink()
    frames = [Image.new("L", (8, 8), value) for value in (0, 255)]
    frames[0].save(raw.folder / "images" / "k4.jpg", "GIF", save_all=True, append_images=frames[1:])
    raw.image("k5", b"")
    Image.new("1", (3000, 3000)).save(raw.folder / "images" / "k13.jpg", "PNG")
    raw.rows[16]["area"] = "many"
    raw.rows[20]["key"] = ""
    (raw.folder / "images" / "folder.jpg").mkdir()
    for key in ("../table", "/etc/passwd", "folder"):
        raw.rows.append({"key": key, "area": 1, "rooms": 2, "label": 0})
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
        None: "missing_key",
        "../table": "image_outside_folder",
        "/etc/passwd": "image_outside_folder",
        "folder": "missing_image",
    }
    assert "k1.jpg" in found["k1"][1]
    assert found["k16"][1].startswith("area is 'many'; --prepare.number_rules '{area: missing}'")
    assert manifest.quarantine == Counter(reason for reason, _ in found.values())
    where = split_of(raw.out(), manifest)
    assert not where.keys() & found.keys()
    assert len(where) + len(found) == len(raw.rows)


def test_too_many_bad_images_raise_an_error_and_write_no_manifest(raw):
    for i in range(5):
        raw.image(f"k{i}", b"no photo")
    (raw.folder / "images" / "k9.jpg").unlink()
    message = (
        r"6 of 48 rows \(12.5%\) cannot be used, more than prepare.max_bad_fraction=0.1 allows: "
        r"missing_image 1, unreadable_image 5. The first: 'k0', k0.jpg: no image "
        r".*replace these files, or raise"
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


def test_a_split_without_a_class_raises_an_error_with_a_remedy(raw):
    for i, row in enumerate(raw.rows):
        row["fold"] = ("train", "val", "test" if row["label"] else "train")[i % 3]
    for row in raw.rows[::3]:
        row["fold"] = ("train", "val", "Testing")[row["rooms"] % 3]
    message = (
        r"the test split would have 0 rows of class 0 and \d of class 1 \(splits from the column "
        r"fold\), but it needs both classes; mark rows of both classes as test"
    )
    with pytest.raises(JobError, match=message):
        raw.prepare(split_column="fold")
    for row in raw.rows:
        row["fold"] = "train" if row["label"] else "test"
    message = (
        "class 0 occurs in only 0 training rows, but each of train, validation needs at least one"
    )
    with pytest.raises(JobError, match=message):
        raw.prepare(split_column="fold")
    for row in raw.rows:
        row["fold"] = "test"
    with pytest.raises(JobError, match=r"there are no training rows .* mark some as train"):
        raw.prepare(split_column="fold")


def test_the_command_line_prints_a_summary(raw, monkeypatch, capsys):
    raw.image("k1", b"no photo")
    for i, row in enumerate(raw.rows):
        row |= {"": i, "town": "Lima"}
    options = raw.spec("shown").prepare
    flags = [f"--prepare.{n}={getattr(options, n)}" for n in ("images", "table", "output")]
    flags += ["--prepare.max_bad_fraction=0.1", "--data.categorical=town"]
    monkeypatch.setattr(sys, "argv", ["prepare", *flags])
    main(RunSpec, prepare, job.__doc__)
    shown = capsys.readouterr().out
    assert f"Prepared {raw.out('shown')}" in shown
    assert "splits: by hash of key, seed 0" in shown
    assert "label label: positive '1'; negative '0'\n" in shown
    assert "numeric columns: area, rooms\n" in shown
    assert "categorical columns: town\n" in shown
    assert "left out: '' (a row number)\n" in shown
    assert f"quarantine: unreadable_image 1 ({raw.out('shown')}/quarantine/part" in shown
