import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from pyarrow import fs

from ray_jobs.storage import Folder

Open = Callable[[Path], Folder]

NAMES = ("plain", "with space", "50%", "a%20b", "a#b", "a+b", "a?b", "[x]", "größe", "a:b", "it's")


@pytest.fixture(params=["path", "uri"])
def opened(request: pytest.FixtureRequest) -> Open:
    """Opens a local folder by its path, or by a URI."""
    return Folder if request.param == "path" else lambda path: Folder(f"file://{quote(str(path))}")


@pytest.fixture
def folder(opened: Open, tmp_path: Path) -> Folder:
    return opened(tmp_path / "there")


def test_what_is_written_is_read_back(folder, tmp_path):
    folder.write_bytes("deep/er/file.bin", b"\x00\xff")
    folder.write_text("text.txt", "größe\n")
    folder.write_json("value.json", {"a": [1, None, 0.1]})
    assert folder.read_bytes("deep/er/file.bin") == b"\x00\xff"
    assert folder.read_bytes("text.txt") == "größe\n".encode()
    assert folder.read_json("value.json") == {"a": [1, None, 0.1]}
    assert (tmp_path / "there/deep/er/file.bin").read_bytes() == b"\x00\xff"


def test_opening_a_folder_creates_nothing(opened, tmp_path):
    assert opened(tmp_path / "there").is_local
    assert not list(tmp_path.iterdir())


def test_names_are_those_of_all_files_below_in_order(folder):
    for name in ("b.txt", "a/2.txt", "a/1.txt", "a/c/0.txt"):
        folder.write_text(name, name)
    assert list(folder.names()) == ["a/1.txt", "a/2.txt", "a/c/0.txt", "b.txt"]
    assert list(folder.names("a")) == ["a/1.txt", "a/2.txt", "a/c/0.txt"]
    assert list((folder / "a").names("c")) == ["c/0.txt"]
    assert list(folder.names("nothing")) == []


def test_exists_knows_files_and_folders(folder):
    folder.write_text("a/b.txt", "")
    assert [folder.exists(n) for n in ("a", "a/b.txt", "b.txt")] == [True, True, False]


def test_delete_removes_files_and_folders_and_minds_no_missing_ones(folder):
    for name in ("a/1.txt", "a/b/2.txt", "c.txt"):
        folder.write_text(name, "")
    for name in ("a", "c.txt", "nothing"):
        folder.delete(name)
    assert list(folder.names()) == []
    assert not folder.exists("a")


def test_a_folder_is_uploaded_with_all_that_is_below_and_files_come_down_again(folder, tmp_path):
    (tmp_path / "model/variables").mkdir(parents=True)
    (tmp_path / "model/a.txt").write_text("a")
    (tmp_path / "model/variables/b.bin").write_bytes(b"b" * 1000)
    folder.upload(tmp_path / "model", "best/model")
    folder.upload(tmp_path / "model/a.txt", "alone.txt")
    assert list(folder.names()) == ["alone.txt", "best/model/a.txt", "best/model/variables/b.bin"]
    target = tmp_path / "new/place/b.bin"
    assert folder.download("best/model/variables/b.bin", target) == target
    assert target.read_bytes() == b"b" * 1000


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a/..", "", ".", "//x"])
def test_a_name_that_leaves_the_folder_is_refused(folder, name):
    for use in (folder.locate, folder.read_bytes, folder.exists, folder.delete, folder.__truediv__):
        with pytest.raises(ValueError, match="is no path inside"):
            use(name)
    with pytest.raises(ValueError, match="is no path inside"):
        folder.write_bytes(name, b"")


@pytest.mark.parametrize("name", NAMES)
def test_odd_characters_mean_themselves_in_folders_and_names(opened, tmp_path, name):
    folder = opened(tmp_path / name)
    folder.write_text(f"{name}/{name}.txt", "here")
    assert (tmp_path / name / name / f"{name}.txt").read_text() == "here"
    inner = folder / name
    assert inner.path == folder.locate(name) == str(tmp_path / name / name)
    assert list(inner.names()) == [f"{name}.txt"]
    again = Folder(inner.uri)
    assert again.read_bytes(f"{name}.txt") == b"here"


def test_a_relative_path_is_taken_from_the_current_directory_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder("runs/")
    monkeypatch.chdir("/")
    folder.write_text("a.txt", "a")
    assert folder.uri == str(tmp_path / "runs")
    assert (tmp_path / "runs/a.txt").exists()


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder("~/runs").path == str(tmp_path / "runs")


def test_a_folder_can_be_sent_to_another_process(folder):
    folder.write_text("a.txt", "a")
    sent = pickle.loads(pickle.dumps(folder))
    assert (sent.uri, sent.read_bytes("a.txt")) == (folder.uri, b"a")


def test_a_write_that_fails_leaves_the_old_file_and_no_part_of_the_new(
    folder, tmp_path, monkeypatch
):
    folder.write_text("a.txt", "old")

    def fail(source: str, target: str) -> None:
        assert Path(source).read_text() == "new"
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            folder.write_text("a.txt", "new")
    assert folder.read_bytes("a.txt") == b"old"
    assert os.listdir(tmp_path / "there") == ["a.txt"]
    folder.write_text("a.txt", "new")
    assert folder.read_bytes("a.txt") == b"new"


def test_a_value_that_is_no_json_leaves_the_old_file(folder, tmp_path):
    folder.write_json("a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("a.json", {"loss": math.nan})
    assert folder.read_json("a.json") == 1
    assert os.listdir(tmp_path / "there") == ["a.json"]


def test_a_missing_file_is_an_error_with_its_path(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "there/nothing.json")):
        folder.read_json("nothing.json")


def test_a_local_folder_needs_no_scheme_and_has_a_local_filesystem(tmp_path):
    assert isinstance(Folder(tmp_path).filesystem, fs.LocalFileSystem)
    assert str(Folder(f"{tmp_path}/")) == str(tmp_path)
