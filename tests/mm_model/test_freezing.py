import keras
import numpy as np
import pytest

import mm_model
from mm_model.freezing import NO_STAGES, apply_stage, learning_rate_factors, stage_of
from mm_model.model import build_model
from mm_model.spec import ModelSpec, StageSpec
from tests.mm_model.examples import SMALLEST_OF_EACH_FAMILY, UNTRAINED, rows, with_random_heads

ENDS = {
    "tiny": ("image_conv0", "image_conv2_bn"),
    "mobilenet_v3_small": ("conv", "conv_1_bn"),
    "efficientnet_b0": ("stem_conv", "top_bn"),
}
"""Lowest and topmost layer of backbones that can train."""


def stage(**settings) -> StageSpec:
    return StageSpec(epochs=1, **settings)


def compiled(kind: str = "tiny", **image) -> mm_model.FusionModel:
    size = SMALLEST_OF_EACH_FAMILY[kind]
    options = {**UNTRAINED, "image": {"kind": kind, "weights": None, **image}}
    model = build_model(ModelSpec.model_validate(options), None, (size, size, 3), (3,))
    model.compile(keras.optimizers.SGD(0.1), "binary_crossentropy", run_eagerly=True)
    # Heads with zero weights propagate no gradient.
    return with_random_heads(model)


def changed_by_a_step(model: mm_model.FusionModel) -> set[str]:
    """Names of the backbone's layers that a training step changes."""
    size = model.network.input["image"].shape[1]
    image, numbers, y = rows(8, size=size)
    before = {x.name: [np.array(w) for w in x.weights] for x in model.backbone_layers()}
    model.train_on_batch([image, np.nan_to_num(numbers)], y)
    return {
        x.name
        for x in model.backbone_layers()
        if any((np.asarray(w) != b).any() for w, b in zip(x.weights, before[x.name], strict=True))
    }


def test_each_epoch_has_a_stage_and_the_last_stage_lasts_to_the_end():
    first, second = StageSpec(epochs=2, backbone=0), StageSpec(epochs=3)
    found = [stage_of((first, second), epoch) for epoch in range(8)]
    assert found == [first] * 2 + [second] * 6
    assert stage_of((), 5) == NO_STAGES
    assert StageSpec(epochs=1) != NO_STAGES


@pytest.mark.parametrize(
    "kind",
    ["tiny", "mobilenet_v3_small", pytest.param("efficientnet_b0", marks=pytest.mark.slow)],
)
def test_layers_unfreeze_from_the_top_and_frozen_ones_keep_their_statistics(kind):
    model = compiled(kind)
    model.optimizer.build(model.trainable_variables)
    everything = [layer.name for layer in model.backbone_layers()]
    assert (everything[0], everything[-1]) == ENDS[kind]
    count = len(set(everything))
    assert count == len(everything)
    whole = [model.network.get_layer(name).trainable_variables for name in model.backbone]
    leaves = [layer.trainable_variables for layer in model.backbone_layers()]
    assert {v.path for x in whole for v in x} == {v.path for x in leaves for v in x}
    for share, learning in ((0, 0), (0.5, round(count / 2)), (1, count), (0, 0), (1e-9, 1)):
        apply_stage(model, stage(backbone=share))
        names = [layer.name for layer in model.backbone_layers()]
        assert names == everything
        trained = [layer.name for layer in model.backbone_layers() if layer.trainable]
        assert trained == everything[count - learning :]
        in_model = {v.path for v in model.trainable_variables}
        for layer in model.backbone_layers():
            own = {v.path for v in layer.weights if "moving" not in v.path}
            assert (own <= in_model) == (layer.name in trained)
            assert own & in_model in (own, set())
        top = model.network.get_layer("image_top_dense").kernel
        before = np.array(top)
        changed = changed_by_a_step(model)
        assert changed <= set(trained)
        # The layers above the backbone train in every stage.
        assert (np.asarray(top) != before).any()
        # A layer before a ReLU that is inactive for all rows does not change.
        assert len(changed) >= 0.8 * learning
    apply_stage(model, NO_STAGES)
    assert [x.name for x in model.backbone_layers() if x.trainable] == trained


@pytest.mark.parametrize("kind", ["tiny", "mobilenet_v3_small"])
def test_a_backbone_that_was_built_frozen_stays_frozen(kind):
    model = compiled(kind, trainable=False)
    assert not model.backbone_trainable
    for each in (NO_STAGES, stage(backbone=0)):
        apply_stage(model, each)
        assert changed_by_a_step(model) == set()
    with pytest.raises(ValueError, match=r"backbone=0\.5 .*model\.image\.trainable=false"):
        apply_stage(model, stage(backbone=0.5))


def test_stages_of_a_model_without_images_are_rejected():
    options = {"image": {"kind": "none", "weights": None}}
    model = build_model(ModelSpec.model_validate(options), None, (16, 16, 3), (3,))
    apply_stage(model, NO_STAGES)
    assert learning_rate_factors(model, NO_STAGES) == {}
    with pytest.raises(ValueError, match=r"layers of a backbone, but this model has none"):
        apply_stage(model, stage())


def test_the_learning_rate_falls_from_the_top_of_the_backbone_in_equal_ratios():
    model = compiled()
    each = stage(backbone_rate=0.5, layer_decay=0.1)
    apply_stage(model, each)
    factors = learning_rate_factors(model, each)
    trained = {id(v) for v in model.trainable_variables}
    assert set(factors) <= trained
    layers = model.backbone_layers()
    assert set(factors) == {id(v) for layer in layers for v in layer.trainable_variables}
    for i, layer in enumerate(reversed(model.backbone_layers())):
        for v in layer.trainable_variables:
            assert factors[id(v)] == pytest.approx(0.5 * 0.1 ** (i / 5))
    half = stage(backbone=0.5, backbone_rate=0.5, layer_decay=0.1)
    apply_stage(model, half)
    # The depth of a layer does not depend on the part of the backbone that trains.
    assert learning_rate_factors(model, half) == {
        key: factor for key, factor in factors.items() if factor > 0.5 * 0.1**0.5
    }
    apply_stage(model, stage())
    assert learning_rate_factors(model, stage()) == {}
