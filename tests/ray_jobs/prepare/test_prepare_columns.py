"""Tests several images per row, raw pixels, words, and rows without a label."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.images import decode_stored
from ray_jobs.prepare.job import prepare
from tests.ray_jobs.raw import SIZE, Raw, files, jpeg, quarantine, shard_rows, split_of

HOUSES = Path(__file__).parents[3].parent / "shared" / "data" / "houses"
ROOMS = ("bath", "bed")

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture
def raw(tmp_path: Path) -> Raw:
    return Raw(tmp_path / "raw").add(range(48))


@pytest.fixture
def homes(raw: Raw) -> Raw:
    """Rows with two images each, in a folder per room."""
    for i in range(48):
        for number, room in enumerate(ROOMS):
            raw.image(f"{room}/k{i}", jpeg(1000 * number + i))
    return raw


def stored_rows(folder: Path, manifest) -> dict[str, dict]:
    tables = shard_rows(folder, manifest).values()
    return {row["key"]: row for table in tables for row in table.to_pylist()}


def colour(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[5, 5].astype(int)


def test_several_images_are_found_by_pattern_or_by_columns_of_paths(homes):
    pattern = homes.prepare("a", image_columns=ROOMS, image_pattern="{image}/{key}.jpg")
    for row in homes.rows:
        row |= {room: f"{room}/{row['key']}.jpg" for room in ROOMS}
    columns = homes.prepare("b", image_columns=ROOMS)
    assert pattern.image.columns == columns.image.columns == ("image_bath", "image_bed")
    assert pattern.numeric_columns == columns.numeric_columns == ("area", "rooms")
    assert files(homes.out("a")) == files(homes.out("b"))
    table = shard_rows(homes.out("a"), pattern)["train"]
    assert table.schema.names == ["key", "image_bath", "image_bed", "area", "rooms", "label"]
    for row in table.to_pylist():
        for room in ROOMS:
            original = (homes.folder / "images" / room / f"{row['key']}.jpg").read_bytes()
            pixel = decode_stored(row[f"image_{room}"])[12, 12].astype(int)
            np.testing.assert_allclose(pixel, colour(original), atol=4)


def test_some_of_several_images_may_be_missing_but_none_damaged(homes):
    images = homes.folder / "images"
    for row in homes.rows:
        row |= {room: f"{room}/{row['key']}.jpg" for room in ROOMS}
    homes.rows[1]["bath"] = ""
    (images / "bed/k2.jpg").unlink()
    homes.rows[3] |= {"bath": "", "bed": ""}
    for room in ROOMS:
        (images / room / "k4.jpg").unlink()
    homes.image("bed/k5", b"no photo")
    homes.rows[6]["bath"] = "../k6.jpg"
    manifest = homes.prepare(image_columns=ROOMS, max_bad_fraction=0.2)
    stored = stored_rows(homes.out(), manifest)
    missing = {k: [r for r in ROOMS if row[f"image_{r}"] is None] for k, row in stored.items()}
    assert {k: rooms for k, rooms in missing.items() if rooms} == {"k1": ["bath"], "k2": ["bed"]}
    found = quarantine(homes.out())
    assert found["k3"] == ("missing_image", "the row has none of its images")
    assert found["k4"] == (
        "missing_image",
        "none of its images exists: bath/k4.jpg, bed/k4.jpg",
    )
    assert found["k5"][0] == "unreadable_image"
    assert found["k5"][1].startswith("bed, bed/k5.jpg: no image of a known format")
    assert found["k6"][0] == "image_outside_folder"
    assert found["k6"][1].startswith("bath: '../k6.jpg' is not a path inside")
    assert stored.keys() == {f"k{i}" for i in range(48)} - found.keys()
    assert len(found) == 4


def test_a_glob_may_match_only_one_of_several_images(homes):
    for row in homes.rows:
        row |= {room: f"{room}/{row['key']}.jpg" for room in ROOMS}
    homes.rows[1]["bath"] = "bath/none.jpg"
    images = f"{homes.folder}/images/**/*.jpg"
    manifest = homes.prepare(images=images, image_columns=ROOMS)
    assert stored_rows(homes.out(), manifest)["k1"]["image_bath"] is None
    assert sum(info.num_rows for info in manifest.splits.values()) == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_columns": ["hall"]},
            r"names 'hall', but the table has no such .*no \{image\}",
        ),
        ({"image_columns": ["key", "key"]}, "holds an empty or repeated name"),
        ({"image_columns": ["area"], "image_column": "key"}, "set only one of them"),
    ],
)
def test_invalid_image_names_raise_an_error(raw, options, message):
    with pytest.raises(JobError, match=message):
        raw.prepare(**options)


def test_a_numeric_column_cannot_have_the_name_of_an_image_column(homes):
    for row in homes.rows:
        row["image_bed"] = 1
    options = {"image_columns": ROOMS, "image_pattern": "{image}/{key}.jpg"}
    with pytest.raises(JobError, match="'image_bed' has the name of a reserved column"):
        homes.prepare(**options)
    with pytest.raises(JobError, match="names 'image_bed', which is a reserved column"):
        homes.prepare(**options, numeric_columns=["image_bed"])
    homes.prepare(**options, exclude_columns=["image_bed"])


@pytest.mark.skipif(not HOUSES.exists(), reason="needs the houses data")
def test_the_houses_have_four_images_each(tmp_path):
    rooms = ["bathroom", "bedroom", "frontal", "kitchen"]
    section = {
        "images": str(HOUSES / "images"),
        "table": str(HOUSES / "houses.csv"),
        "output": str(tmp_path),
        "image_pattern": "{house_id}_{image}.jpg",
        "image_columns": rooms,
        "key_column": "house_id",
        "label_column": "expensive",
        "numeric_columns": ["area"],
        "image_size": 32,
    }
    manifest = prepare(RunSpec.model_validate({"prepare": section}))
    assert manifest.image.names == tuple(rooms)
    assert sum(info.num_rows for info in manifest.splits.values()) == 400
    table = shard_rows(tmp_path, manifest)["train"]
    assert sum(table[f"image_{room}"].null_count for room in rooms) == 0


def test_raw_pixels_match_the_decoded_jpegs(raw):
    manifest = raw.prepare("raw", store="raw")
    jpegs = stored_rows(raw.out("jpeg"), raw.prepare("jpeg", jpeg_quality=100))
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
    from ray_jobs.config.spec import PrepareSpec
    from ray_jobs.prepare.shard_writer import ShardWriter
    from ray_jobs.storage.folder import Folder

    def rows(**options: object) -> tuple[int, int]:
        spec = PrepareSpec.model_validate(options)
        writer = ShardWriter((), (), (), spec, Folder("out"), 0)
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
    assert table.schema.names == ["key", "image", "area", "rooms", "town", "zone", "label"]
    assert table.schema.field("town").type == pa.string()
    source = {row["key"]: row for row in raw.rows}
    for key, row in stored_rows(raw.out(), manifest).items():
        assert row["town"] == (source[key]["town"].strip() or None)
        assert row["zone"] == str(source[key]["zone"])


def test_words_need_no_numeric_columns(raw):
    for i, row in enumerate(raw.rows):
        del row["area"], row["rooms"]
        row["town"] = ("Lima", "Oslo")[i % 2]
    manifest = raw.prepare(categorical=["town"])
    assert manifest.numeric_columns == ()
    assert manifest.statistics is None
    assert manifest.vocabularies[0].words == ("Lima", "Oslo")


@pytest.mark.parametrize(
    ("categorical", "options", "message"),
    [
        (["twon"], {}, r"data\.categorical: the table has no column 'twon'; did you mean 'town'"),
        (["town", "town"], {}, "names 'town' twice"),
        (["key"], {}, "names 'key', the key_column"),
        (["label"], {}, "names 'label', the label_column"),
        (["rooms"], {"numeric_columns": ["rooms"]}, "both name 'rooms'; remove it"),
        (["town"], {"exclude_columns": ["town"]}, "exclude_columns both name 'town'"),
        (["image"], {}, "names 'image', which is a reserved column of the shards"),
    ],
)
def test_a_categorical_column_with_another_role_raises_an_error(raw, categorical, options, message):
    for row in raw.rows:
        row |= {"town": "Lima", "image": "x"}
    with pytest.raises(JobError, match=message):
        raw.prepare(categorical=categorical, **options)


def test_rows_without_a_label_are_bad_unless_they_are_skipped(raw):
    for row in raw.rows[::4]:
        row["label"] = ""
    message = r"12 of 48 rows \(25.0%\) cannot be used.*: missing_label 12. The first: 'k0', label"
    with pytest.raises(JobError, match=message):
        raw.prepare()
    manifest = raw.prepare(skip_unlabelled=True, max_bad_fraction=0)
    assert manifest.quarantine == {"missing_label": 12}
    assert len(split_of(raw.out(), manifest)) == 36
    assert quarantine(raw.out())["k4"] == ("missing_label", "label is empty")
    raw.rows[1]["label"] = "maybe"
    with pytest.raises(JobError, match=r"holds 3 values"):
        raw.prepare(skip_unlabelled=True, max_bad_fraction=0)


def test_a_number_rule_is_applied_or_suggested(raw):
    for row in raw.rows:
        row["age"] = "91-92" if row["key"] == "k3" else "50"
    manifest = raw.prepare(max_bad_fraction=0.1)
    expected = "age is '91-92'; prepare.number_rules {age: range_mean} would read it"
    assert quarantine(raw.out())["k3"] == ("non_numeric_text", expected)
    assert "k3" not in split_of(raw.out(), manifest)
    manifest = raw.prepare(number_rules={"age": "range_mean"})
    assert stored_rows(raw.out(), manifest)["k3"]["age"] == 91.5


def test_tars_are_read_sequentially_and_images_without_a_row_are_reported(raw):
    order = np.random.default_rng(0).permutation(48)
    position = {}
    for number, start in enumerate(range(0, 48, 16)):
        with tarfile.open(raw.folder / f"{number}.tar", "w") as tar:
            for i in [*order[start : start + 16].tolist(), *([99] if number == 1 else [])]:
                content = jpeg(i)
                position[f"k{i}"] = (number, len(position))
                info = tarfile.TarInfo(f"k{i}.jpg")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    files_alone = stored_rows(raw.out("files"), raw.prepare("files"))
    options = {"images": f"{raw.folder}/*.tar", "source": "webdataset"}
    manifest = raw.prepare("tars", **options)
    assert manifest.quarantine == {"no_record": 1}
    assert quarantine(raw.out("tars"))["k99"][0] == "no_record"
    assert stored_rows(raw.out("tars"), manifest) == files_alone
    for table in shard_rows(raw.out("tars"), manifest).values():
        keys = table["key"].to_pylist()
        assert keys == sorted(keys, key=lambda key: position[key])
    assert raw.prepare("tars", **options) == manifest
