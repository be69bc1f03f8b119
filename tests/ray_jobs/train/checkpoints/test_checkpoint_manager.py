import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint import BestCheckpoint, Checkpoint, LoopState
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager


def saved(step: int, epoch: int = 0, best: tuple[int, ...] = ()) -> Checkpoint:
    """A checkpoint whose arrays say which step and epoch they are of."""
    state = LoopState(step=step, epoch=epoch, best_epoch=best[0] if best else None)
    arrays = {"00000 a/kernel": np.full(50, step, np.float32)}
    models = {
        e: BestCheckpoint({"00000 a/kernel": np.full(50, e, np.float32)}, *_validation(e))
        for e in best
    }
    return Checkpoint(state, arrays, arrays, {}, models)


def _validation(epoch: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((3, 2), epoch, np.float32), np.ones(3, np.float32)


@pytest.fixture(params=["local", "remote"])
def run(request, tmp_path) -> Folder:
    """A run folder on a disk, and one that only offers what an object store does."""
    folder = Folder(tmp_path)
    if request.param == "remote":
        folder.__class__ = type("Remote", (Folder,), {"is_local": False})
    return folder


def store_of(run: Folder, keep: int = 2) -> tuple[CheckpointManager, list[str]]:
    warnings: list[str] = []
    return CheckpointManager(run, keep, warnings.append), warnings


def names(run: Folder) -> set[str]:
    return {name.partition("/")[2].rpartition("/")[0] for name in run.names("checkpoints")}


def test_the_newest_checkpoint_is_read_back_with_its_best_epochs(run):
    store, _ = store_of(run)
    for now in (saved(4), saved(8, 1, (0,)), saved(12, 1, (0,))):
        store.save(now)
    store.close()
    found = CheckpointManager(run).newest()
    assert found is not None
    assert (found.state.step, found.state.epoch) == (12, 1)
    assert set(found.best) == {0}
    np.testing.assert_array_equal(found.model["00000 a/kernel"], np.full(50, 12))
    np.testing.assert_array_equal(found.best[0].head_logits_NM, np.zeros((3, 2)))


def test_what_is_saved_is_given_away_once_and_not_while_it_is_written(tmp_path, monkeypatch):
    store, _ = store_of(Folder(tmp_path))
    assert store.spare() is None
    writes = threading.Event()
    write = CheckpointManager._save

    def late(self: CheckpointManager, given: Checkpoint) -> None:
        writes.wait(30)
        write(self, given)

    monkeypatch.setattr(CheckpointManager, "_save", late)
    given = saved(4, 1, (0,))
    store.save(given)
    assert store.spare() is None
    writes.set()
    store.wait()
    spare = store.spare()
    assert spare is not None
    assert (spare.model, spare.optimizer) == (given.model, given.optimizer)
    assert spare.best == {}
    assert store.spare() is None
    store.close()


def test_a_run_without_a_checkpoint_has_none(run):
    assert CheckpointManager(run).newest() is None


def test_the_latest_few_are_kept_and_the_best_epochs_that_they_need(run):
    store, _ = store_of(run, keep=2)
    for now in (saved(4), saved(8, 1, (0,)), saved(16, 2, (1, 0)), saved(24, 3, (1, 2))):
        store.save(now)
    store.wait()
    assert names(run) == {"steps/00000016", "steps/00000024", "best/00001", "best/00002"}
    # The one before still refers to the best epoch of its time.
    store.save(saved(32, 4, (3,)))
    store.wait()
    assert names(run) == {"steps/00000024", "steps/00000032", "best/00001", "best/00003"}
    store.save(saved(36, 4, (3,)))
    store.close()
    assert names(run) == {"steps/00000032", "steps/00000036", "best/00003"}


@pytest.mark.parametrize("file", ["state.json", "model.npz", "optimizer.npz"])
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(run, file):
    store, _ = store_of(run)
    store.save(saved(4))
    store.save(saved(8))
    store.close()
    path = f"checkpoints/steps/00000008/{file}"
    run.write_bytes(path, run.read_bytes(path)[:30])
    again, warnings = store_of(run)
    found = again.newest()
    assert found is not None
    assert found.state.step == 4
    assert again.written == 4
    assert "is not whole" in warnings[0]
    # And written anew when the run comes there again.
    again.save(saved(8))
    again.close()
    newest = CheckpointManager(run).newest()
    assert newest is not None
    assert newest.state.step == 8


def test_a_checkpoint_whose_best_epoch_is_torn_is_passed_over_too(run):
    store, _ = store_of(run)
    store.save(saved(4))
    store.save(saved(8, 1, (0,)))
    store.close()
    path = "checkpoints/best/00000/model.npz"
    run.write_bytes(path, run.read_bytes(path)[:30])
    again, _ = store_of(run)
    found = again.newest()
    assert found is not None
    assert found.state.step == 4
    again.save(saved(8, 1, (0,)))
    again.close()
    newest = CheckpointManager(run).newest()
    assert newest is not None
    assert set(newest.best) == {0}


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_cleared_away(tmp_path):
    partial = tmp_path / "checkpoints/steps/00000008.partial"
    partial.mkdir(parents=True)
    (partial / "model.npz").write_bytes(b"half")
    store, _ = store_of(Folder(tmp_path))
    assert store.newest() is None
    store.save(saved(4))
    store.close()
    assert not partial.exists()


def test_in_an_object_store_a_checkpoint_without_its_state_is_none(tmp_path):
    folder = tmp_path / "checkpoints/steps/00000008"
    folder.mkdir(parents=True)
    (folder / "model.npz").write_bytes(b"half")
    assert CheckpointManager(Folder(tmp_path)).newest() is None


def test_a_full_disk_costs_a_warning_and_the_next_checkpoint_is_whole(run, monkeypatch):
    store, warnings = store_of(run)
    store.save(saved(4))
    store.wait()
    real, full = np.savez, threading.Event()
    full.set()

    def savez(file: Any, **arrays: Any) -> None:
        if full.is_set():
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(file, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    store.save(saved(8, 1, (0,)))
    store.wait()
    assert "checkpoint after step 8 could not be written: [Errno 28] No space left" in warnings[0]
    assert names(run) == {"steps/00000004"}
    assert store.written == 4
    full.clear()
    # The best epoch's model, which was lost with the checkpoint before, comes along.
    store.save(saved(12, 1, (0,)))
    store.close()
    found = CheckpointManager(run).newest()
    assert found is not None
    assert (found.state.step, set(found.best)) == (12, {0})


def test_training_goes_on_while_a_checkpoint_is_written(run, monkeypatch):
    store, _ = store_of(run)
    writing, go_on, real = threading.Event(), threading.Event(), np.savez

    def savez(file: Any, **arrays: Any) -> None:
        writing.set()
        assert go_on.wait(30)
        real(file, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    store.save(saved(4))
    assert writing.wait(30)
    assert store.written == 0
    go_on.set()
    store.close()
    assert store.written == 4


def test_a_folder_gets_its_name_when_all_of_it_is_written(tmp_path, monkeypatch):
    store, _ = store_of(Folder(tmp_path))
    seen: list[list[str]] = []
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        seen.append(sorted(path.name for path in Path(source).iterdir()))
        assert not Path(target).exists()
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    store.save(saved(4))
    store.close()
    assert seen == [["local.npz", "model.npz", "optimizer.npz", "state.json"]]


def test_what_cannot_be_read_at_the_moment_is_no_damage(tmp_path, monkeypatch):
    store, _ = store_of(Folder(tmp_path))
    store.save(saved(4))
    store.close()

    def load(*arguments: Any, **options: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(np, "load", load)
    with pytest.raises(OSError, match="Input/output error"):
        CheckpointManager(Folder(tmp_path)).newest()


def test_a_best_epoch_that_was_pruned_or_is_torn_is_written_again(tmp_path):
    run = Folder(tmp_path)
    store, _ = store_of(run, keep=1)
    store.save(saved(8, 1, (0,)))
    store.save(saved(16, 2, (1,)))
    store.save(saved(24, 3, (0,)))
    store.close()
    assert names(run) == {"steps/00000024", "best/00000"}
    newest = CheckpointManager(run).newest()
    assert newest is not None
    assert set(newest.best) == {0}


def test_a_folder_without_its_state_takes_no_place_and_is_cleared_away(tmp_path):
    run = Folder(tmp_path)
    store, warnings = store_of(run, keep=2)
    store.save(saved(4))
    store.wait()
    half = tmp_path / "checkpoints/steps/00000006"
    half.mkdir()
    (half / "model.npz").write_bytes(b"half")
    store.save(saved(8, 1, (0,)))
    store.close()
    assert names(run) == {"steps/00000004", "steps/00000008", "best/00000"}
    assert warnings == []


def test_whoever_does_not_write_needs_no_best_epoch(run):
    store, _ = store_of(run)
    store.save(saved(8, 1, (0,)))
    store.close()
    assert CheckpointManager(run).load(8, with_best=False).best == {}
