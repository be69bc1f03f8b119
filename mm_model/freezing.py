"""Which part of the backbone learns in which epochs, and how fast.

A schedule of stages thaws the backbone of the image branch from its top (Howard and Ruder 2018,
arXiv 1801.06146, sections 3.2 and 3.3).
"""

from collections.abc import Sequence

from mm_model.model import FusionModel
from mm_model.spec import StageSpec

# No stage that a user can write has no epochs.
NO_STAGES = StageSpec.model_construct(epochs=0)
"""The stage of a training without stages: the model learns as it was built."""


def stage_of(stages: Sequence[StageSpec], epoch: int) -> StageSpec:
    """Return the stage of an epoch, which count from 0; the last one lasts to the end."""
    for stage in stages:
        if epoch < stage.epochs:
            return stage
        epoch -= stage.epochs
    return stages[-1] if stages else NO_STAGES


def apply_stage(model: FusionModel, stage: StageSpec) -> None:
    """Freeze the lower part of the backbone, with its batch norms, and thaw the upper part.

    What was traced before, such as a training step, has to be traced again. An optimizer has to be
    built while everything learns, so that it knows every variable that will.

    Raises:
        ValueError: if the model has no backbone, or one that was built not to learn at all.
    """
    if stage == NO_STAGES:
        return
    layers = model.backbone_layers()
    if not layers:
        raise ValueError(
            "train.stages freeze layers of an image backbone, and this model has none; leave "
            "train.stages out or choose a model.image.kind"
        )
    if stage.backbone and not model.backbone_trainable:
        raise ValueError(
            f"a stage lets backbone={stage.backbone:g} of the backbone learn, which "
            "model.image.trainable=false freezes for good; set that to true or backbone to 0"
        )
    # Any share above 0 is at least the topmost layer.
    num_learning = max(round(stage.backbone * len(layers)), 1) if stage.backbone else 0
    for i, layer in enumerate(layers):
        layer.trainable = i >= len(layers) - num_learning


def learning_rates(model: FusionModel, stage: StageSpec) -> dict[str, float]:
    """Return by path what multiplies the learning rate of the backbone's variables that learn.

    That of a layer is backbone_rate × layer_decay^depth, where depth is 0 at the backbone's top, 1
    at its bottom, and equal steps between its layers. Variables whose factor is 1 are left out.

    Args:
        model: after `apply_stage`.
        stage: the same stage.
    """
    layers = model.backbone_layers()
    factors = {}
    for i, layer in enumerate(reversed(layers)):
        factor = stage.backbone_rate * stage.layer_decay ** (i / max(len(layers) - 1, 1))
        if factor != 1.0:
            factors |= {v.path: factor for v in layer.trainable_variables}
    return factors
