import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.storage.folder import Folder
from ray_jobs.train.telemetry import history_keys as keys
from ray_jobs.train.telemetry.history import Tracker
from tests.ray_jobs.epochs import history, record, spec_in, write_epochs


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points of all TensorBoard event files, with duplicates."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((folder / "tensorboard").glob("events.out*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                point = event.step, pytest.approx(float(make_ndarray(value.tensor)))
                found.setdefault(value.tag, []).append(point)
    return found


def test_both_files_have_all_epochs_and_keys(tmp_path):
    folder = Folder(tmp_path / "first")
    with Tracker(folder, spec_in(tmp_path, "none")) as tracker:
        epochs = (*history(2), record(2, **{keys.STEP_S: 1.5}))
        for count in range(1, 4):
            tracker.write(epochs[:count])
    lines = (tmp_path / "first/history.jsonl").read_text().splitlines()
    assert tuple(json.loads(line) for line in lines) == epochs
    table = pq.read_table(tmp_path / "first/history.parquet")
    assert table.schema.field(keys.STEP).type == pa.int64()
    assert table.schema.field(keys.VAL_ROC_AUC).type == pa.float64()
    assert table.to_pylist() == [{keys.STEP_S: None, **epoch} for epoch in epochs]
    assert not (tmp_path / "mlflow.db").exists()


def test_a_resumed_run_overwrites_later_epochs_of_an_earlier_attempt(tmp_path):
    folder, spec = Folder(tmp_path / "first"), spec_in(tmp_path, "none")
    with Tracker(folder, spec) as tracker:
        write_epochs(tracker, 0, 4)
    trace = tmp_path / "first/tensorboard/plugins/profile/now/host.xplane.pb"
    trace.parent.mkdir(parents=True)
    trace.write_bytes(b"x")
    with Tracker(folder, spec) as tracker:
        write_epochs(tracker, 2, 3, attempt=7)
    expected = (*history(2), record(2, attempt=7))
    lines = (tmp_path / "first/history.jsonl").read_text().splitlines()
    assert tuple(json.loads(line) for line in lines) == expected
    assert pq.read_table(tmp_path / "first/history.parquet").to_pylist() == list(expected)
    assert scalars(tmp_path / "first") == {
        keys.TRAIN_LOSS: [(e[keys.EPOCH], e[keys.TRAIN_LOSS]) for e in expected]
    }
    assert trace.exists()


def test_an_attempt_without_new_epochs_changes_nothing(tmp_path):
    folder, spec = Folder(tmp_path / "first"), spec_in(tmp_path, "none")
    with Tracker(folder, spec) as tracker:
        write_epochs(tracker, 0, 2)
        written = (tmp_path / "first/history.jsonl").stat().st_mtime_ns
        tracker.write(history(2))
    with Tracker(folder, spec):
        pass
    assert len(scalars(tmp_path / "first")[keys.TRAIN_LOSS]) == 2
    assert (tmp_path / "first/history.jsonl").stat().st_mtime_ns == written


def test_the_next_epoch_writes_the_records_of_an_outage(tmp_path, monkeypatch):
    folder, warnings = Folder(tmp_path / "first"), []
    with Tracker(folder, spec_in(tmp_path, "none"), warnings.append) as tracker:
        write_epochs(tracker, 0, 1)
        with monkeypatch.context() as full:

            def no_space(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            full.setattr(Folder, "write_text", no_space)
            write_epochs(tracker, 1, 3)
        write_epochs(tracker, 3, 4)
    assert warnings == ["could not write the history: [Errno 28] No space left on device"] * 2
    assert [step for step, _ in scalars(tmp_path / "first")[keys.TRAIN_LOSS]] == [0, 1, 2, 3]
    assert len((tmp_path / "first/history.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(("failing", "num_copies"), [("upload", 3), ("names", 1)])
def test_an_outage_leaves_no_temporary_files(tmp_path, monkeypatch, failing, num_copies):
    copies = []
    folder, made = Folder(f"memory://tracking/{failing}"), tempfile.mkdtemp

    def mkdtemp(*args: Any, **options: Any) -> str:
        copies.append(Path(made(*args, **options)))
        return str(copies[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with Tracker(folder, spec_in(tmp_path, "none"), lambda text: None) as tracker:
        with monkeypatch.context() as outage:

            def no_answer(*_: Any) -> None:
                raise OSError("the network is down")

            outage.setattr(Folder, failing, no_answer)
            write_epochs(tracker, 0, 2)
        write_epochs(tracker, 2, 3)
    assert len(copies) == num_copies
    assert not any(copy.exists() for copy in copies)


def test_the_log_is_uploaded_to_a_remote_run_folder_after_each_epoch(tmp_path):
    folder = Folder("memory://tracking/first")
    with Tracker(folder, spec_in(tmp_path, "none")) as tracker:
        for count in (1, 2):
            write_epochs(tracker, count - 1, count)
            copy = tmp_path / str(count)
            for name in folder.names("tensorboard"):
                folder.download(name, copy / name)
            assert len(scalars(copy)[keys.TRAIN_LOSS]) == count
