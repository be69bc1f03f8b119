import os
import subprocess
import sys

import pytest
from pyarrow import fs

from ray_jobs.storage.folder import Folder
from ray_jobs.tune.trials.atomic_filesystem import filesystem_of


def test_a_file_is_replaced_only_when_the_new_one_is_complete(tmp_path):
    files = filesystem_of(Folder(tmp_path))
    path = tmp_path / "new/state.json"
    with files.open_output_stream(str(path)) as stream:
        stream.write(b"old")
    stream = files.open_output_stream(str(path))
    stream.write(b"new")
    stream.flush()
    assert path.read_bytes() == b"old"
    stream.close()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path / "new") == ["state.json"]


@pytest.mark.slow
def test_a_killed_writer_leaves_the_old_file(tmp_path):
    (tmp_path / "state.json").write_text("old")
    code = f"""
import time
from ray_jobs.storage.folder import Folder
from ray_jobs.tune.trials.atomic_filesystem import filesystem_of
stream = filesystem_of(Folder({str(tmp_path)!r})).open_output_stream({f"{tmp_path}/state.json"!r})
stream.write(b"half")
stream.flush()
print("written", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.kill()
    assert (tmp_path / "state.json").read_text() == "old"


def test_folders_can_be_copied_as_tune_copies_them(tmp_path):
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "below/one").write_bytes(b"x" * 1_000_000)
    (source / "two").write_bytes(b"")
    files = filesystem_of(Folder(tmp_path))
    fs.copy_files(str(source), str(tmp_path / "copy"), destination_filesystem=files)
    assert (tmp_path / "copy/below/one").read_bytes() == b"x" * 1_000_000
    assert (tmp_path / "copy/two").read_bytes() == b""


def test_object_stores_use_tunes_default_file_system():
    assert filesystem_of(Folder("mock:///bucket")) is None
