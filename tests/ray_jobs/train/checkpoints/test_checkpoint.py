import json
import os
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
    is_random_state,
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


def make_model(units: int = 3, seed: int = 0, dropout: float = 0.0) -> Any:
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [keras.layers.Input((4,)), keras.layers.Dense(units), keras.layers.BatchNormalization(),
         keras.layers.Dropout(dropout), keras.layers.Dense(1)]
    )  # fmt: skip
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mse")
    return model


def trained(seed: int = 0, dropout: float = 0.0) -> Any:
    model = make_model(seed=seed, dropout=dropout)
    rng = np.random.default_rng(seed)
    model.train_on_batch(rng.normal(size=(8, 4)), rng.normal(size=(8, 1)))
    return model


def saved() -> Checkpoint:
    rng = np.random.default_rng(0)
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    model = {"00000 a/kernel": rng.normal(size=(3, 2)).astype(np.float32), "00001 a/odd": odd}
    optimizer = {"00000 adam/iterations": np.array(7, np.int64), "00001 m": np.empty((0, 3))}
    local = {"loss_and_statistics": rng.normal(size=(2, 7)).astype(np.float32)}
    return Checkpoint(STATE, model, optimizer, local)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, saved())
    return tmp_path


def test_a_checkpoint_is_read_back_bit_by_bit(written):
    read, before = read_checkpoint(written), saved()
    assert read.state == STATE
    assert sorted(os.listdir(written)) == sorted(FILES)
    for part in ("model", "optimizer", "local"):
        assert identical(getattr(before, part), getattr(read, part))


def test_a_best_epoch_is_read_back_bit_by_bit(tmp_path):
    rng = np.random.default_rng(0)
    best = BestCheckpoint(saved().model, rng.normal(size=(5, 3)), np.ones(5, np.float32))
    write_best(tmp_path, best)
    read = read_best(tmp_path)
    assert identical(read.model, best.model)
    assert read.head_logits_NM.tobytes() == best.head_logits_NM.tobytes()
    assert read.label_N.tobytes() == best.label_N.tobytes()
    for name in BEST_FILES:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DamagedCheckpointError, match=r"the best epoch in .* is not whole: "):
            read_best(tmp_path)
        (tmp_path / name).write_bytes(whole)


def test_a_history_of_any_float_is_read_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    floats = np.frombuffer(rng.bytes(8 * 2000), np.float64)
    history = tuple({"val/log_loss": float(v)} for v in floats[np.isfinite(floats)])
    write_checkpoint(tmp_path, Checkpoint(LoopState(history=history), {}, {}))
    assert read_checkpoint(tmp_path).state.history == history


def test_a_trained_model_goes_on_in_another_one_bit_by_bit(tmp_path):
    first, other = trained(), make_model(seed=1)
    other.optimizer.build(other.trainable_variables)
    now = Checkpoint(STATE, arrays_of(first.variables), arrays_of(first.optimizer.variables))
    write_checkpoint(tmp_path, now)
    read = read_checkpoint(tmp_path)
    assign(other.variables, read.model, "model weights")
    assign(other.optimizer.variables, read.optimizer, "optimizer weights")
    # Layers are numbered by process, so their paths differ, and places identify variables.
    assert [*arrays_of(other.variables)] != [*read.model]
    own, its = (dict(enumerate(a.values())) for a in (arrays_of(other.variables), read.model))
    assert identical(own, its)
    assert other.optimizer.iterations.numpy() == 1
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 1))
    for one in (first, other):
        one.train_on_batch(x, y)
    for a, b in zip(first.trainable_variables, other.trainable_variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_random_states_go_on_where_they_were():
    first, other = trained(0, dropout=0.5), make_model(seed=1, dropout=0.5)
    states = [[v for v in m.variables if is_random_state(v)] for m in (first, other)]
    assert [len(found) for found in states] == [1, 1]
    assign(other.variables, arrays_of(first.variables), "model weights")
    np.testing.assert_array_equal(states[0][0].numpy(), states[1][0].numpy())
    x = np.ones((8, 4))
    np.testing.assert_array_equal(first(x, training=True), other(x, training=True))


def test_places_beyond_the_tenth_keep_their_order():
    variables = [keras.Variable(np.full(2, i, np.float32), name=f"v{i}") for i in range(12)]
    saved = {f"{i:05d} v{i}": v.numpy() * 10 for i, v in enumerate(variables)}
    assign(variables, dict(reversed(saved.items())), "model weights")
    assert [float(v.numpy()[0]) for v in variables] == [10.0 * i for i in range(12)]


def test_weights_of_another_shape_name_the_first_variable_that_differs():
    stored, model = arrays_of(make_model(units=5).variables), make_model(units=3)
    before = arrays_of(model.variables)
    message = r"the model weights do not fit the model \(\S*kernel\); was it changed under the same"
    with pytest.raises(ValueError, match=message):
        assign(model.variables, stored, "model weights")
    assert identical(arrays_of(model.variables), before)


def test_weights_of_another_number_say_both_numbers():
    model = make_model()
    stored = dict(list(arrays_of(model.variables).items())[:-1])
    with pytest.raises(ValueError, match=r"best weights do not fit .*8 variables, 7 stored"):
        assign(model.variables, stored, "best weights")


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_without_one_of_its_files_is_not_whole(written, name):
    (written / name).unlink()
    with pytest.raises(
        DamagedCheckpointError, match=rf"the checkpoint in {written} is not whole: .*{name}"
    ):
        read_checkpoint(written)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_checkpoint_with_a_truncated_file_is_not_whole(written, name, share):
    content = (written / name).read_bytes()
    (written / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DamagedCheckpointError, match=r"the checkpoint in .* is not whole: "):
        read_checkpoint(written)


def test_a_flipped_byte_in_an_array_is_noticed(written):
    content = bytearray((written / "model.npz").read_bytes())
    with zipfile.ZipFile(written / "model.npz") as file:
        offset = file.infolist()[1].header_offset
    content[offset - 1] ^= 1  # the last byte of the array before
    (written / "model.npz").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"is not whole: .*CRC"):
        read_checkpoint(written)


@pytest.mark.parametrize(
    "state", ["{}x", '{"epoch": -1}', '{"epochs": 1}', '{"epoch": 1, "history": 3}']
)
def test_a_state_that_does_not_validate_is_not_whole(written, state):
    (written / "state.json").write_text(state)
    with pytest.raises(DamagedCheckpointError, match=r"is not whole: "):
        read_checkpoint(written)


class Bomb:
    """Runs code of its own when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (99,))


def test_nothing_in_a_checkpoint_is_executed(written):
    np.savez(written / "model.npz", a=np.array([Bomb()], dtype=object))
    with pytest.raises(
        DamagedCheckpointError, match=r"is not whole: Object arrays cannot be loaded"
    ):
        read_checkpoint(written)


def test_a_pickle_in_place_of_arrays_is_refused(written):
    import pickle

    (written / "optimizer.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DamagedCheckpointError, match=r"is not whole: .*pickle"):
        read_checkpoint(written)


def test_the_state_is_plain_json_for_other_programs(written):
    tree = json.loads((written / "state.json").read_text())
    assert (tree["epoch"], tree["step"], tree["best_epoch"]) == (2, 13, 1)
    assert tree["history"][1]["val/log_loss"] == 5e-324


def test_the_state_is_written_last(tmp_path, monkeypatch):
    def fail(file: Any, **arrays: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(tmp_path, saved())
    assert not (tmp_path / "state.json").exists()
