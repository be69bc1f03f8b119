"""Loads a saved model."""

import warnings
import zipfile
from pathlib import Path

import keras

# These register the layers of saved models.
import mm_model.backbones.image_backbone
import mm_model.layers.attention  # noqa: F401
from mm_model.backbones.hub import import_keras_hub
from mm_model.mean_model import MeanModel
from mm_model.model import FusionModel


def load_model(path: str | Path) -> FusionModel | MeanModel:
    """Load a saved model in Keras' safe mode, which executes no code from the file.

    Raises:
        ValueError: If the file does not exist or contains no model of this package, or its backbone
            is one of KerasHub, which is not installed.
    """
    if _contains_keras_hub(path):
        import_keras_hub()  # Registers its layers.
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


def _contains_keras_hub(path: str | Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "config.json" in archive.namelist() and b"keras_hub" in archive.read("config.json")
