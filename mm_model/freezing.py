"""Decides which part of the backbones trains in which epochs, and at which learning rates.

A schedule of stages unfreezes the image backbone and a pretrained text backbone from the top down
(Howard and Ruder 2018, arXiv 1801.06146, sections 3.2 and 3.3).
"""

from collections.abc import Sequence

from keras.layers import Layer

from mm_model.model import FusionModel
from mm_model.spec import StageSpec

# `model_construct` skips validation, which requires at least one epoch.
NO_STAGES = StageSpec.model_construct(epochs=0)
"""The stage of a training run without stages: every layer trains as built."""


def stage_of(stages: Sequence[StageSpec], epoch: int) -> StageSpec:
    """Return the stage of an epoch, counted from 0; the last stage lasts until training ends."""
    for stage in stages:
        if epoch < stage.epochs:
            return stage
        epoch -= stage.epochs
    return stages[-1] if stages else NO_STAGES


def apply_stage(model: FusionModel, stage: StageSpec) -> None:
    """Freeze the lower part of each backbone with its batch norms, and unfreeze the upper part.

    A backbone that was built frozen stays frozen.

    Afterwards, functions such as the training step must be traced again. Build the optimizer before
    any layer is frozen, so that it has state for every variable that will train.

    Raises:
        ValueError: If the model has no backbone, or all of them were built frozen.
    """
    if stage == NO_STAGES:
        return
    if not (model.backbone or model.text_backbone):
        raise ValueError(
            "train.stages freezes layers of a backbone, but this model has none; remove "
            "train.stages or choose a model.image.kind"
        )
    backbones = _trainable_backbones(model)
    if stage.backbone and not backbones:
        raise ValueError(
            f"backbone={stage.backbone:g} in train.stages unfreezes the backbone, but "
            f"model.{'image' if model.backbone else 'text'}.trainable=false freezes it for the "
            "whole run; set trainable to true or backbone to 0"
        )
    for layers in backbones:
        # Any fraction above 0 unfreezes at least the topmost layer.
        num_trainable = max(round(stage.backbone * len(layers)), 1) if stage.backbone else 0
        for i, layer in enumerate(layers):
            layer.trainable = i >= len(layers) - num_trainable


def learning_rate_factors(model: FusionModel, stage: StageSpec) -> dict[int, float]:
    """Return the factor of the learning rate for each trainable variable of a backbone, by `id`.

    The factor of a layer is backbone_rate × layer_decay^depth, where depth rises in equal steps
    from 0 at the top of the backbone to 1 at its bottom. Omits variables whose factor is 1.

    Args:
        model: The model after `apply_stage`.
        stage: The stage that was applied.
    """
    factors = {}
    for layers in _trainable_backbones(model):
        for i, layer in enumerate(reversed(layers)):
            factor = stage.backbone_rate * stage.layer_decay ** (i / max(len(layers) - 1, 1))
            if factor != 1.0:
                factors |= {id(variable): factor for variable in layer.trainable_variables}
    return factors


def _trainable_backbones(model: FusionModel) -> list[list[Layer]]:
    """Return the layers of each backbone that was not built frozen."""
    backbones = [model.backbone_layers()] if model.backbone_trainable else []
    return [*backbones, model.text_backbone_layers()] if model.text_trainable else backbones
