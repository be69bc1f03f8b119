"""Averages the probabilities of several fusion models, such as those of the folds of the same data.

Shapes: B rows, C categorical columns.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from mm_model.model import FusionModel
from mm_model.model_inputs import ExportedModel, inputs_by_name


@keras.saving.register_keras_serializable("mm_model")
class MeanModel(ExportedModel):
    """Takes the inputs of a `FusionModel` and returns the mean of the models' probabilities (B, 1).

    Args:
        models: The models, which have the same inputs.
        codes: For each model and categorical column, the model's code of each code of this model's
            vocabularies, which may have more words.
    """

    def __init__(
        self,
        models: Sequence[FusionModel],
        codes: Sequence[Sequence[Sequence[int]]],
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.models = list(models)
        self.codes = [[list(of_column) for of_column in of_model] for of_model in codes]
        self.built = True

    @property
    def network(self) -> keras.Model:
        """A network with the inputs of this model."""
        return self.models[0].network

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs."""
        return self.models[0].input_names

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Return the mean of the calibrated probabilities (B, 1)."""
        named = inputs_by_name(inputs, self.input_names)
        probabilities = [
            model(own_codes(named, codes), training=training)
            for model, codes in zip(self.models, self.codes, strict=True)
        ]
        return ops.mean(ops.stack(probabilities), axis=0)

    def get_config(self) -> dict:
        """Return the models and codes."""
        models = [keras.saving.serialize_keras_object(model) for model in self.models]
        return {"models": models, "codes": self.codes, "name": self.name}

    @classmethod
    def from_config(cls, config: dict, custom_objects: Any = None) -> "MeanModel":
        """Return the untrained model that a config describes."""
        models = [
            keras.saving.deserialize_keras_object(model, custom_objects=custom_objects)
            for model in config["models"]
        ]
        return cls(**{**config, "models": models})

    def get_build_config(self) -> None:
        """Return None, because the constructor builds the model."""

    def get_compile_config(self) -> None:
        """Return None, because the mean is for inference."""


def own_codes(inputs: Any, codes: Sequence[Sequence[int]]) -> Any:
    """Return the inputs with the categories' codes of one of the models."""
    if not codes:
        return inputs
    category_BC: Any = ops.cast(inputs["category"], "int32")
    columns = [
        ops.take(ops.convert_to_tensor(of_column, "int32"), category_BC[:, column])
        for column, of_column in enumerate(codes)
    ]
    return {**inputs, "category": ops.stack(columns, axis=1)}
