import math
import os
import pickle
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from pyarrow import fs

from ray_jobs.storage.folder import Folder, expand_braces, glob_regex, split_file, split_glob

Open = Callable[[Path], Folder]

NAMES = ("plain", "with space", "50%", "a%20b", "a#b", "a+b", "a?b", "[x]", "größe", "a:b", "it's")


@pytest.fixture(params=["path", "uri"])
def open_folder(request: pytest.FixtureRequest) -> Open:
    """A function that opens a local folder by its path or by a URI."""
    return Folder if request.param == "path" else lambda path: Folder(f"file://{quote(str(path))}")


@pytest.fixture
def folder(open_folder: Open, tmp_path: Path) -> Folder:
    return open_folder(tmp_path / "folder")


def test_written_content_is_read_back(folder, tmp_path):
    folder.write_bytes("deep/er/file.bin", b"\x00\xff")
    folder.write_text("text.txt", "größe\n")
    folder.write_json("value.json", {"a": [1, None, 0.1]})
    assert folder.read_bytes("deep/er/file.bin") == b"\x00\xff"
    assert folder.read_bytes("text.txt") == "größe\n".encode()
    assert folder.read_json("value.json") == {"a": [1, None, 0.1]}
    assert (tmp_path / "folder/deep/er/file.bin").read_bytes() == b"\x00\xff"


def test_opening_a_folder_creates_nothing(open_folder, tmp_path):
    assert open_folder(tmp_path / "folder").is_local
    assert not list(tmp_path.iterdir())


def test_names_are_sorted_and_include_files_in_subfolders(folder):
    for name in ("b.txt", "a/2.txt", "a/1.txt", "a/c/0.txt"):
        folder.write_text(name, name)
    assert list(folder.names()) == ["a/1.txt", "a/2.txt", "a/c/0.txt", "b.txt"]
    assert list(folder.names("a")) == ["a/1.txt", "a/2.txt", "a/c/0.txt"]
    assert list((folder / "a").names("c")) == ["c/0.txt"]
    assert list(folder.names("nothing")) == []


def test_exists_finds_files_and_folders(folder):
    folder.write_text("a/b.txt", "")
    assert [folder.exists(n) for n in ("a", "a/b.txt", "b.txt")] == [True, True, False]


def test_delete_removes_files_and_folders_and_ignores_missing_ones(folder):
    for name in ("a/1.txt", "a/b/2.txt", "c.txt"):
        folder.write_text(name, "")
    for name in ("a", "c.txt", "nothing"):
        folder.delete(name)
    assert list(folder.names()) == []
    assert not folder.exists("a")


def test_a_folder_is_uploaded_with_its_subfolders_and_files_are_downloaded(folder, tmp_path):
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
def test_a_name_outside_the_folder_is_refused(folder, name):
    for use in (folder.locate, folder.read_bytes, folder.exists, folder.delete, folder.__truediv__):
        with pytest.raises(ValueError, match="is not a path inside"):
            use(name)
    with pytest.raises(ValueError, match="is not a path inside"):
        folder.write_bytes(name, b"")


@pytest.mark.parametrize("name", NAMES)
def test_special_characters_in_folders_and_names_are_literal(open_folder, tmp_path, name):
    folder = open_folder(tmp_path / name)
    folder.write_text(f"{name}/{name}.txt", "here")
    assert (tmp_path / name / name / f"{name}.txt").read_text() == "here"
    inner = folder / name
    assert inner.path == folder.locate(name) == str(tmp_path / name / name)
    assert list(inner.names()) == [f"{name}.txt"]
    again = Folder(inner.uri)
    assert again.read_bytes(f"{name}.txt") == b"here"


def test_a_relative_path_is_resolved_when_the_folder_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder("runs/")
    monkeypatch.chdir("/")
    folder.write_text("a.txt", "a")
    assert folder.uri == str(tmp_path / "runs")
    assert (tmp_path / "runs/a.txt").exists()


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder("~/runs").path == str(tmp_path / "runs")


def test_a_folder_can_be_pickled(folder):
    folder.write_text("a.txt", "a")
    sent = pickle.loads(pickle.dumps(folder))
    assert (sent.uri, sent.read_bytes("a.txt")) == (folder.uri, b"a")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_partial_one(folder, tmp_path, monkeypatch):
    folder.write_text("a.txt", "old")

    def fail(source: str, target: str) -> None:
        assert Path(source).read_text() == "new"
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            folder.write_text("a.txt", "new")
    assert folder.read_bytes("a.txt") == b"old"
    assert os.listdir(tmp_path / "folder") == ["a.txt"]
    folder.write_text("a.txt", "new")
    assert folder.read_bytes("a.txt") == b"new"


def test_a_value_that_json_does_not_support_keeps_the_old_file(folder, tmp_path):
    folder.write_json("a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("a.json", {"loss": math.nan})
    assert folder.read_json("a.json") == 1
    assert os.listdir(tmp_path / "folder") == ["a.json"]


def test_the_error_for_a_missing_file_contains_its_path(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "folder/nothing.json")):
        folder.read_json("nothing.json")


def test_a_path_without_a_scheme_is_in_the_local_file_system(tmp_path):
    assert isinstance(Folder(tmp_path).filesystem, fs.LocalFileSystem)
    assert str(Folder(f"{tmp_path}/")) == str(tmp_path)


def test_a_folder_can_have_a_scheme_of_fsspec():
    folder = Folder(f"memory://{uuid.uuid4().hex}/folder/")
    for name in ("b.txt", "a/2 ö%20#.txt", "a/1.txt"):
        folder.write_text(name, name)
    assert not folder.is_local
    assert list(folder.names()) == ["a/1.txt", "a/2 ö%20#.txt", "b.txt"]
    assert list((folder / "a").names()) == ["1.txt", "2 ö%20#.txt"]
    assert [folder.exists(n) for n in ("a", "b.txt", "c")] == [True, True, False]
    assert pickle.loads(pickle.dumps(folder)).read_bytes("b.txt") == b"b.txt"
    with folder.filesystem.open_input_file(folder.locate("a/1.txt")) as file:
        assert file.read_at(3, 2) == b"1.t"
    folder.delete("a")
    assert list(folder.names()) == ["b.txt"]
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("a/1.txt")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server that serves a folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_files_on_a_web_server_are_read(served, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a b.txt").write_text("here")
    folder = Folder(f"{served}/in")
    assert folder.read_bytes("a b.txt") == b"here"
    assert [folder.exists(name) for name in ("a b.txt", "b.txt")] == [True, False]
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("b.txt")


@pytest.mark.parametrize("uri", ["nonsense://x/y", "hf-nothing://x"])
def test_the_error_for_an_unknown_scheme_contains_the_uri(uri):
    with pytest.raises(ValueError, match=f"could not open {uri}: Protocol not known"):
        Folder(uri)


def test_the_options_of_a_uri_stay_after_the_path():
    folder = Folder("s3://bucket/a/?endpoint_override=127.0.0.1:1&scheme=http&region=x")
    inner = folder / "b c"
    assert inner.uri == "s3://bucket/a/b%20c?endpoint_override=127.0.0.1:1&scheme=http&region=x"
    assert inner.path == folder.locate("b c") == "bucket/a/b c"


@pytest.mark.parametrize(
    ("location", "base", "pattern"),
    [
        ("/a/b/*.jpg", "/a/b", "*.jpg"),
        ("/*/x", "/", "*/x"),
        ("x*.jpg", ".", "x*.jpg"),
        ("a/{000..012}/b?.tar", "a", "{000..012}/b?.tar"),
        ("/a/plain.jpg", "/a/plain.jpg", None),
        ("file:///a/b/**/*.jpg", "file:///a/b", "**/*.jpg"),
        (
            "s3://b/x/{0..3}.tar?endpoint_override=127.0.0.1:1&region=x",
            "s3://b/x?endpoint_override=127.0.0.1:1&region=x",
            "{0..3}.tar",
        ),
    ],
)
def test_a_glob_is_split_into_a_folder_and_a_pattern(location, base, pattern):
    assert split_glob(location) == (base, pattern)


@pytest.mark.parametrize("options", ["", "?endpoint_override=http://127.0.0.1:1&region=x"])
def test_a_file_is_split_into_its_folder_and_its_name(tmp_path, monkeypatch, options):
    folder, name = split_file(f"s3://bucket/a%20b/c%20d.tar{options or '?region=x'}")
    assert (folder.path, name) == ("bucket/a b", "c d.tar")
    monkeypatch.chdir(tmp_path)
    for location in ("x.tar", f"{tmp_path}/x.tar", f"file://{tmp_path}/x.tar"):
        folder, name = split_file(location)
        assert (folder.path, name) == (str(tmp_path), "x.tar")
    assert split_file("/x.tar")[0].path == "/"


def test_an_existing_folder_whose_name_looks_like_a_glob_is_not_split(tmp_path):
    (tmp_path / "a[1]{x}").mkdir()
    assert split_glob(f"{tmp_path}/a[1]{{x}}") == (f"{tmp_path}/a[1]{{x}}", None)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}{0..1}.tar", ["a0.tar", "a1.tar", "b0.tar", "b1.tar"]),
    ],
)
def test_braces_are_expanded(pattern, names):
    assert expand_braces(pattern) == names


def test_braces_without_a_range_or_a_list_are_an_error():
    with pytest.raises(ValueError, match=r"a range such as \{000..012\} .*, not \{key\}"):
        expand_braces("{key}.jpg")


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [("*.jpg", "a.jpg", True), ("*.jpg", "a/b.jpg", False), ("**/*.jpg", "b.jpg", True),
     ("**/*.jpg", "a/b/c.jpg", True), ("a?.jpg", "ab.jpg", True), ("a?.jpg", "a/.jpg", False),
     ("[!a]*", "b", True), ("[!a]*", "ab", False), ("a.b", "axb", False)],
)  # fmt: skip
def test_globs_match_names(pattern, name, fits):
    assert bool(re.fullmatch(glob_regex(pattern), name)) is fits
