import os
from importlib import import_module
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.data.images import BadImage
from ray_jobs.prepare.sources import SOURCES, open_source
from ray_jobs.prepare.sources.containers import PieceReader
from ray_jobs.prepare.sources.loose_files import ImageFiles
from ray_jobs.prepare.sources.refs import ImageRefs, Source
from ray_jobs.storage.folder import Folder


def opened(folder: Path, content: str, **options: object) -> Source:
    (folder / "table.csv").write_text(content)
    (folder / "images").mkdir(exist_ok=True)
    fields = {"images": str(folder / "images"), "table": str(folder / "table.csv")}
    return open_source(PrepareSpec.model_validate(fields | {"source": "folder"} | options))


def written(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_paths_are_made_from_columns_and_key_stands_for_the_key_column(tmp_path):
    table = "id,label,site\n1,0,x\n2,1,\n3,1,z\n"
    source = opened(tmp_path, table, key_column="id", image_pattern="{site}/{id}_{key}.jpg")
    assert source.images[""].path.to_pylist() == ["x/1_1.jpg", None, "z/3_3.jpg"]
    assert source.bad == {1: ("missing_image", "site is empty, so the image has no path")}
    assert source.images[""].start is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "arae"}, "prepare.image_column: the table has no column 'arae'; did"),
        ({"image_pattern": "{arae}.jpg"}, "prepare.image_pattern: the table has no column 'arae'"),
        ({"key_column": "arae"}, "prepare.key_column: the table has no column 'arae'; did you"),
        ({"images": ""}, "prepare.images is not set"),
    ],
)
def test_a_missing_column_or_setting_is_an_error_that_names_it(tmp_path, options, message):
    with pytest.raises(JobError, match=message):
        opened(tmp_path, "key,area,label\n1,1,0\n", **options)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_names_a_function_that_exists(kind):
    module, _, function = SOURCES[kind].partition(":")
    assert callable(getattr(import_module(module), function))


def test_one_image_has_one_path_however_it_is_written(tmp_path):
    files = ImageFiles(str(written(tmp_path, "a/b.jpg")))
    spellings = ["a/b.jpg", "./a/b.jpg", "a//b.jpg", "a/./b.jpg", "././/a/.//b.jpg"]
    spellings += [str(tmp_path / "a/b.jpg"), f"file://{tmp_path}/a/b.jpg"]
    found, bad = files.find(pa.array(spellings))
    assert found.to_pylist()[:6] == ["a/b.jpg"] * 6
    assert bad.keys() <= {6}


def test_paths_that_leave_the_folder_are_refused(tmp_path):
    paths = ["../x", "a/../../x", "/etc/passwd", ".", "", "./.", "a..b", "...", None]
    found, bad = ImageFiles(str(tmp_path)).find(pa.array(paths))
    assert found.to_pylist() == [None] * 6 + ["a..b", "...", None]
    assert {reason for reason, _ in bad.values()} == {"image_outside_folder"}
    assert "'../x' is no path inside" in bad[0][1]
    assert sorted(bad) == list(range(6))


def test_a_globs_findings_are_known_by_name_and_by_the_end_of_their_path(tmp_path):
    names = ["x/1.jpg", "y/1.jpg", "y/2.jpg", "y/deep/3.jpg", "4.jpg", "y/a\nb.jpg", "z/y/2.jpg"]
    files = ImageFiles(f"{written(tmp_path, *names)}/**/*.jpg")
    wanted = ["x/1.jpg", "1.jpg", "y/deep/3.jpg", "deep/3.jpg", "3.jpg", "4.jpg", "5.jpg"]
    wanted += ["a\nb.jpg", "2.jpg", "p/3.jpg", None, "z/y/2.jpg"]
    found, bad = files.find(pa.array(wanted))
    deep = "y/deep/3.jpg"
    assert found.to_pylist() == [
        *["x/1.jpg", None, deep, deep, deep, "4.jpg", None],
        *["y/a\nb.jpg", None, None, None, "z/y/2.jpg"],
    ]
    assert bad == {
        1: ("ambiguous_image", "1.jpg may be x/1.jpg or y/1.jpg"),
        6: ("missing_image", "the glob finds no 5.jpg"),
        8: ("ambiguous_image", "2.jpg may be y/2.jpg or z/y/2.jpg"),
        9: ("missing_image", "the glob finds no p/3.jpg"),
    }


def test_a_globs_findings_are_those_that_a_search_one_by_one_would_give(tmp_path):
    rng = np.random.default_rng(0)
    names = {"/".join(rng.choice(list("abc"), rng.integers(1, 5))) + ".x" for _ in range(60)}
    # A name cannot be that of a folder, too.
    files = ImageFiles(f"{written(tmp_path, *names)}/**")
    wanted = ["/".join(rng.choice(list("abc"), rng.integers(1, 5))) + ".x" for _ in range(300)]
    found, bad = files.find(pa.array(wanted))
    for row, path in enumerate(wanted):
        matches = [n for n in names if PurePosixPath(n).match(path) or n == path]
        expected = matches[0] if len(matches) == 1 else None
        assert found[row].as_py() == expected
        if not expected:
            assert bad[row][0] == ("ambiguous_image" if matches else "missing_image")


def test_files_are_read_in_order_and_each_failure_stands_in_its_place(tmp_path):
    folder = written(tmp_path, *(f"{i}.jpg" for i in range(30)))
    (folder / "7.jpg").unlink()
    (folder / "9.jpg").unlink()
    os.mkdir(folder / "9.jpg")
    refs = ImageRefs(pa.array([f"{i}.jpg" for i in range(30)]))
    found = list(PieceReader(Folder(folder), in_containers=False).read(refs))
    for i, content in enumerate(found):
        if isinstance(content, BadImage):
            assert (i, content.reason) in ((7, "missing_image"), (9, "unreadable_file"))
        else:
            assert content == f"{i}.jpg".encode()
    assert sum(isinstance(content, BadImage) for content in found) == 2


def test_a_name_that_no_file_can_have_is_no_crash(tmp_path):
    reader = PieceReader(Folder(tmp_path), in_containers=False)
    (found,) = reader.read(ImageRefs(pa.array(["a\x00b.jpg"])))
    assert isinstance(found, BadImage)
    assert found.reason == "unreadable_file"
