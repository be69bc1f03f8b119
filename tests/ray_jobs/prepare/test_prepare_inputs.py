"""Preparing other inputs: several images, raw pixels, words, rows without a label, and tars."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.data.images import decode_stored
from ray_jobs.prepare.shards.shard_writer import ShardWriter
from ray_jobs.prepare.sources import open_source
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.prepare.sources.samples import spec, write_tar
from tests.ray_jobs.raw import (
    SIZE,
    Raw,
    assert_has_colour,
    files,
    jpeg,
    quarantine,
    rows_by_key,
    shard_rows,
    split_of,
)

ROOMS = ("bath", "bed")

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture
def homes(raw: Raw) -> Raw:
    """Rows with two images each, in a folder per room; columns hold their paths."""
    for i, row in enumerate(raw.rows):
        for number, room in enumerate(ROOMS):
            raw.image(f"{room}/k{i}", jpeg(1000 * number + i))
            row[room] = f"{room}/k{i}.jpg"
    return raw


def test_several_images_are_found_by_columns_of_paths_or_by_pattern(homes):
    by_columns = homes.prepare("a", image_columns=ROOMS)
    for row in homes.rows:
        del row["bath"], row["bed"]
    by_pattern = homes.prepare("b", image_columns=ROOMS, image_pattern="{image}/{key}.jpg")
    assert by_pattern.image.columns == by_columns.image.columns == ("image_bath", "image_bed")
    assert by_pattern.numeric_columns == by_columns.numeric_columns == ("area", "rooms")
    assert files(homes.out("a")) == files(homes.out("b"))
    table = shard_rows(homes.out("b"), by_pattern)["train"]
    assert table.schema.names == [
        *("key", "image_bath", "image_bed", "area", "rooms", "label", "original_pixels")
    ]
    for row in table.to_pylist():
        for room in ROOMS:
            file = homes.folder / "images" / room / f"{row['key']}.jpg"
            assert_has_colour(row[f"image_{room}"], file)


@pytest.mark.parametrize(
    ("glob", "no_file"),
    [
        ("", r"bath: bath/k4.jpg: no such file in .*; bed: bed/k4.jpg: no such file in .*"),
        ("/**/*.jpg", r"bath: the glob matches no bath/k4.jpg; .*; bed: the glob .*"),
    ],
)
def test_some_of_several_images_may_be_missing_but_none_damaged(homes, glob, no_file):
    images = homes.folder / "images"
    homes.rows[1]["bath"] = ""
    (images / "bed/k2.jpg").unlink()
    homes.rows[3] |= {"bath": "", "bed": ""}
    for room in ROOMS:
        (images / room / "k4.jpg").unlink()
    homes.image("bed/k5", b"no photo")
    homes.rows[6]["bath"] = "../k6.jpg"
    options = {"images": f"{images}{glob}", "image_columns": ROOMS}
    manifest = homes.prepare(**options, max_bad_fraction=0.2)
    stored = rows_by_key(homes.out(), manifest)
    missing = {k: [r for r in ROOMS if row[f"image_{r}"] is None] for k, row in stored.items()}
    assert {k: rooms for k, rooms in missing.items() if rooms} == {"k1": ["bath"], "k2": ["bed"]}
    found = quarantine(homes.out())
    assert found["k3"] == ("missing_image", "the row has none of its images")
    assert found["k4"][0] == "missing_image"
    assert re.fullmatch(no_file, found["k4"][1])
    assert found["k5"][0] == "unreadable_image"
    assert found["k5"][1].startswith("bed, bed/k5.jpg: no image of a known format")
    assert found["k6"][0] == "image_outside_folder"
    assert found["k6"][1].startswith("bath: '../k6.jpg' is not a path inside")
    assert stored.keys() == {f"k{i}" for i in range(48)} - found.keys()
    assert len(found) == 4


def test_raw_pixels_match_the_decoded_jpegs(raw):
    manifest = raw.prepare("raw", store="raw")
    jpegs = rows_by_key(raw.out("jpeg"), raw.prepare("jpeg", jpeg_quality=100))
    assert (manifest.image.encoding, manifest.image.row_bytes) == ("raw", SIZE * SIZE * 3)
    for split, table in shard_rows(raw.out("raw"), manifest).items():
        assert table.schema.field("image").type == pa.binary(SIZE * SIZE * 3)
        assert table.num_rows == manifest.splits[split].num_rows
        for row in table.to_pylist():
            pixels = np.frombuffer(row["image"], np.uint8).reshape(SIZE, SIZE, 3)
            decoded = decode_stored(jpegs[row["key"]]["image"])
            np.testing.assert_allclose(pixels.astype(int), decoded.astype(int), atol=3)
    shard = manifest.splits["train"].shards[0]
    group = pq.ParquetFile(raw.out("raw") / shard.path).metadata.row_group(0)
    column = group.column(1)
    assert (column.compression, column.statistics) == ("UNCOMPRESSED", None)
    assert "RLE_DICTIONARY" not in column.encodings


def test_shards_and_row_groups_of_raw_pixels_have_a_maximum_size():
    def rows(**options: object) -> tuple[int, int]:
        writer = ShardWriter((), (), (), spec(**options), Folder("out"), 0)
        return writer.rows_per_shard, writer.rows_per_group

    assert rows(store="jpeg", image_size=2000) == (1024, 64)
    assert rows(store="raw", image_size=100) == (1024, 64)
    per_shard, per_group = rows(store="raw", image_size=456)
    pixels = 456 * 456 * 3
    assert per_shard * pixels <= 2**28 < (per_shard + 1) * pixels
    assert per_group * pixels <= 2**22 < (per_group + 1) * pixels
    assert rows(store="raw", image_size=20_000) == (1, 1)


def test_words_are_stored_with_a_vocabulary_of_the_training_rows(raw):
    for i, row in enumerate(raw.rows):
        row["town"] = ("  Lima ", "Oslo", "", "Rome")[i % 4]
        row["zone"] = i % 2
    raw.rows[0]["town"] = "Ulm"
    manifest = raw.prepare(categorical=["town", "zone"])
    assert manifest.numeric_columns == ("area", "rooms")
    assert [v.column for v in manifest.vocabularies] == ["town", "zone"]
    assert manifest.vocabularies[0].words == ("Lima", "Oslo", "Rome")
    assert manifest.vocabularies[1].words == ("0", "1")
    table = shard_rows(raw.out(), manifest)["test"]
    assert table.schema.names == [
        *("key", "image", "area", "rooms", "town", "zone", "label", "original_pixels")
    ]
    assert table.schema.field("town").type == pa.string()
    source = {row["key"]: row for row in raw.rows}
    for key, row in rows_by_key(raw.out(), manifest).items():
        assert row["town"] == (source[key]["town"].strip() or None)
        assert row["zone"] == str(source[key]["zone"])


def test_rows_without_a_label_are_bad_unless_they_are_unlabelled(raw):
    for row in raw.rows[::4]:
        row["label"] = ""
    message = r"12 of 48 rows \(25.0%\) cannot be used.*: missing_label 12. The first: 'k0', label"
    with pytest.raises(JobError, match=message):
        raw.prepare()
    assert len(quarantine(raw.out())) == 12
    # The error precedes the work of reading images.
    assert not (raw.out() / "train").exists()
    manifest = raw.prepare(unlabelled="", max_bad_fraction=0)
    assert manifest.quarantine == {"unlabelled": 12}
    assert len(split_of(raw.out(), manifest)) == 36
    assert quarantine(raw.out())["k4"] == ("unlabelled", "label is empty")
    raw.rows[1]["label"] = "maybe"
    with pytest.raises(JobError, match=r"holds 3 values"):
        raw.prepare(unlabelled="", max_bad_fraction=0)
    raw.prepare(unlabelled=("", "maybe"), max_bad_fraction=0)


def test_tars_are_read_sequentially_and_images_without_a_row_are_reported(raw):
    order = np.random.default_rng(0).permutation(48).tolist()
    for start in range(0, 48, 16):
        members = order[start : start + 16] + ([99] if start == 16 else [])
        write_tar(raw.folder / f"{start}.tar", {f"k{i}.jpg": jpeg(i) for i in members})
    files_alone = rows_by_key(raw.out("files"), raw.prepare("files"))
    options = {"images": f"{raw.folder}/*.tar", "source": "webdataset"}
    manifest = raw.prepare("tars", **options)
    assert manifest.quarantine == {"no_record": 1}
    assert quarantine(raw.out("tars"))["k99"][0] == "no_record"
    assert rows_by_key(raw.out("tars"), manifest) == files_alone
    for table in shard_rows(raw.out("tars"), manifest).values():
        positions = [order.index(int(key[1:])) for key in table["key"].to_pylist()]
        assert positions == sorted(positions)
    assert raw.prepare("tars", **options) == manifest


def test_several_paths_in_a_cell_become_several_images_and_guesses_are_printed(raw, capsys):
    for i, row in enumerate(raw.rows):
        raw.image(f"b/k{i}", jpeg(1000 + i))
        row["photos"] = f"k{i}|b/K{i}.JPEG" if i else "k0"
    manifest = raw.prepare(image_column="photos", image_separator="|")
    assert manifest.image.columns == ("image_1", "image_2")
    assert manifest.quarantine == {}
    stored = rows_by_key(raw.out(), manifest)
    assert stored["k0"]["image_2"] is None
    for image, key in (("image_1", "k7"), ("image_2", "b/k7")):
        assert_has_colour(stored["k7"][image], raw.folder / "images" / f"{key}.jpg")
    assert "1: 48 of 48 images found by another spelling of their path, such as k0 → k0.jpg" in (
        capsys.readouterr().out
    )
    # `predict` reads rows with the settings of the manifest.
    raw.rows = [row | {"photos": f"{row['photos']}|k1|k2"} for row in raw.rows]
    raw.spec()
    assert set(open_source(manifest.prepare).images) == {"1", "2"}
