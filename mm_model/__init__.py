"""A Keras 3 model that fuses images, numbers, categories and texts into one probability.

Inputs: raw pixels 0-255, raw numbers (NaN for missing), category codes.
Use:    model = mm_model.create_model((456, 456, 3), (12,)); model.fit([X_image, X_numeric], y)

    spec, statistics, nearest_match    settings, column statistics, error texts
    model, mean_model, loading         builds, averages and loads models
    model_inputs, model_parts          names their inputs; cuts them in two
    backbones/, branches/, fusion/, layers/    parts of the model
    losses, optimizer, mixup           parts of a training step
    freezing                           trained layers and learning rates per epoch
    fit_helpers                        class weights and callbacks
    calibration                        blend and calibration after training
    per_row_random, tunable            random numbers per row, hyperparameters without retracing
    compat_keras                       private APIs of Keras
    registration                       lets Keras load saved models

The modules in the first line import neither Keras nor TensorFlow. To keep them fast to import, the
names below are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mm_model.registration import register_with_keras

if TYPE_CHECKING:
    from mm_model.backbones.tokenizer import HashedNgrams as HashedNgrams
    from mm_model.backbones.tokenizer import TextReader as TextReader
    from mm_model.branches.text_inputs import TextShape as TextShape
    from mm_model.fit_helpers import balanced_class_weight as balanced_class_weight
    from mm_model.fit_helpers import default_callbacks as default_callbacks
    from mm_model.loading import load_model as load_model
    from mm_model.losses import make_loss as make_loss
    from mm_model.mean_model import MeanModel as MeanModel
    from mm_model.model import FusionModel as FusionModel
    from mm_model.model import build_model as build_model
    from mm_model.model import create_model as create_model
    from mm_model.optimizer import make_optimizer as make_optimizer
    from mm_model.spec import LossSpec as LossSpec
    from mm_model.spec import ModelSpec as ModelSpec
    from mm_model.spec import OptimizerSpec as OptimizerSpec
    from mm_model.statistics import NumericStatistics as NumericStatistics
    from mm_model.statistics import Vocabulary as Vocabulary
    from mm_model.statistics import fit_numeric_statistics as fit_numeric_statistics
    from mm_model.statistics import fit_vocabulary as fit_vocabulary

_NAMES = {
    "backbones.tokenizer": "HashedNgrams TextReader",
    "branches.text_inputs": "TextShape",
    "fit_helpers": "balanced_class_weight default_callbacks",
    "losses": "make_loss",
    "loading": "load_model",
    "mean_model": "MeanModel",
    "model": "FusionModel build_model create_model",
    "optimizer": "make_optimizer",
    "spec": "LossSpec ModelSpec OptimizerSpec",
    "statistics": "NumericStatistics Vocabulary fit_numeric_statistics fit_vocabulary",
}


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names.split():
            value = getattr(import_module(f"mm_model.{module}"), name)
            register_with_keras()
            return value
    raise AttributeError(f"module 'mm_model' has no attribute {name!r}")


register_with_keras()
