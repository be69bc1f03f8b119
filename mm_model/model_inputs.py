"""Names and casts the inputs of a model, for calls and for `export`."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

INPUT_DTYPES = {
    "image": "float32",
    "features": "float32",
    "image_mask": "float32",
    "numeric": "float32",
    "category": "int32",
    "text": "int32",
    "text_mask": "float32",
}
"""Dtypes of all inputs that a network may have, in order."""


class ExportedModel(keras.Model):
    """A model that Keras can export before it was called, as after loading."""

    def export(
        self,
        filepath: Any,
        format: str = "tf_saved_model",
        verbose: Any = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Export the model as `keras.Model.export` does, by default for batches of any size."""
        model: Any = self
        specs = {
            name: keras.InputSpec(INPUT_DTYPES[name], model.network.input[name].shape, name=name)
            for name in model.input_names
        }
        super().export(filepath, format, verbose, input_signature or [specs], **kwargs)


def inputs_by_name(inputs: Any, names: list[str]) -> dict[str, Any]:
    """Return the network's inputs by name, cast to their dtypes, given a dict or a list."""
    image = "features" if "features" in names else "image"
    given = inputs if isinstance(inputs, Mapping) else _name_inputs(inputs, names, image)
    if "image_mask" in names and image in given and "image_mask" not in given:
        shape: Any = ops.shape(given[image])
        given = {**given, "image_mask": ops.ones(shape[:2])}
    if absent := [name for name in names if name not in given]:
        raise ValueError(f"inputs {absent} are missing; the model takes {names}, got {list(given)}")
    return {name: ops.cast(given[name], INPUT_DTYPES[name]) for name in names}


def _name_inputs(inputs: Any, names: list[str], image: str) -> dict[str, Any]:
    """Name the inputs in a list, which may contain inputs of branches that the model lacks."""
    given = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    positional = (image, "numeric", "category")
    required = [name for name in positional if name in names]
    for candidates in (required, positional[: len(given)]):
        if len(candidates) == len(given) and set(required) <= set(candidates):
            return dict(zip(candidates, given, strict=True))
    raise ValueError(f"the model takes {required}, got {len(given)} inputs")
