"""Cuts a fusion model in two, so that its upper part can be called with other values in between.

Shapes: B rows, M heads.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import KerasTensor, ops

from mm_model.branches.image_inputs import IMAGE_POOL, IMAGE_TOKENS
from mm_model.model import FusionModel
from mm_model.model_inputs import inputs_by_name

IMAGE_FEATURES = (IMAGE_POOL, IMAGE_TOKENS)
ENCODED_COLUMNS = ("numeric_encoding", "category_embedding")
"""Layers that encode numbers and categories; their attribute `columns` has the column of each
component of their output."""
IMAGE_MAP = "image_map"


class CutModel:
    """A fusion model in two parts: `below` computes some tensors, `above` the logits from them.

    Args:
        model: The model.
        names: Layers whose outputs are the tensors; those that the model lacks are left out.
            `IMAGE_MAP` stands for the input of the layer that pools the backbone.
    """

    def __init__(self, model: FusionModel, names: Sequence[str]) -> None:
        network: Any = model.network
        known = [layer.name for layer in network.layers]
        tensors: dict[str, KerasTensor] = {}
        for name in names:
            if name == IMAGE_MAP:
                tensors[name] = network.get_layer(IMAGE_POOL).input
            elif name in known:
                tensors[name] = network.get_layer(name).output
        self.model, self.names = model, list(tensors)
        self.below = keras.Model(network.input, tensors) if tensors else None
        has_image = bool({IMAGE_MAP, *IMAGE_FEATURES} & set(tensors))
        self._others = [n for n in model.input_names if not (n == "image" and has_image)]
        others = [network.input[name] for name in self._others]
        self.above = keras.Model([*tensors.values(), *others], network.output)

    @property
    def row_bytes(self) -> int:
        """Bytes of the tensors of one image or row."""
        tensors: Any = {} if self.below is None else self.below.output
        return sum(4 * math.prod(tensor.shape[1:]) for tensor in tensors.values())

    def tensors(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the tensors between the two parts by name."""
        if self.below is None:
            return {}
        return self.below(inputs_by_name(inputs, self.model.input_names), training=False)

    def logits(self, tensors: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
        """Return the logits (B, M) of all heads; images are ignored if their features are given."""
        named = inputs_by_name(inputs, self._others)
        values = [ops.convert_to_tensor(tensors[name]) for name in self.names]
        return self.above([*values, *(named[name] for name in self._others)], training=False)

    def logit(self, tensors: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
        """Return the calibrated logit (B, 1)."""
        model = self.model
        return model.calibration(model.blend(self.logits(tensors, inputs)))


def with_embeddings(model: FusionModel) -> keras.Model:
    """Return a network from the inputs of a model to its logits (B, M) and M embeddings (B, F).

    The embedding of a head is what it computes its logit from.
    """
    network: Any = model.network
    heads = (network.get_layer(f"{head}_head") for head in model.heads)
    return keras.Model(network.input, [network.output, *(head.input for head in heads)])


def has_feature_map(model: FusionModel) -> bool:
    """Whether the backbone pools a map of convolutional features (B, H, W, F)."""
    layers: Any = model.network.layers
    pool = [layer for layer in layers if layer.name == IMAGE_POOL]
    return bool(pool) and len(pool[0].input.shape) == 4


def column_names(
    model: FusionModel, numbers: Sequence[str], words: Sequence[str]
) -> dict[str, list[str]]:
    """Return the column of each component of the layers in `ENCODED_COLUMNS`, by layer."""
    of_layer = {"numeric_encoding": list(numbers), "category_embedding": list(words)}
    found: dict[str, list[str]] = {}
    for layer in model.network.layers:
        if layer.name in of_layer:
            encoded: Any = layer
            found[layer.name] = [of_layer[layer.name][column] for column in encoded.columns]
    return found
