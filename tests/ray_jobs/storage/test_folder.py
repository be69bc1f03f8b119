import math
import os
import pickle
import re
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch
from urllib.parse import quote

import pytest

from ray_jobs.storage.folder import Folder, expand_braces, glob_regex, split_file, split_glob
from tests.ray_jobs.storage.s3 import s3_folder

NAMES = ("plain", "with space", "50%", "a%20b", "a#b", "a+b", "a?b", "[x]", "größe", "a:b", "it's")


@pytest.fixture(scope="module")
def s3() -> Iterator[Folder]:
    with s3_folder() as folder:
        yield folder


@pytest.fixture(params=["path", "uri", "fsspec", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder on a local disk, in fsspec's memory or on an S3 server."""
    if request.param == "s3":
        return request.getfixturevalue("s3")
    local = str(tmp_path / "folder")
    memory = f"memory://{uuid.uuid4().hex}/folder/"
    return Folder({"path": f"{local}/", "uri": f"file://{local}", "fsspec": memory}[request.param])


def test_every_folder_behaves_alike(folder, tmp_path):
    assert folder.is_local == ("://" not in folder.uri or folder.uri.startswith("file://"))
    # Opening a folder creates nothing.
    assert not list(tmp_path.iterdir())
    folder.write_bytes("a/deep/file.bin", b"\x00\xff")
    folder.write_text("a/2 ö%20.txt", "größe\n")
    folder.write_json("b.json", {"a": [1, None, 0.1]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("b.json", {"loss": math.nan})
    assert folder.read_bytes("a/2 ö%20.txt") == "größe\n".encode()
    assert folder.read_json("b.json") == {"a": [1, None, 0.1]}
    with folder.filesystem.open_input_file(folder.locate("b.json")) as file:
        assert file.read_at(3, 4) == b'"a"'
    assert list(folder.names()) == ["a/2 ö%20.txt", "a/deep/file.bin", "b.json"]
    assert list(folder.names("a")) == ["a/2 ö%20.txt", "a/deep/file.bin"]
    assert list((folder / "a").names("deep")) == ["deep/file.bin"]
    assert list(folder.names("nothing")) == []
    assert [folder.exists(n) for n in ("a", "b.json", "c")] == [True, True, False]
    sent = pickle.loads(pickle.dumps(folder))
    assert (sent.uri, sent.read_bytes("a/deep/file.bin")) == (folder.uri, b"\x00\xff")

    (tmp_path / "model/variables").mkdir(parents=True)
    (tmp_path / "model/variables/c.bin").write_bytes(b"c" * 1000)
    folder.upload(tmp_path / "model", "best/model")
    folder.upload(tmp_path / "model/variables/c.bin", "c.bin")
    target = tmp_path / "new/place/c.bin"
    assert folder.download("best/model/variables/c.bin", target) == target
    assert target.read_bytes() == folder.read_bytes("c.bin") == b"c" * 1000
    for name in ("a", "best", "c.bin", "nothing"):
        folder.delete(name)
    assert list(folder.names()) == ["b.json"]
    assert not folder.exists("a")
    with pytest.raises(FileNotFoundError, match=r"file\.bin"):
        folder.read_bytes("a/deep/file.bin")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a/..", "", ".", "//x"])
def test_a_name_outside_the_folder_is_refused(tmp_path, name):
    folder = Folder(tmp_path)
    for use in (folder.locate, folder.read_bytes, folder.exists, folder.delete, folder.__truediv__):
        with pytest.raises(ValueError, match="is not a path inside"):
            use(name)
    with pytest.raises(ValueError, match="is not a path inside"):
        folder.write_bytes(name, b"")


@pytest.mark.parametrize("name", NAMES)
def test_special_characters_in_folders_and_names_are_literal(tmp_path, name):
    for location in (str(tmp_path / name), f"file://{quote(str(tmp_path / name))}"):
        folder = Folder(location)
        folder.write_text(f"{name}/{name}.txt", location)
        assert (tmp_path / name / name / f"{name}.txt").read_text() == location
        inner = folder / name
        assert inner.path == folder.locate(name) == str(tmp_path / name / name)
        assert list(inner.names()) == [f"{name}.txt"]
        assert Folder(inner.uri).read_bytes(f"{name}.txt") == location.encode()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_partial_one(tmp_path):
    folder = Folder(tmp_path)
    folder.write_text("a.txt", "old")
    with (
        patch("os.replace", side_effect=OSError("no space left")),
        pytest.raises(OSError, match="no space left"),
    ):
        folder.write_text("a.txt", "new")
    assert folder.read_bytes("a.txt") == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_files_on_a_web_server_are_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a b.txt").write_text("here")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folder = Folder(f"http://127.0.0.1:{server.server_address[1]}/in")
        assert folder.read_bytes("a b.txt") == b"here"
        assert [folder.exists(name) for name in ("a b.txt", "b.txt")] == [True, False]
        with pytest.raises(FileNotFoundError):
            folder.read_bytes("b.txt")
        server.shutdown()


def test_a_relative_path_is_resolved_when_the_folder_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = Folder("runs/")
    monkeypatch.chdir("/")
    assert folder.uri == Folder("~/runs").uri == str(tmp_path / "runs")
    folder.write_text("a.txt", "a")
    assert (tmp_path / "runs/a.txt").exists()


def test_the_error_for_an_unknown_scheme_contains_the_uri():
    with pytest.raises(ValueError, match="could not open nonsense://x/y: Protocol not known"):
        Folder("nonsense://x/y")


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


def test_ranges_and_lists_in_braces_are_expanded():
    assert expand_braces("a.tar") == ["a.tar"]
    assert expand_braces("{08..11}.tar") == ["08.tar", "09.tar", "10.tar", "11.tar"]
    assert expand_braces("{9..11}") == ["9", "10", "11"]
    assert expand_braces("{2..0}") == ["2", "1", "0"]
    assert expand_braces("{a,b}{0..1}.tar") == ["a0.tar", "a1.tar", "b0.tar", "b1.tar"]
    with pytest.raises(ValueError, match=r"a range such as \{000..012\} .*, not \{key\}"):
        expand_braces("{key}.jpg")


@pytest.mark.parametrize(
    ("pattern", "fitting", "other"),
    [
        ("*.jpg", ["a.jpg"], ["a/b.jpg", "a.png"]),
        ("**/*.jpg", ["b.jpg", "a/b/c.jpg"], ["a/b.png"]),
        ("a?.jpg", ["ab.jpg"], ["a/.jpg"]),
        ("[!a]*", ["b"], ["ab"]),
        ("a.b", ["a.b"], ["axb"]),
    ],
)
def test_globs_match_names(pattern, fitting, other):
    matches = re.compile(glob_regex(pattern)).fullmatch
    assert [name for name in fitting + other if matches(name)] == fitting
