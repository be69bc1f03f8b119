from pathlib import Path

import pytest

from ray_jobs.storage.atomic_write import PARTIAL, atomic_write


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def interrupt_a_write(path: Path) -> None:
    path.touch()
    raise KeyboardInterrupt


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


def test_an_interrupt_deletes_a_partial_folder_and_keeps_the_old_one(tmp_path):
    (tmp_path / "8" / "old").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "8", True) as partial:
        interrupt_a_write(partial / "half")
    assert names(tmp_path) == ["8", "8/old"]
