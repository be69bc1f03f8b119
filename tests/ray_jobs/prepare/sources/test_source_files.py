import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.sources.source_files import find_files


def test_files_are_listed_in_order_without_hidden_files(tmp_path):
    for name in ("b.x", "a/c.x", ".hidden.x", "_log.x", "a.y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")

    def find(location: str) -> list[str]:
        return find_files(location, lambda name: name.endswith(".x"), "x files")[1]

    assert find(str(tmp_path)) == ["a/c.x", "b.x"]
    assert find(f"{tmp_path}/a.y") == ["a.y"]
    assert find(f"{tmp_path}/{{b,a/c}}.x") == ["b.x", "a/c.x"]
    assert find(f"{tmp_path}/**/[bc].x") == ["a/c.x", "b.x"]
    for location, message in (
        (f"{tmp_path}/none", "there is no such file or folder"),
        (f"{tmp_path}/*.z", "there are no x files"),
        (f"{tmp_path}/{{b}}.x", "braces must contain a range such as"),
        ("nonsense://x", "could not open nonsense://x"),
    ):
        with pytest.raises(JobError, match=message):
            find(location)
