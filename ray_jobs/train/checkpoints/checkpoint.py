"""What a checkpoint holds, how it is written, and how a run goes on from it.

    state.json      epoch, step, history, early stopping, learning-rate plateau, best epoch
    model.npz       every variable of the model, by its place and path, random states among them
    optimizer.npz   every variable of the optimizer and of the step, likewise
    local.npz       what each replica has for itself: batch-norm statistics, its part of the loss

The weights of a best epoch lie in a folder of their own, since they are written once:

    model.npz       every variable of the model at that epoch
    validation.npz  logits of every head and labels of the validation rows

Plain arrays and JSON: nothing in a checkpoint is executed when it is read.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from pydantic import NonNegativeInt

from mm_model.spec import Spec

if TYPE_CHECKING:
    import keras

Arrays = dict[str, np.ndarray]

STATE = "state.json"


class DamagedCheckpointError(Exception):
    """A checkpoint is not whole; what cannot be read at the moment is another thing."""


class LoopState(Spec):
    """Where training stands after a step; the same on every worker but for rank 0's measures."""

    epoch: NonNegativeInt = 0
    """Epochs done."""
    step: NonNegativeInt = 0
    """Steps done: the data cursor."""
    history: tuple[dict[str, Any], ...] = ()
    """One record an epoch."""
    best_epoch: NonNegativeInt | None = None
    """Index of the best epoch so far."""
    plateau_epochs: NonNegativeInt = 0
    """Epochs since the plateau schedule last saw a better one, or acted."""


@dataclass
class BestCheckpoint:
    """The model at one of the best epochs so far, and what it said of the validation rows."""

    model: Arrays
    head_logits_NM: np.ndarray
    label_N: np.ndarray


@dataclass
class Checkpoint:
    """A checkpoint in memory."""

    state: LoopState
    model: Arrays
    optimizer: Arrays
    local: Arrays = field(default_factory=dict)
    """By name what each replica has for itself, their number first; in the middle of epochs."""
    best: dict[int, BestCheckpoint] = field(default_factory=dict)
    """The best epochs that are kept, by their index."""


def assign(variables: "Sequence[keras.Variable]", arrays: Arrays, what: str) -> None:
    """Give variables the values that were copied from others of the same places.

    Raises:
        ValueError: if there are more or fewer of them, or one has another shape.
    """
    by_place = [arrays[name] for name in sorted(arrays)]
    shapes = [tuple(v.shape) for v in variables]
    if shapes != [array.shape for array in by_place]:
        odd = next(
            (
                v.path
                for v, a in zip(variables, by_place, strict=False)
                if tuple(v.shape) != a.shape
            ),
            f"{len(variables)} variables, {len(by_place)} stored",
        )
        raise ValueError(
            f"the {what} do not fit the model ({odd}); was it changed under the same run name?"
        )
    for variable, array in zip(variables, by_place, strict=True):
        variable.assign(array)


def is_random_state(variable: "keras.Variable") -> bool:
    """Whether a variable is the state of a random generator, not something learnt."""
    return "seed_generator_state" in variable.path


def write_checkpoint(folder: str | Path, saved: Checkpoint) -> None:
    """Write a checkpoint, without the best epochs, into an empty local folder."""
    folder = Path(folder)
    parts = {"model": saved.model, "optimizer": saved.optimizer, "local": saved.local}
    for name, arrays in parts.items():
        _write_arrays(folder / f"{name}.npz", arrays)
    # Last, so that a folder with a state is whole.
    _write_state(folder, saved.state)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Return a checkpoint, without the best epochs.

    Raises:
        DamagedCheckpointError: if it is not whole.
        OSError: if it cannot be read.
    """
    folder = Path(folder)
    try:
        state = LoopState.model_validate_json((folder / STATE).read_text())
        model, optimizer, local = (
            _read_arrays(folder / f"{name}.npz") for name in ("model", "optimizer", "local")
        )
        return Checkpoint(state, model, optimizer, local)
    except _NOT_WHOLE as error:
        raise DamagedCheckpointError(f"the checkpoint in {folder} is not whole: {error}") from error


def write_best(folder: str | Path, best: BestCheckpoint) -> None:
    """Write the model of a best epoch into an empty local folder."""
    folder = Path(folder)
    _write_arrays(folder / "model.npz", best.model)
    validation = {"head_logits": best.head_logits_NM, "label": best.label_N}
    _write_arrays(folder / "validation.npz", validation)


def read_best(folder: str | Path) -> BestCheckpoint:
    """Return the model of a best epoch.

    Raises:
        DamagedCheckpointError: if it is not whole.
        OSError: if it cannot be read.
    """
    folder = Path(folder)
    try:
        validation = _read_arrays(folder / "validation.npz")
        model = _read_arrays(folder / "model.npz")
        return BestCheckpoint(model, validation["head_logits"], validation["label"])
    except _NOT_WHOLE as error:
        raise DamagedCheckpointError(f"the best epoch in {folder} is not whole: {error}") from error


_NOT_WHOLE = (FileNotFoundError, EOFError, BadZipFile, ValueError, KeyError)


def _write_arrays(path: Path, arrays: Arrays) -> None:
    with open(path, "wb") as file:
        # A slash in the name would become a folder inside the zip file.
        named: dict[str, Any] = {key.replace("/", "|"): value for key, value in arrays.items()}
        np.savez(file, **named)
        _flush(file)


def _read_arrays(path: Path) -> Arrays:
    # Opened here, since NumPy leaves a file open that it finds to be no archive.
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
        return {key.replace("|", "/"): file[key] for key in file.files}


def _write_state(folder: Path, state: LoopState) -> None:
    with open(folder / STATE, "w") as file:
        file.write(json.dumps(state.model_dump(mode="json")))
        _flush(file)


def _flush(file: Any) -> None:
    """Wait until the disk has a file: its name must not be there before its content."""
    file.flush()
    os.fsync(file.fileno())
