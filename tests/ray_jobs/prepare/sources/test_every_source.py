"""The same rows from every kind of source give the same prepared rows."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.prepare.job import prepare
from ray_jobs.prepare.sources import open_source
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.prepare.sources.samples import (
    example,
    jpeg,
    read_all,
    spec,
    write_csv,
    write_tar,
    write_tfrecord,
)
from tests.ray_jobs.raw import shard_rows
from tests.ray_jobs.storage.s3 import s3_folder

Write = Callable[[Path], dict[str, Any]]

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
    return {"images": f"{folder}/tars/*.tar", "table": f"{folder}/table.parquet"}


def tars_with_json(folder: Path) -> dict[str, Any]:
    files: dict[str, bytes] = {}
    for i, key in enumerate(KEYS):
        files[f"{key}.jpg"] = IMAGES[i]
        files[f"{key}.json"] = json.dumps({"area": AREA[i], "label": LABEL[i]}).encode()
    write_tar(folder / "all-000.tar", files)
    return {"images": f"{folder}/all-{{000..000}}.tar"}


def tfrecords(folder: Path) -> dict[str, Any]:
    rows = zip(KEYS, AREA, LABEL, IMAGES, strict=True)
    examples = [
        example(key=key.encode(), area=area, label=label, image=image)
        for key, area, label, image in rows
    ]
    write_tfrecord(folder / "rows.tfrecord", examples)
    return {"images": str(folder)}


def imagefolder(folder: Path) -> dict[str, Any]:
    for key, image in zip(KEYS, IMAGES, strict=True):
        (folder / f"{key}.jpg").write_bytes(image)
    names = [f"{key}.jpg" for key in KEYS]
    write_csv(folder / "metadata.csv", {"file_name": names, **TABLE})
    return {"images": str(folder)}


KINDS = [parquet_with_images, tars_and_parquet, tars_with_json, tfrecords, imagefolder]


def prepared(folder: Path, paths: dict[str, Any]) -> dict[str, pa.Table]:
    """Return the rows of each split."""
    options = {"output": str(folder / "out"), "image_size": 16, "rows_per_shard": 10, **paths}
    manifest = prepare(RunSpec.model_validate({"prepare": options}))
    assert manifest.quarantine == {}
    tables = shard_rows(folder / "out", manifest)
    return {split: table.sort_by("key") for split, table in tables.items()}


@pytest.fixture(scope="module")
def expected(ray_local, tmp_path_factory) -> dict[str, pa.Table]:
    folder = tmp_path_factory.mktemp("expected")
    tables = prepared(folder, folder_and_csv(folder))
    assert sorted(key for t in tables.values() for key in t["key"].to_pylist()) == KEYS
    return tables


@pytest.fixture(scope="module")
def s3() -> Iterator[Folder]:
    with s3_folder() as folder:
        yield folder


@pytest.mark.parametrize("write", KINDS)
def test_every_kind_of_source_gives_the_same_rows(tmp_path, expected, write: Write):
    (tmp_path / "source").mkdir()
    assert prepared(tmp_path, write(tmp_path / "source")) == expected


@pytest.mark.parametrize("write", [folder_and_csv, *KINDS])
def test_every_kind_of_source_can_be_on_s3(tmp_path, s3, write: Write):
    options = write(tmp_path)
    s3.upload(tmp_path, write.__name__)
    uri = f"{s3.uri}/{write.__name__}"
    on_s3 = {name: path.replace(str(tmp_path), uri) for name, path in options.items()}
    local, remote = open_source(spec(**options)), open_source(spec(**on_s3))
    assert local.table.num_rows == NUM_ROWS
    assert remote.table.equals(local.table)
    assert read_all(remote) == read_all(local)
    rows = [NUM_ROWS - 1, 3]
    assert read_all(remote, rows=rows) == read_all(local, rows=rows)
    # Paths may exceed 2 GiB.
    assert local.images[""].path.type == remote.images[""].path.type == pa.large_string()


def test_rows_of_an_imagefolder_stay_in_the_splits_of_its_folders(tmp_path):
    source = Folder(tmp_path / "source")
    for split in ("train", "valid", "test"):
        for i in range(12):
            source.write_bytes(f"{split}/{'dog' if i >= 6 else 'cat'}/{i}.jpg", jpeg(i))
    paths = {"images": source.uri, "positive_label": "dog", "numeric_columns": []}
    tables = prepared(tmp_path, paths)
    manifest = read_manifest(Folder(tmp_path / "out"))
    assert (manifest.prepare.split_column, manifest.statistics) == ("split", None)
    for split, table in tables.items():
        folder = "valid" if split == "validation" else split
        names = [name for name in source.names() if name.startswith(folder)]
        assert table.schema.names == ["key", "image", "label", "original_pixels"]
        assert table["key"].to_pylist() == names
        assert table["label"].to_pylist() == ["dog" in name for name in names]
