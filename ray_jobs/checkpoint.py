"""What a checkpoint holds, how it is written, and how a run goes on from it.

    state.json      epoch, step, history, early stopping, learning-rate plateau, best epoch
    model.npz       every variable of the model, by its place and path
    optimizer.npz   every variable of the optimizer, likewise
    best.npz        the model's variables and the validation logits at the best epoch

Plain arrays and JSON: nothing in a checkpoint is executed when it is read.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from pydantic import NonNegativeInt

from mm_model.spec import Spec

if TYPE_CHECKING:
    import keras

Arrays = dict[str, np.ndarray]


class LoopState(Spec):
    """Where training stands after an epoch; the same on every worker."""

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


def model_arrays(model: "keras.Model") -> Arrays:
    """Return a copy of every variable of a model; random states follow from seed and epoch."""
    return _arrays(model.variables)


def optimizer_arrays(optimizer: "keras.Optimizer") -> Arrays:
    """Return a copy of every variable of an optimizer."""
    return _arrays(optimizer.variables)


def _arrays(variables: "Sequence[keras.Variable]") -> Arrays:
    # Keras numbers unnamed layers by process, so the place in the list is what identifies a
    # variable; its path is for people.
    return {
        f"{i:05d} {v.path}": np.array(v.numpy(), copy=True)
        for i, v in enumerate(_lasting(variables))
    }


def assign(variables: "Sequence[keras.Variable]", arrays: Arrays, what: str) -> None:
    """Give variables the values that were copied from others of the same places.

    Raises:
        ValueError: if there are more or fewer of them, or one has another shape.
    """
    lasting = _lasting(variables)
    by_place = [arrays[name] for name in sorted(arrays)]
    shapes = [tuple(v.shape) for v in lasting]
    if shapes != [array.shape for array in by_place]:
        odd = next(
            (v.path for v, a in zip(lasting, by_place, strict=False) if tuple(v.shape) != a.shape),
            f"{len(lasting)} variables, {len(by_place)} stored",
        )
        raise ValueError(
            f"the {what} do not fit the model ({odd}); was it changed under the same run name?"
        )
    for variable, array in zip(lasting, by_place, strict=True):
        variable.assign(array)


def _lasting(variables: "Sequence[keras.Variable]") -> "list[keras.Variable]":
    return [v for v in variables if not is_random_state(v)]


def is_random_state(variable: "keras.Variable") -> bool:
    """Whether a variable is the state of a random generator, not something learnt."""
    return "seed_generator_state" in variable.path


def write_checkpoint(
    folder: str | Path, state: LoopState, model: Arrays, optimizer: Arrays, best: Arrays
) -> None:
    """Write a checkpoint into an empty local folder."""
    folder = Path(folder)
    for name, arrays in (("model", model), ("optimizer", optimizer), ("best", best)):
        with open(folder / f"{name}.npz", "wb") as file:
            named: dict[str, Any] = _escaped(arrays)
            np.savez(file, **named)
    # Last, so that a folder with a state is whole.
    (folder / "state.json").write_text(json.dumps(state.model_dump(mode="json")))


def read_checkpoint(folder: str | Path) -> tuple[LoopState, Arrays, Arrays, Arrays]:
    """Return state, model, optimizer and best of a checkpoint.

    Raises:
        ValueError: if it is not whole.
    """
    folder = Path(folder)
    try:
        state = LoopState.model_validate_json((folder / "state.json").read_text())
        arrays = []
        for name in ("model", "optimizer", "best"):
            # Opened here, since NumPy leaves a file open that it finds to be no archive.
            with (
                open(folder / f"{name}.npz", "rb") as stream,
                np.load(stream, allow_pickle=False) as file,
            ):
                arrays.append({key.replace("|", "/"): file[key] for key in file.files})
    except (OSError, EOFError, BadZipFile, ValueError, KeyError) as error:
        raise ValueError(f"the checkpoint in {folder} is not whole: {error}") from error
    return state, arrays[0], arrays[1], arrays[2]


def _escaped(arrays: Arrays) -> Arrays:
    # A slash in the name would become a folder inside the zip file.
    return {key.replace("/", "|"): value for key, value in arrays.items()}
