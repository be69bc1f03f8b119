import os
from pathlib import Path

import pyarrow as pa
import pytest

from ray_jobs.prepare.sources import open_source
from ray_jobs.prepare.sources.parquet_files import is_parquet
from ray_jobs.prepare.sources.source_files import Walk, find_files
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.prepare.sources.samples import spec, touch
from tests.ray_jobs.storage.s3 import s3_folder

LITTER = [
    # https://github.com/pytorch/vision/issues/2831, https://github.com/tensorflow/tensorflow/issues/46595
    ".ipynb_checkpoints/a-checkpoint.jpg",
    "cat/.ipynb_checkpoints/a-checkpoint.jpg",
    # https://github.com/pytorch/vision/issues/109
    "cat/.DS_Store",
    # https://github.com/jurplel/qView/issues/651, https://github.com/scverse/spatialdata-io/pull/260
    "cat/._a.jpg",
    # https://github.com/fire-eggs/DarkThumbs/issues/36
    "__MACOSX/cat/a.jpg",
    # https://github.com/motioneye-project/motioneye/issues/89
    ".AppleDouble/a.jpg",
    "dog/Thumbs.db",
    "desktop.ini",
]
KEPT = ["cat/_MG_1.jpg", "cat/a.jpg", "dog/b.jpg"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return touch(tmp_path / ".data", *LITTER, *KEPT)


def test_what_programs_leave_behind_is_skipped_at_any_depth(folder):
    assert Walk(Folder(folder)).names() == KEPT
    source = open_source(spec(images=str(folder)))
    assert source.table["label"].to_pylist() == ["cat", "cat", "dog"]
    (folder / "t.csv").write_text("key,label\na,1\n")
    source = open_source(spec(images=f"{folder}/**/*.jpg", table=f"{folder}/t.csv"))
    assert source.images[""].path.to_pylist() == ["cat/a.jpg"]


def test_a_glob_that_names_a_hidden_folder_matches_it(folder):
    names = Walk(Folder(folder), ["**/.ipynb_*/*.jpg"]).names()
    assert names == [".ipynb_checkpoints/a-checkpoint.jpg", f"cat/{LITTER[0]}"]
    assert Walk(Folder(folder), ["*/*.jpg"]).names() == KEPT


def test_a_folder_in_an_object_store_gives_the_same_files(folder):
    with s3_folder() as s3:
        s3.upload(folder, "data")
        remote = Walk(s3 / "data")
        assert remote.names() == KEPT
        assert list(remote.levels(9)) == list(Walk(Folder(folder)).levels(9)) == [[], KEPT]


def test_links_are_followed_and_loops_and_broken_links_are_not(tmp_path):
    # https://github.com/huggingface/datasets/issues/6853 and, for loops,
    # https://github.com/nanoporetech/ont_fast5_api/issues/25
    touch(tmp_path, "data/cat/a.jpg", "more/b.jpg", "c.jpg")
    data = tmp_path / "data"
    links = {"cat/loop": "..", "cat/self": "self", "copy": "cat", "dog": "../more", "broken": "no"}
    for link, target in (links | {"cat/c.jpg": "../../c.jpg"}).items():
        (data / link).symlink_to(target)
    walk = Walk(Folder(data))
    assert walk.names() == ["cat/a.jpg", "cat/c.jpg", "dog/b.jpg"]
    assert walk.notes == (
        "skipped 2 names (broken link), such as broken",
        "skipped 2 names (link to a folder that is listed), such as cat/loop",
    )
    assert Walk(Folder(data / "copy")).names() == ["a.jpg", "c.jpg", "loop/dog/b.jpg"]
    # A folder of nothing but links.
    (tmp_path / "links").mkdir()
    (tmp_path / "links/dog").symlink_to("../more")
    assert open_source(spec(images=f"{tmp_path}/links")).table["key"].to_pylist() == ["dog/b.jpg"]


def test_names_that_are_not_utf8_are_skipped_and_reported(tmp_path):
    # https://github.com/jjjake/internetarchive/issues/284
    touch(tmp_path, "cat/a.jpg")
    for name in (b"cat/caf\xe9.jpg", b"\xff.jpg"):
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).touch()
    source = open_source(spec(images=str(tmp_path)))
    assert source.table["key"].to_pylist() == ["cat/a.jpg"]
    assert source.notes == (r"skipped 2 names (not UTF-8), such as '\xff.jpg'",)


def test_private_files_of_spark_and_delta_are_not_data(tmp_path):
    touch(tmp_path, "a.parquet", "_metadata.parquet", "_delta_log/0.parquet", "_SUCCESS")
    assert find_files(str(tmp_path), is_parquet, "Parquet files")[1] == ["a.parquet"]
    assert find_files(f"{tmp_path}/_*.parquet", is_parquet, "")[1] == ["_metadata.parquet"]


@pytest.mark.parametrize("stray", ["x.parquet", "x.csv", "x.tar", "x.tfrecord", "metadata.csv"])
def test_images_with_a_table_win_over_other_files(tmp_path, stray):
    touch(tmp_path, "a.jpg", stray)
    (tmp_path / "table.csv").write_text("key,label\na,1\n")
    for images in (str(tmp_path), f"{tmp_path}/*", f"{tmp_path}/*.jpg"):
        source = open_source(spec(images=images, table=f"{tmp_path}/table.csv"))
        assert source.images[""].path == pa.array(["a.jpg"], pa.large_string())
    assert open_source(spec(images=str(tmp_path), table=f"{tmp_path}/table.csv")).notes == (
        (f"images read from image files; prepare.images holds image files (a.jpg) and {kind}",)
        if (kind := {"x.parquet": "Parquet files (x.parquet)", "x.tar": "tar files (x.tar)",
                     "x.tfrecord": "TFRecord files (x.tfrecord)"}.get(stray))
        else ()
    )  # fmt: skip


def test_the_files_that_a_glob_matches_determine_the_kind(tmp_path):
    touch(tmp_path, "old/x.parquet", "new/cat/a.jpg")
    source = open_source(spec(images=f"{tmp_path}/n*/*/*"))
    assert source.table["key"].to_pylist() == ["new/cat/a.jpg"]
