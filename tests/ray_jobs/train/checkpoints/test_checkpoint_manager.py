import threading
from typing import Any

import numpy as np
import pytest

from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint import BestCheckpoint, Checkpoint, LoopState
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager


def make_checkpoint(step: int, epoch: int = 0, best: tuple[int, ...] = ()) -> Checkpoint:
    """A checkpoint whose arrays contain its step and epochs."""
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
    """A run folder on a disk, and one with the operations of an object store only."""
    folder = Folder(tmp_path)
    if request.param == "remote":
        folder.__class__ = type("Remote", (Folder,), {"is_local": False})
    return folder


def manager_of(run: Folder, keep: int = 2) -> tuple[CheckpointManager, list[str]]:
    warnings: list[str] = []
    return CheckpointManager(run, keep, warnings.append), warnings


def newest_of(run: Folder) -> Checkpoint:
    found = CheckpointManager(run).newest()
    assert found is not None
    return found


def names(run: Folder) -> set[str]:
    return {name.partition("/")[2].rpartition("/")[0] for name in run.names("checkpoints")}


def test_the_newest_checkpoint_is_read_back_with_its_best_epochs(run):
    manager, _ = manager_of(run)
    for checkpoint in (
        make_checkpoint(4),
        make_checkpoint(8, 1, (0,)),
        make_checkpoint(12, 1, (0,)),
    ):
        manager.save(checkpoint)
    manager.close()
    found = newest_of(run)
    assert (found.state.step, found.state.epoch) == (12, 1)
    assert set(found.best) == {0}
    np.testing.assert_array_equal(found.model["00000 a/kernel"], np.full(50, 12))
    np.testing.assert_array_equal(found.best[0].head_logits_NM, np.zeros((3, 2)))
    assert CheckpointManager(run).load(12, with_best=False).best == {}


def test_the_latest_checkpoints_and_their_best_epochs_are_kept(run):
    manager, _ = manager_of(run, keep=2)
    for checkpoint in (
        make_checkpoint(4),
        make_checkpoint(8, 1, (0,)),
        make_checkpoint(16, 2, (1, 0)),
        make_checkpoint(24, 3, (1, 2)),
    ):
        manager.save(checkpoint)
    manager.wait()
    assert names(run) == {"steps/00000016", "steps/00000024", "best/00001", "best/00002"}
    # The previous checkpoint still refers to an earlier best epoch.
    manager.save(make_checkpoint(32, 4, (3,)))
    manager.wait()
    assert names(run) == {"steps/00000024", "steps/00000032", "best/00001", "best/00003"}
    manager.save(make_checkpoint(36, 4, (3,)))
    manager.close()
    assert names(run) == {"steps/00000032", "steps/00000036", "best/00003"}


@pytest.mark.parametrize("file", ["steps/00000008/state.json", "best/00000/model.npz"])
def test_a_damaged_checkpoint_is_skipped_and_written_again(run, file):
    manager, _ = manager_of(run)
    manager.save(make_checkpoint(4))
    manager.save(make_checkpoint(8, 1, (0,)))
    manager.close()
    path = f"checkpoints/{file}"
    run.write_bytes(path, run.read_bytes(path)[:30])
    reopened, warnings = manager_of(run)
    found = reopened.newest()
    assert found is not None
    assert found.state.step == reopened.written == 4
    assert "is damaged" in warnings[0]
    reopened.save(make_checkpoint(8, 1, (0,)))
    reopened.close()
    found = newest_of(run)
    assert (found.state.step, set(found.best)) == (8, {0})


def test_the_remains_of_a_killed_writer_are_ignored_and_deleted(tmp_path):
    def write_remains() -> None:
        for name in ("00000006", "00000008.partial"):
            (tmp_path / f"checkpoints/steps/{name}").mkdir(parents=True)
            (tmp_path / f"checkpoints/steps/{name}/model.npz").write_bytes(b"half")

    write_remains()
    manager, warnings = manager_of(Folder(tmp_path), keep=2)
    assert manager.newest() is None
    manager.save(make_checkpoint(4))
    manager.wait()
    assert names(Folder(tmp_path)) == {"steps/00000004"}
    write_remains()
    manager.save(make_checkpoint(8, 1, (0,)))
    manager.close()
    # A folder without a state does not count as one of the two that are kept.
    assert names(Folder(tmp_path)) == {"steps/00000004", "steps/00000008", "best/00000"}
    assert warnings == []


def test_a_full_disk_causes_a_warning_and_the_next_checkpoint_is_complete(run, monkeypatch):
    manager, warnings = manager_of(run)
    manager.save(make_checkpoint(4))
    manager.wait()
    real, full = np.savez, threading.Event()
    full.set()

    def savez(file: Any, **arrays: Any) -> None:
        if full.is_set():
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(file, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    manager.save(make_checkpoint(8, 1, (0,)))
    manager.wait()
    assert "checkpoint after step 8 could not be written: [Errno 28] No space left" in warnings[0]
    assert names(run) == {"steps/00000004"}
    assert manager.written == 4
    full.clear()
    # Includes the best epoch's model, which could not be written before.
    manager.save(make_checkpoint(12, 1, (0,)))
    manager.close()
    found = newest_of(run)
    assert (found.state.step, set(found.best)) == (12, {0})


def test_a_checkpoint_is_written_in_the_background_and_its_memory_reused_once(run, monkeypatch):
    manager, _ = manager_of(run)
    assert manager.spare() is None
    writing, proceed, real = threading.Event(), threading.Event(), np.savez

    def savez(file: Any, **arrays: Any) -> None:
        writing.set()
        assert proceed.wait(30)
        real(file, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    given = make_checkpoint(4, 1, (0,))
    manager.save(given)
    assert writing.wait(30)
    assert manager.written == 0
    assert manager.spare() is None
    proceed.set()
    manager.wait()
    assert manager.written == 4
    spare = manager.spare()
    assert spare is not None
    assert (spare.model, spare.optimizer, spare.best) == (given.model, given.optimizer, {})
    assert manager.spare() is None
    manager.close()


def test_a_transient_read_error_is_not_damage(tmp_path, monkeypatch):
    manager, _ = manager_of(Folder(tmp_path))
    manager.save(make_checkpoint(4))
    manager.close()

    def load(*arguments: Any, **options: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(np, "load", load)
    with pytest.raises(OSError, match="Input/output error"):
        CheckpointManager(Folder(tmp_path)).newest()


def test_a_pruned_best_epoch_is_written_again(tmp_path):
    run = Folder(tmp_path)
    manager, _ = manager_of(run, keep=1)
    manager.save(make_checkpoint(8, 1, (0,)))
    manager.save(make_checkpoint(16, 2, (1,)))
    manager.save(make_checkpoint(24, 3, (0,)))
    manager.close()
    assert names(run) == {"steps/00000024", "best/00000"}
    assert set(newest_of(run).best) == {0}
