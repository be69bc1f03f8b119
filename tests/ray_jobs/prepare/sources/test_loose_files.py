from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.prepare.cell_text import TEXT
from ray_jobs.prepare.sources import open_source
from ray_jobs.prepare.sources.loose_files import ImageFiles
from ray_jobs.prepare.sources.source import Source
from tests.ray_jobs.prepare.sources.samples import touch


def opened(folder: Path, content: str, **options: object) -> Source:
    (folder / "table.csv").write_text(content)
    (folder / "images").mkdir(exist_ok=True)
    fields = {"images": str(folder / "images"), "table": str(folder / "table.csv")}
    return open_source(PrepareSpec.model_validate(fields | {"source": "folder"} | options))


def test_a_path_pattern_combines_columns_and_key_means_the_key_column(tmp_path):
    touch(tmp_path, "images/x/1_1.jpg", "images/z/3_3.jpg")
    table = "id,label,site\n1,0,x\n2,1,\n3,1,z\n"
    source = opened(tmp_path, table, key_column="id", image_pattern="{site}/{id}_{key}.jpg")
    assert source.images[""].path.to_pylist() == ["x/1_1.jpg", None, "z/3_3.jpg"]
    assert source.quarantined == {1: ("missing_image", "site is empty, so the image has no path")}
    assert source.images[""].start is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "arae"}, "prepare.image_column: the table has no column 'arae'; did"),
        ({"image_pattern": "{arae}.jpg"}, "prepare.image_pattern: the table has no column 'arae'"),
        ({"key_column": "arae"}, "prepare.key_column: the table has no column 'arae'; did you"),
        ({"image_columns": ["hall"]}, r"names 'hall', but the table has no such .*no \{image\}"),
        ({"images": "/no/such"}, "there is no folder /no/such"),
    ],
)
def test_a_missing_column_or_setting_raises_an_error_with_its_name(tmp_path, options, message):
    with pytest.raises(JobError, match=message):
        opened(tmp_path, "key,area,label\n1,1,0\n", **options)


def test_all_spellings_of_a_path_give_the_same_path_and_those_outside_the_folder_none(tmp_path):
    files = ImageFiles(str(touch(tmp_path, "a/b.jpg")))
    spellings = ["a/b.jpg", "./a/b.jpg", "a//b.jpg", "a/./b.jpg", "././/a/.//b.jpg"]
    spellings += [str(tmp_path / "a/b.jpg"), f"file://{tmp_path}/a/b.jpg"]
    assert files.find(pa.array(spellings, TEXT)) == (pa.array(["a/b.jpg"] * 7, TEXT), {}, ())
    touch(tmp_path, "a..b", "...")
    outside = ["../x", "a/../../x", "/etc/passwd", ".", "", "./."]
    found, problems, _ = files.find(pa.array([*outside, "a..b", "...", None], TEXT))
    assert found.to_pylist() == [None] * 6 + ["a..b", "...", None]
    assert {reason for reason, _ in problems.values()} == {"image_outside_folder"}
    assert "'../x' is not a path inside" in problems[0][1]
    assert sorted(problems) == list(range(6))


def test_a_matched_file_is_found_by_name_or_by_the_end_of_its_path(tmp_path):
    names = ["x/1.jpg", "y/1.jpg", "y/2.jpg", "y/deep/3.jpg", "4.jpg", "y/a\nb.jpg", "z/y/2.jpg"]
    files = ImageFiles(f"{touch(tmp_path, *names)}/**/*.jpg")
    wanted = ["x/1.jpg", "1.jpg", "y/deep/3.jpg", "deep/3.jpg", "3.jpg", "4.jpg", "5.jpg"]
    wanted += ["a\nb.jpg", "2.jpg", "p/3.jpg", None, "z/y/2.jpg"]
    found, problems, notes = files.find(pa.array(wanted, TEXT))
    assert notes == ()
    deep = "y/deep/3.jpg"
    expected = ["x/1.jpg", None, deep, deep, deep, "4.jpg", None]
    expected += ["y/a\nb.jpg", None, None, None, "z/y/2.jpg"]
    assert found.to_pylist() == expected
    assert problems == {
        1: ("ambiguous_image", "1.jpg may be x/1.jpg or y/1.jpg"),
        6: ("missing_image", "the glob matches no 5.jpg; the nearest is 4.jpg"),
        8: ("ambiguous_image", "2.jpg may be y/2.jpg or z/y/2.jpg"),
        9: ("missing_image", "the glob matches no p/3.jpg; the nearest is y/deep/3.jpg"),
    }
    with pytest.raises(JobError, match=r"\.webp' matches no file"):
        ImageFiles(f"{tmp_path}/**/*.webp")


def test_matches_by_path_end_equal_those_of_a_sequential_search(tmp_path):
    rng = np.random.default_rng(0)
    names = {"/".join(rng.choice(list("abc"), rng.integers(1, 5))) + ".x" for _ in range(60)}
    files = ImageFiles(f"{touch(tmp_path, *names)}/**")
    wanted = ["/".join(rng.choice(list("abc"), rng.integers(1, 5))) + ".x" for _ in range(300)]
    found, problems, _ = files.find(pa.array(wanted, TEXT))
    for row, path in enumerate(wanted):
        matches = [n for n in names if n == path] or [
            n for n in names if PurePosixPath(n).match(path)
        ]
        expected = matches[0] if len(matches) == 1 else None
        assert found[row].as_py() == expected
        if not expected:
            assert problems[row][0] == ("ambiguous_image" if matches else "missing_image")
