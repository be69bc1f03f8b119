"""A fusion model for images and numbers of the same thing: Keras 3 in, one probability out.

Enters: raw pixels 0-255, raw numbers (NaN where missing), codes of categories.  Leaves: a yes/no
probability.
Use:    model = mm_model.create_model((456, 456, 3), (12,)); model.fit([X_image, X_numeric], y)

`mm_model.spec` and `mm_model.statistics` need neither Keras nor TensorFlow, so the names below
are imported when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_model.fit_helpers import balanced_class_weight, default_callbacks
    from mm_model.losses import make_loss
    from mm_model.model import FusionModel, build_model, create_model, load_model
    from mm_model.optimizer import make_optimizer
    from mm_model.spec import LossSpec, ModelSpec, OptimizerSpec
    from mm_model.statistics import (
        NumericStatistics,
        Vocabulary,
        fit_numeric_statistics,
        fit_vocabulary,
    )

_HOME_OF = {
    "FusionModel": "mm_model.model",
    "LossSpec": "mm_model.spec",
    "ModelSpec": "mm_model.spec",
    "NumericStatistics": "mm_model.statistics",
    "OptimizerSpec": "mm_model.spec",
    "Vocabulary": "mm_model.statistics",
    "balanced_class_weight": "mm_model.fit_helpers",
    "build_model": "mm_model.model",
    "create_model": "mm_model.model",
    "default_callbacks": "mm_model.fit_helpers",
    "fit_numeric_statistics": "mm_model.statistics",
    "fit_vocabulary": "mm_model.statistics",
    "load_model": "mm_model.model",
    "make_loss": "mm_model.losses",
    "make_optimizer": "mm_model.optimizer",
}

__all__ = [
    "FusionModel",
    "LossSpec",
    "ModelSpec",
    "NumericStatistics",
    "OptimizerSpec",
    "Vocabulary",
    "balanced_class_weight",
    "build_model",
    "create_model",
    "default_callbacks",
    "fit_numeric_statistics",
    "fit_vocabulary",
    "load_model",
    "make_loss",
    "make_optimizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mm_model' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
