"""Loads a saved model."""

import warnings
from pathlib import Path

import keras

import mm_model.backbones.image_backbone  # noqa: F401  # registers the layers of saved backbones
from mm_model.mean_model import MeanModel
from mm_model.model import FusionModel


def load_model(path: str | Path) -> FusionModel | MeanModel:
    """Load a saved model in Keras' safe mode, which executes no code from the file.

    Raises:
        ValueError: If the file does not exist or contains no model of this package.
    """
    with warnings.catch_warnings():
        # Keras warns that the file contains no optimizer.
        warnings.simplefilter("ignore")
        model = keras.saving.load_model(str(path), compile=False, safe_mode=True)
    if not isinstance(model, FusionModel | MeanModel):
        raise ValueError(
            f"{path} contains a {type(model).__name__}, not a FusionModel; pass the model.keras of "
            "a run"
        )
    return model
