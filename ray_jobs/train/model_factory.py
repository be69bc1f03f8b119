"""Spec and manifest → the untrained model of a run."""

import keras

from mm_model.model import FusionModel, build_model
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.reader import RowDecoder


def new_model(spec: RunSpec, manifest: Manifest, precision: str = "float32") -> FusionModel:
    """Return the untrained model of a run, computing in a precision."""
    decoder = RowDecoder(manifest, with_image=True, size=spec.data.image_size)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        return build_model(
            spec.model,
            manifest.statistics,
            decoder.row_shape,
            vocabularies=manifest.vocabularies,
            shape_features=decoder.row_shape if manifest.image.features else None,
        )
    finally:
        keras.config.set_dtype_policy(before)
