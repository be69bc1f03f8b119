from pathlib import Path

import pytest

from ray_jobs.storage.atomic_write import PARTIAL, atomic_write


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def write_half(path: Path, error: BaseException) -> None:
    path.write_text("half")
    raise error


def test_a_file_keeps_its_old_content_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as partial:
        write_half(partial, KeyboardInterrupt())
    assert names(tmp_path) == ["a.txt"]
    with atomic_write(target) as partial:
        partial.write_text("new")
        assert partial.name.endswith(PARTIAL)
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "a") as partial:
        partial.write_text("new")
    assert names(tmp_path) == ["a", "a/b"]


def test_a_folder_replaces_the_old_one_and_the_rest_of_a_killed_writer(tmp_path):
    target = tmp_path / "8"
    for name in ("old", "new"):
        left = target.with_name(f"8{PARTIAL}")
        left.mkdir()
        (left / "half").touch()
        with atomic_write(target, is_folder=True) as partial:
            assert partial == left
            (partial / name).touch()
        assert names(tmp_path) == ["8", f"8/{name}"]


def test_an_error_deletes_a_partial_folder_and_keeps_the_old_one(tmp_path):
    (tmp_path / "8" / "old").mkdir(parents=True)
    with pytest.raises(OSError, match="full"), atomic_write(tmp_path / "8", True) as partial:
        write_half(partial / "half", OSError("the disk is full"))
    assert names(tmp_path) == ["8", "8/old"]
