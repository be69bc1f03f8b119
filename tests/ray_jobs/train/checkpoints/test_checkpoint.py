import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from ray_jobs.train.checkpoints.checkpoint import (
    BestCheckpoint,
    Checkpoint,
    DamagedCheckpointError,
    LoopState,
    assign,
    read_best,
    read_checkpoint,
    write_best,
    write_checkpoint,
)
from tests.ray_jobs.arrays import arrays_of, identical

FILES = ("model.npz", "optimizer.npz", "local.npz", "state.json")
BEST_FILES = ("model.npz", "validation.npz")

STATE = LoopState(
    epoch=2,
    step=13,
    history=(
        {"epoch": 0, "val/log_loss": 0.1 + 0.2, "val/roc_auc": None},
        {"epoch": 1, "val/log_loss": 5e-324, "val/roc_auc": 1 / 3},
    ),
    best_epoch=1,
    plateau_epochs=1,
)


def make_model(units: int = 3) -> Any:
    layers = [keras.layers.Dense(units), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    return keras.Sequential([keras.layers.Input((4,)), *layers])


def make_checkpoint() -> Checkpoint:
    rng = np.random.default_rng(0)
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    model = {"00000 a/kernel": rng.normal(size=(3, 2)).astype(np.float32), "00001 a/odd": odd}
    optimizer = {"00000 adam/iterations": np.array(7, np.int64), "00001 m": np.empty((0, 3))}
    local = {"loss_and_statistics": rng.normal(size=(2, 7)).astype(np.float32)}
    return Checkpoint(STATE, model, optimizer, local)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, make_checkpoint())
    return tmp_path


def test_a_checkpoint_is_read_back_bit_by_bit(written):
    read, before = read_checkpoint(written), make_checkpoint()
    assert read.state == STATE
    assert sorted(os.listdir(written)) == sorted(FILES)
    for part in ("model", "optimizer", "local"):
        assert identical(getattr(before, part), getattr(read, part))


def test_a_best_epoch_is_read_back_bit_by_bit(tmp_path):
    rng = np.random.default_rng(0)
    best = BestCheckpoint(make_checkpoint().model, rng.normal(size=(5, 3)), np.ones(5, np.float32))
    write_best(tmp_path, best)
    read = read_best(tmp_path)
    assert identical(read.model, best.model)
    assert read.head_logits_NM.tobytes() == best.head_logits_NM.tobytes()
    assert read.label_N.tobytes() == best.label_N.tobytes()
    for name in BEST_FILES:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DamagedCheckpointError, match=r"the best epoch in .* is damaged: "):
            read_best(tmp_path)
        (tmp_path / name).write_bytes(whole)


def test_the_error_for_another_model_names_the_difference_and_nothing_is_assigned():
    model = make_model()
    before = arrays_of(model.variables)
    message = (
        r"the saved model weights do not fit the model \(dense/kernel \(4, 3\) was saved as "
        r"dense/kernel \(4, 5\)\); .* choose another --run.name"
    )
    with pytest.raises(ValueError, match=message):
        assign(model.variables, arrays_of(make_model(units=5).variables), "model weights")
    fewer = dict(list(before.items())[:-1])
    with pytest.raises(ValueError, match=r"best weights do not fit .*8 variables, 7 saved"):
        assign(model.variables, fewer, "best weights")
    assert identical(arrays_of(model.variables), before)


@pytest.mark.parametrize("path", ["batch_normalization_3/beta", "other/gamma"])
def test_a_variable_of_another_name_or_layer_is_not_assigned(path):
    """A Keras upgrade that changes the order or the names must not mix up equal shapes."""
    model = make_model()
    stored = arrays_of(model.variables)
    index, name = next((i, name) for i, name in enumerate(stored) if name.endswith("/gamma"))
    renamed = {f"{index:05d} sequential/{path}" if n == name else n: v for n, v in stored.items()}
    with pytest.raises(ValueError, match=rf"gamma \(3,\) was saved as {path[:5]}"):
        assign(model.variables, renamed, "model weights")
    numbered = {n.replace("/gamma", "_17/gamma"): v for n, v in stored.items()}
    assign(model.variables, numbered, "model weights")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 0.99])
def test_a_checkpoint_with_a_missing_or_truncated_file_is_damaged(written, name, share):
    content = (written / name).read_bytes()
    (written / name).unlink()
    if share is not None:
        (written / name).write_bytes(content[: int(len(content) * share)])
    named = name if share is None else ""
    with pytest.raises(
        DamagedCheckpointError, match=rf"the checkpoint in {written} is damaged: .*{named}"
    ):
        read_checkpoint(written)


def test_a_flipped_bit_in_an_array_is_detected(written):
    content = bytearray((written / "model.npz").read_bytes())
    with zipfile.ZipFile(written / "model.npz") as file:
        offset = file.infolist()[1].header_offset
    content[offset - 1] ^= 1  # the last byte of the previous array
    (written / "model.npz").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: .*CRC"):
        read_checkpoint(written)


@pytest.mark.parametrize(
    "state", ["{}x", '{"epoch": -1}', '{"epochs": 1}', '{"epoch": 1, "history": 3}']
)
def test_an_invalid_state_is_damaged(written, state):
    (written / "state.json").write_text(state)
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: "):
        read_checkpoint(written)


class Bomb:
    """Executes code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (99,))


def test_reading_a_checkpoint_executes_no_code(written):
    np.savez(written / "model.npz", a=np.array([Bomb()], dtype=object))
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: Object arrays cannot be loaded"):
        read_checkpoint(written)
    (written / "model.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: .*pickle"):
        read_checkpoint(written)


def test_the_state_is_written_last(tmp_path, monkeypatch):
    def fail(file: Any, **arrays: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(tmp_path, make_checkpoint())
    assert not (tmp_path / "state.json").exists()
