import json
import re

import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.tiny import write_prepared


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema_version": 99}, "has schema version 99, but this version of the program reads 3"),
        ({"splits": {"training": {}}}, "is damaged: .*training.*"),
        *((text, "is damaged: .*") for text in ('{"schema_version": 1', "", "[1]", "\x00")),
    ],
)
def test_an_error_names_the_manifest_and_the_remedy(tmp_path, content, message):
    write_prepared(tmp_path, {"train": 6, "validation": 4, "test": 4})
    path = tmp_path / "manifest.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    with pytest.raises(JobError, match=rf"(?s){re.escape(str(path))} {message}; prepare the data"):
        read_manifest(Folder(tmp_path))
