from pathlib import Path

import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.cell_text import TEXT
from ray_jobs.prepare.sources import image_resolver, open_source
from ray_jobs.prepare.sources.image_resolver import find_images
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.prepare.sources.samples import spec, touch


def find(folder: Path, *paths: str | None):
    walk = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    return find_images(pa.array(paths, TEXT), Folder(folder), lambda: pa.array(walk, TEXT))


@pytest.mark.parametrize(
    ("file", "path"),
    [
        # Backslashes: https://github.com/abbyy/barcode_detection_benchmark/issues/2
        ("train/x0.jpg", r"train\x0.jpg"),
        # https://github.com/CellProfiler/CellProfiler/issues/1385
        ("train/x0.jpg", r".\train\\x0.jpg"),
        ("x 0.jpg", "'x 0.jpg' "),
        # Escapes: https://github.com/HumanSignal/label-studio/issues/2291
        ("a b+ü.jpg", "a%20b%2B%C3%BC.jpg"),
        # https://github.com/sanic-org/sanic/pull/2625
        ("Straße/ü.jpg", "Straße/u\u0308.jpg"),
        # https://github.com/droppyjs/droppy/issues/72
        ("a\u0308.jpg", "ä.jpg"),
        # https://github.com/PeterL1n/BackgroundMattingV2/issues/51
        ("p003.JPG", "p003.jpg"),
        ("p003.jpeg", "p003"),
        # https://github.com/keras-team/keras-preprocessing/issues/169
        ("p003.tif", "p003"),
        ("p003.png", "p003.png.jpg"),
        # https://github.com/kohya-ss/sd-scripts/issues/287
        ("Photos/IMG_7.Jpg", "photos/img_7.jpg"),
        # Zeros: https://github.com/fastai/fastai/issues/1008
        ("0042.jpg", "42.jpg"),
        # https://github.com/leoxiaobin/deep-high-resolution-net.pytorch/issues/109
        ("COCO_000000000514.jpg", "COCO_514"),
        # Other machines: https://github.com/maps-as-data/MapReader/issues/219
        ("train/x0.jpg", "/data/photos/train/x0.jpg"),
        ("train/x0.jpg", r"D:\data\photos\train\x0.JPG"),
        ("x0.jpg", r"\\server\share\photos\x0.jpg"),
        ("x0.jpg", "../../photos/x0.jpg"),
        ("x0.jpg", "~/photos/x0.jpg"),
        ("x0.jpg", "file:///mnt/photos/x0.jpg"),
        # https://github.com/broadinstitute/cellpainting-gallery/issues/69
        ("x0.jpg", "s3://bucket/photos/x0.jpg"),
        ("x0.jpg", "https://host/photos/x0.jpg?size=big"),
        ("deep/er/x0.jpg", "x0.jpg"),
    ],
)
def test_a_path_is_found_where_exactly_one_file_fits_and_the_guess_is_reported(
    tmp_path, file, path
):
    found = find(touch(tmp_path, file, "other/y1.png"), path, None)
    assert found.files.to_pylist() == [file, None]
    assert found.problems == {}
    (note,) = found.notes
    note_start = "1 of 1 images found by another spelling of their path, such as"
    assert note == f"{note_start} {path} → {file}"


def test_the_name_of_the_folder_may_come_first(tmp_path):
    photos = touch(tmp_path / "data/photos", "x0.jpg")
    assert find(photos, "photos/x0.jpg", "data/photos/x0.jpg").files.to_pylist() == ["x0.jpg"] * 2
    # The user may have meant the images of another folder.
    assert find(photos, "test/x0.jpg").files.to_pylist() == [None]


@pytest.mark.parametrize(
    ("files", "path", "detail"),
    [
        (["a.png", "a.JPEG"], "a", "a may be a.JPEG or a.png"),
        (["x/a.jpg", "y/a.jpg"], "a.jpg", "a.jpg may be x/a.jpg or y/a.jpg"),
        (["07.jpg", "007.jpg"], "7.jpg", "7.jpg may be 007.jpg or 07.jpg"),
        (["A.jpg", "a.jpg"], "a.JPEG", "a.JPEG may be A.jpg or a.jpg"),
    ],
)
def test_two_files_that_fit_equally_are_ambiguous(tmp_path, files, path, detail):
    found = find(touch(tmp_path, *files), path)
    assert found.problems == {0: ("ambiguous_image", detail)}


def test_the_strictest_fit_wins_such_as_a_photo_over_its_mask(tmp_path):
    folder = touch(tmp_path, "a.JPG", "a.png", "b.jpg", "B.JPG", "sub/b.jpg")
    assert find(folder, "a.jpg", "b.jpg").files.to_pylist() == ["a.JPG", "b.jpg"]


def test_no_guess_takes_the_image_of_another_row(tmp_path):
    folder = touch(tmp_path, "7.jpg", "8.png", "site1/1.jpg", "9.jpg")
    paths = ["7.jpg", "007.jpg", "8.png", "8.jpg", "/m/site1/1.jpg", "/n/site1/1.jpg", "9.JPG"]
    found = find(folder, *paths, *paths)
    expected = ["7.jpg", None, "8.png", None, None, None, "9.jpg"]
    assert found.files.to_pylist() == expected * 2
    detail = "007.jpg may be 7.jpg, as another path of the table"
    assert found.problems[1] == ("ambiguous_image", detail)
    assert found.problems[4][1].startswith("/m/site1/1.jpg may be site1/1.jpg, as another path")
    assert {reason for reason, _ in found.problems.values()} == {"ambiguous_image"}


def test_a_path_without_a_file_names_the_nearest_file_or_says_that_it_is_a_url(tmp_path):
    folder = touch(tmp_path, "train/img_001.jpg", "zebra.jpg")
    problems = find(folder, "tran/img_001.jpg", "https://host/9.jpg", "/etc/passwd").problems
    detail = f"tran/img_001.jpg: no such file in {tmp_path}; the nearest is train/img_001.jpg"
    assert problems[0] == ("missing_image", detail)
    assert problems[1][0] == problems[2][0] == "image_outside_folder"
    assert "https://host/9.jpg is a URL; download the images" in problems[1][1]


def test_a_missing_file_among_many_is_noticed_and_listings_do_not_hide_files(tmp_path, monkeypatch):
    monkeypatch.setattr(image_resolver, "MAX_CHECKED", 3)
    names = [f"{i}.jpg" for i in range(8)]
    touch(tmp_path, *names, ".hidden/a.jpg")
    paths = pa.array([*names, ".hidden/a.jpg", "9.jpg"], TEXT)
    found = find_images(paths, Folder(tmp_path), lambda: pa.array(names, TEXT))
    assert found.files.to_pylist() == [*names, ".hidden/a.jpg", None]
    assert list(found.problems) == [9]


def test_existing_files_are_not_listed(tmp_path):
    def fail() -> pa.LargeStringArray:
        raise AssertionError

    paths = pa.array(["a/b.jpg", None, "./a/b.jpg"], TEXT)
    found = find_images(paths, Folder(touch(tmp_path, "a/b.jpg")), fail)
    assert found == (pa.array(["a/b.jpg", None, "a/b.jpg"], TEXT), {}, ())


@pytest.mark.parametrize(
    ("pattern", "file"),
    [
        # https://github.com/leoxiaobin/deep-high-resolution-net.pytorch/issues/109
        ("{id:05d}.jpg", "00042.jpg"),
        ("{id:05}_{key}.jpg", "00042_42.jpg"),
        ("x/{id:d}.*", "x/42.PNG"),
        ("{id:02d}.*", "42.tiff"),
    ],
)
def test_a_pattern_may_have_formats_and_any_extension(tmp_path, pattern, file):
    (tmp_path / "t.csv").write_text("id,label\n42,1\n00042,0\nA7,0\n")
    touch(tmp_path, f"photos/{file}")
    options = {"images": f"{tmp_path}/photos", "table": f"{tmp_path}/t.csv"}
    source = open_source(spec(**options, key_column="id", image_pattern=pattern, source="folder"))
    assert source.images[""].path[0].as_py() == file
    assert source.quarantined.keys() >= {2}


def test_an_unknown_format_raises_an_error_with_an_example(tmp_path):
    (tmp_path / "t.csv").write_text("id,label\n42,1\n")
    options = {"images": str(touch(tmp_path, "a.jpg")), "table": f"{tmp_path}/t.csv"}
    with pytest.raises(JobError, match=r"image_pattern='\{id:>5\}.jpg'.*'id:>5'.*\{id:05d\}"):
        open_source(spec(**options, key_column="id", image_pattern="{id:>5}.jpg"))


def test_a_cell_may_hold_several_paths(tmp_path):
    # https://github.com/autogluon/autogluon/pull/3388
    (tmp_path / "t.csv").write_text(
        "key,photos,label\n1,a.jpg;b.jpg;,1\n2, c.jpg ,0\n3,,0\n4,x.jpg;y.jpg,0\n5,;b.jpg;x.jpg,1\n"
    )
    touch(tmp_path, "p/a.jpg", "p/b.JPG", "p/c.jpg")
    options = {"images": f"{tmp_path}/p", "table": f"{tmp_path}/t.csv", "image_column": "photos"}
    source = open_source(spec(**options, image_separator=";"))
    assert source.settings == {"image_columns": ("1", "2")}
    assert source.images["1"].path.to_pylist() == ["a.jpg", "c.jpg", None, None, "b.JPG"]
    assert source.images["2"].path.to_pylist() == ["b.JPG", None, None, None, None]
    assert source.quarantined.keys() == {3}
    assert "1: x.jpg: no such file" in source.quarantined[3][1]
    trained = spec(**options, image_separator=";", image_columns=["1"])
    source = open_source(trained)
    assert list(source.images) == ["1"]
    assert "3 rows with more than 1 image; the model uses the first ones" in source.notes
    with pytest.raises(JobError, match=r"image_separator='\|' separates no .* as 'a.jpg;b.jpg;'"):
        open_source(spec(**options, image_separator="|"))
    with pytest.raises(JobError, match="set both, or leave"):
        open_source(spec(**options | {"image_column": None}, image_separator=";"))
