import json
import re
from pathlib import Path

import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.tiny import write_prepared


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    write_prepared(tmp_path, {"train": 6, "validation": 4, "test": 4})
    return tmp_path


def change(folder: Path, **values: object) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(tree | values))


def test_a_manifest_is_read_as_it_was_written(prepared):
    manifest = read_manifest(Folder(prepared))
    before = (prepared / "manifest.json").read_bytes()
    manifest.write(Folder(prepared))
    assert (prepared / "manifest.json").read_bytes() == before


def test_a_folder_without_a_manifest_raises_an_error_with_a_remedy(tmp_path):
    message = rf"{re.escape(str(tmp_path))} has no manifest.json; run `python -m ray_jobs.prepare`"
    with pytest.raises(JobError, match=message):
        read_manifest(Folder(tmp_path))


def test_a_manifest_of_another_version_raises_an_error(prepared):
    change(prepared, schema_version=99)
    with pytest.raises(
        JobError, match="has schema version 99, but this version of the program reads 2; prep"
    ):
        read_manifest(Folder(prepared))


def test_a_manifest_with_an_invalid_entry_raises_an_error(prepared):
    change(prepared, splits={"training": {}})
    with pytest.raises(JobError, match=r"(?s)is damaged.*training"):
        read_manifest(Folder(prepared))


@pytest.mark.parametrize("text", ['{"schema_version": 1', "", "[1]", "\x00"])
def test_the_error_for_a_damaged_manifest_names_its_file(prepared, text):
    (prepared / "manifest.json").write_text(text)
    message = rf"(?s){re.escape(str(prepared))}/manifest.json is damaged: .*; prepare the data"
    with pytest.raises(JobError, match=message):
        read_manifest(Folder(prepared))
