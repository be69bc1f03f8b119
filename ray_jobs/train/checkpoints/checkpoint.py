"""Defines what a checkpoint contains, and reads, writes and restores it.

    state.json      epoch, step, history, early stopping, learning-rate plateau, best epoch
    model.npz       every variable of the model by index and path, including random states
    optimizer.npz   every variable of the optimizer and of the training step, likewise
    local.npz       values that differ between replicas: batch-norm statistics, parts of the loss

The weights of a best epoch are in their own folder, because they are written only once:

    model.npz       every variable of the model at that epoch
    validation.npz  logits of every head, labels and, if any, weights of the validation rows

Files contain plain arrays and JSON, so reading a checkpoint executes no code.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from pydantic import NonNegativeInt

from mm_model.spec import Spec
from ray_jobs.config.spec import TrainSpec
from ray_jobs.train.telemetry.history_keys import sort_key

if TYPE_CHECKING:
    import keras

Arrays = dict[str, np.ndarray]

STATE = "state.json"
_AUTOMATIC_NUMBER = re.compile(r"_\d+(?=[/_]|$)")


class DamagedCheckpointError(Exception):
    """A checkpoint is incomplete or damaged. Transient I/O errors raise OSError instead."""


class LoopState(Spec):
    """Progress of a training run; equal on all workers except for rank 0's measurements."""

    epoch: NonNegativeInt = 0
    """Completed epochs."""
    step: NonNegativeInt = 0
    """Completed steps, which also determine the position in the training data."""
    history: tuple[dict[str, Any], ...] = ()
    """One record per epoch."""
    best_epoch: NonNegativeInt | None = None
    """Index of the best epoch."""
    plateau_epochs: NonNegativeInt = 0
    """Epochs since the plateau schedule last saw an improvement or reduced the learning rate."""

    def best_epochs(self, train: TrainSpec) -> list[int]:
        """Return the indices of the best epochs to keep, best first; earlier epochs win ties."""
        key = train.monitor
        epochs = range(len(self.history))
        ranked = sorted(epochs, key=lambda epoch: sort_key(key, self.history[epoch][key]))
        return ranked[: train.keep_best]

    def is_finished(self, train: TrainSpec) -> bool:
        """Whether training has reached its last epoch or run out of patience."""
        if self.epoch == train.epochs:
            return True
        return self.best_epoch is not None and self.epoch - 1 - self.best_epoch >= train.patience


@dataclass
class BestCheckpoint:
    """The model at one of the best epochs, and its output for the validation rows."""

    model: Arrays
    head_logits_NM: np.ndarray
    label_N: np.ndarray
    weight_N: np.ndarray | None = None
    """None without row weights."""


@dataclass
class Checkpoint:
    """A checkpoint in memory."""

    state: LoopState
    model: Arrays
    optimizer: Arrays
    local: Arrays = field(default_factory=dict)
    """Values that differ between replicas, by replica on the first axis; only within an epoch."""
    best: dict[int, BestCheckpoint] = field(default_factory=dict)
    """The kept best epochs, by index."""


def array_name(index: int, variable: "keras.Variable") -> str:
    """Return the name of a variable's array in a checkpoint."""
    return f"{index:05d} {variable.path}"


def assign(variables: "Sequence[keras.Variable]", arrays: Arrays, what: str) -> None:
    """Assign saved arrays to variables in the order in which they were saved.

    Raises:
        ValueError: If a layer, a name or a shape differs; nothing is assigned.
    """
    names = sorted(arrays)
    saved = [_identity(name.partition(" ")[2], arrays[name].shape) for name in names]
    here = [_identity(variable.path, tuple(variable.shape)) for variable in variables]
    if saved != here:
        pairs = zip(here, saved, strict=False)
        difference = next(
            (f"{one} was saved as {other}" for one, other in pairs if one != other),
            f"{len(here)} variables, {len(saved)} saved",
        )
        raise ValueError(
            f"the saved {what} do not fit the model ({difference}); the settings or the version of "
            "Keras changed, so choose another --run.name"
        )
    for variable, name in zip(variables, names, strict=True):
        variable.assign(arrays[name])


def _identity(path: str, shape: tuple[int, ...]) -> str:
    """Return what must be equal: layer, name and shape.

    Omits the numbers of unnamed layers, which Keras counts per process, and the names of the models
    around a layer, some of which `from_config` drops.
    """
    layer_and_name = "/".join(path.split("/")[-2:])
    return f"{_AUTOMATIC_NUMBER.sub('', layer_and_name)} {shape}"


def write_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, without the best epochs, into an empty local folder."""
    folder = Path(folder)
    for name in ("model", "optimizer", "local"):
        _write_arrays(folder / f"{name}.npz", getattr(checkpoint, name))
    # Last, so that a folder with a state is complete.
    with _synced(folder / STATE) as file:
        file.write(json.dumps(checkpoint.state.model_dump(mode="json")).encode())


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Return a checkpoint without the best epochs.

    Raises:
        DamagedCheckpointError: If it is incomplete or damaged.
        OSError: If it cannot be read.
    """
    folder = Path(folder)
    with _detecting_damage("the checkpoint", folder):
        state = LoopState.model_validate_json((folder / STATE).read_text())
        model, optimizer, local = (
            _read_arrays(folder / f"{name}.npz") for name in ("model", "optimizer", "local")
        )
        return Checkpoint(state, model, optimizer, local)


def write_best(folder: str | Path, best: BestCheckpoint) -> None:
    """Write the model of a best epoch into an empty local folder."""
    folder = Path(folder)
    _write_arrays(folder / "model.npz", best.model)
    validation = {"head_logits": best.head_logits_NM, "label": best.label_N}
    if best.weight_N is not None:
        validation["weight"] = best.weight_N
    _write_arrays(folder / "validation.npz", validation)


def read_best(folder: str | Path) -> BestCheckpoint:
    """Return the model of a best epoch.

    Raises:
        DamagedCheckpointError: If it is incomplete or damaged.
        OSError: If it cannot be read.
    """
    folder = Path(folder)
    with _detecting_damage("the best epoch", folder):
        validation = _read_arrays(folder / "validation.npz")
        model = _read_arrays(folder / "model.npz")
        rows = [validation["head_logits"], validation["label"], validation.get("weight")]
        return BestCheckpoint(model, *rows)


@contextmanager
def _detecting_damage(what: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, EOFError, BadZipFile, ValueError, KeyError) as error:
        raise DamagedCheckpointError(f"{what} in {folder} is damaged: {error}") from error


def _write_arrays(path: Path, arrays: Arrays) -> None:
    # In a zip file, a slash in a name would become a folder.
    named: dict[str, Any] = {key.replace("/", "|"): value for key, value in arrays.items()}
    with _synced(path) as file:
        np.savez(file, **named)


def _read_arrays(path: Path) -> Arrays:
    # NumPy would not close a file that is not an archive.
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
        return {key.replace("|", "/"): file[key] for key in file.files}


@contextmanager
def _synced(path: Path) -> Iterator[Any]:
    """Open a file and sync it to disk: a rename must not become visible before the content."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
