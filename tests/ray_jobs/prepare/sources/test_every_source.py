"""The same rows from every kind of source give the same prepared rows."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.config.spec import PrepareSpec, RunSpec
from ray_jobs.data.manifest import Manifest
from ray_jobs.prepare.job import prepare
from ray_jobs.prepare.sources import open_source
from tests.ray_jobs.prepare.sources.samples import jpeg, write_csv, write_tar

pytestmark = pytest.mark.usefixtures("ray_local")

NUM_ROWS = 40
KEYS = [f"{i:03d}" for i in range(NUM_ROWS)]
AREA = [i * 1.5 for i in range(NUM_ROWS)]
LABEL = [int(i % 3 == 0) for i in range(NUM_ROWS)]
IMAGES = [jpeg(i) for i in range(NUM_ROWS)]
TABLE = {"key": KEYS, "area": AREA, "label": LABEL}


def folder_and_csv(folder: Path) -> dict[str, Any]:
    (folder / "photos").mkdir()
    for key, image in zip(KEYS, IMAGES, strict=True):
        (folder / "photos" / f"{key}.jpg").write_bytes(image)
    return {"images": f"{folder}/photos", "table": write_csv(folder / "table.csv", TABLE)}


def parquet_with_images(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.table({**TABLE, "image": IMAGES}), folder / "rows.parquet", row_group_size=7)
    return {"images": f"{folder}/rows.parquet"}


def tars_and_parquet(folder: Path) -> dict[str, Any]:
    for start in range(0, NUM_ROWS, 15):
        rows = range(start, min(start + 15, NUM_ROWS))
        write_tar(folder / "tars" / f"{start}.tar", {f"{KEYS[i]}.jpg": IMAGES[i] for i in rows})
    pq.write_table(pa.table(TABLE), folder / "table.parquet")
    return {"images": f"{folder}/tars", "table": f"{folder}/table.parquet"}


def tars_with_json(folder: Path) -> dict[str, Any]:
    files: dict[str, bytes] = {}
    for i, key in enumerate(KEYS):
        files[f"{key}.jpg"] = IMAGES[i]
        files[f"{key}.json"] = json.dumps({"area": AREA[i], "label": LABEL[i]}).encode()
    write_tar(folder / "all-000.tar", files)
    return {"images": f"{folder}/all-{{000..000}}.tar"}


def tfrecords(folder: Path) -> dict[str, Any]:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(folder / "rows.tfrecord")) as writer:
        for key, area, label, image in zip(KEYS, AREA, LABEL, IMAGES, strict=True):
            feature = {
                "key": tf.train.Feature(bytes_list=tf.train.BytesList(value=[key.encode()])),
                "area": tf.train.Feature(float_list=tf.train.FloatList(value=[area])),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString())
    return {"images": str(folder)}


def imagefolder(folder: Path) -> dict[str, Any]:
    for key, image in zip(KEYS, IMAGES, strict=True):
        (folder / f"{key}.jpg").write_bytes(image)
    names = [f"{key}.jpg" for key in KEYS]
    write_csv(folder / "metadata.csv", {"file_name": names, **TABLE})
    return {"images": str(folder)}


KINDS = [
    folder_and_csv, parquet_with_images, tars_and_parquet, tars_with_json, tfrecords, imagefolder,
]  # fmt: skip


def prepared(folder: Path, paths: dict[str, Any]) -> Manifest:
    options = {"output": str(folder / "out"), "image_size": 16, "rows_per_shard": 10, **paths}
    return prepare(RunSpec.model_validate({"prepare": options}))


def rows_of(folder: Path, manifest: Manifest) -> dict[str, tuple[Any, ...]]:
    rows = {}
    for split, info in manifest.splits.items():
        for shard in info.shards:
            for row in pq.read_table(folder / "out" / shard.path).to_pylist():
                rows[row["key"]] = (split, row["image"], row["area"], row["label"])
    return rows


@pytest.fixture(scope="module")
def expected(ray_local, tmp_path_factory) -> dict[str, tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("expected")
    rows = rows_of(folder, prepared(folder, folder_and_csv(folder)))
    assert sorted(rows) == KEYS
    return rows


@pytest.mark.parametrize("write", KINDS)
def test_every_kind_of_source_gives_the_same_rows(
    tmp_path, expected, write: Callable[[Path], dict[str, Any]]
):
    (tmp_path / "source").mkdir()
    manifest = prepared(tmp_path, write(tmp_path / "source"))
    assert manifest.numeric_columns == ("area",)
    assert manifest.quarantine == {}
    assert rows_of(tmp_path, manifest) == expected


@pytest.mark.parametrize("write", KINDS)
def test_paths_of_images_may_exceed_2_gib(tmp_path, write: Callable[[Path], dict[str, Any]]):
    source = open_source(PrepareSpec.model_validate(write(tmp_path)))
    assert source.images[""].path.type == pa.large_string()


def test_rows_of_an_imagefolder_stay_in_the_splits_of_its_folders(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        for label in ("cat", "dog"):
            for i in range(6):
                path = tmp_path / "source" / split / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                content = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(
                    content, "PNG"
                )
                path.write_bytes(content.getvalue())
    paths = {"images": f"{tmp_path}/source", "positive_label": "dog", "numeric_columns": []}
    manifest = prepared(tmp_path, paths)
    assert manifest.prepare.split_column == "split"
    assert {split: info.class_counts for split, info in manifest.splits.items()} == {
        "train": (6, 6), "validation": (6, 6), "test": (6, 6),
    }  # fmt: skip
    for split, info in manifest.splits.items():
        keys = pq.read_table(tmp_path / "out" / info.shards[0].path)["key"].to_pylist()
        folder = "valid" if split == "validation" else split
        assert {key.split("/")[0] for key in keys} == {folder}
