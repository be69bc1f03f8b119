"""Builds the model of a run from its spec and manifest, and copies its structure."""

from typing import Any

import keras

from mm_model.branches.text_inputs import TextShape
from mm_model.model import FusionModel, build_model
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.decoder import RowDecoder
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.text_input import text_reader

_LESS_PRECISION = ("float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


def new_model(spec: RunSpec, manifest: Manifest, precision: str = "float32") -> FusionModel:
    """Return the untrained model of a run, which computes in the given precision."""
    decoder = RowDecoder(manifest, with_image=True, size=spec.data.image_size)
    reader = text_reader(spec, manifest)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        return build_model(
            spec.model,
            manifest.statistics,
            decoder.row_shape,
            vocabularies=manifest.vocabularies,
            shape_features=decoder.row_shape if manifest.image.features else None,
            image_optional=manifest.image.optional,
            text=None if reader is None else TextShape.of(reader),
        )
    finally:
        keras.config.set_dtype_policy(before)


def float32_copy(model: FusionModel) -> FusionModel:
    """Return an untrained copy of a model, outside any strategy, that computes in float32.

    Unlike `new_model`, it does not read pretrained weights, which may be unavailable by now.
    """
    copy = FusionModel.from_config(_in_float32(model.get_config()))
    for layer in copy.backbone_layers():
        # As when the model was built, before a stage froze layers.
        layer.trainable = model.backbone_trainable
    for layer in copy.text_backbone_layers():
        layer.trainable = model.text_trainable
    return copy


def _in_float32(config: Any) -> Any:
    """Return a Keras config with float32 for every dtype and dtype policy of less precision."""
    if isinstance(config, dict):
        return {name: _in_float32(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [_in_float32(value) for value in config]
    return "float32" if config in _LESS_PRECISION else config
