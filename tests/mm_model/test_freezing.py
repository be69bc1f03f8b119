import keras
import numpy as np
import pytest

import mm_model
from mm_model.freezing import NO_STAGES, apply_stage, learning_rates, stage_of
from mm_model.model import build_model
from mm_model.spec import ModelSpec, StageSpec
from tests.mm_model.examples import UNTRAINED, rows, rows_of_everything

TINY = [f"image_conv{i}{end}" for i in range(3) for end in ("", "_bn")]
SIZE = {"tiny": 16, "mobilenet_v3_small": 32, "efficientnet_b0": 32}


def stage(**settings) -> StageSpec:
    return StageSpec(epochs=1, **settings)


def compiled(kind: str = "tiny", **image) -> mm_model.FusionModel:
    size = SIZE[kind]
    options = {**UNTRAINED, "image": {"kind": kind, "weights": None, **image}}
    model = build_model(ModelSpec.model_validate(options), None, (size, size, 3), (3,))
    optimizer = keras.optimizers.SGD(0.1)
    model.compile(optimizer, "binary_crossentropy", run_eagerly=True)
    # Heads that start at 0 pass no gradient on.
    for name in model.heads:
        head = model.network.get_layer(f"{name}_head")
        head.kernel.assign(np.random.default_rng(0).normal(size=head.kernel.shape))
    return model


def moved_by_a_step(model: mm_model.FusionModel) -> set[str]:
    """Names of the backbone's layers of which any variable moves in a training step."""
    size = model.network.input["image"].shape[1]
    image, numbers, y = rows(8, size=size)
    before = {x.name: [np.array(w) for w in x.weights] for x in model.backbone_layers()}
    model.train_on_batch([image, np.nan_to_num(numbers)], y)
    return {
        x.name
        for x in model.backbone_layers()
        if any((np.asarray(w) != b).any() for w, b in zip(x.weights, before[x.name], strict=True))
    }


def test_an_epoch_belongs_to_the_stage_that_it_falls_into_and_the_last_one_goes_on():
    first, second = StageSpec(epochs=2, backbone=0), StageSpec(epochs=3)
    found = [stage_of((first, second), epoch) for epoch in range(8)]
    assert found == [first] * 2 + [second] * 6
    assert stage_of((), 5) == NO_STAGES
    assert StageSpec(epochs=1) != NO_STAGES


@pytest.mark.parametrize("kind", SIZE)
def test_the_backbone_is_its_layers_bottom_to_top(kind):
    model = compiled(kind)
    names = [layer.name for layer in model.backbone_layers()]
    if kind == "tiny":
        assert names == TINY
    else:
        nested = model.network.get_layer(kind)
        learnt = {v.path for x in model.backbone_layers() for v in x.trainable_variables}
        assert learnt == {v.path for v in nested.trainable_variables}
        first = "stem_conv" if kind == "efficientnet_b0" else "conv"
        last = "top_bn" if kind == "efficientnet_b0" else "conv_1_bn"
        assert (names[0], names[-1]) == (first, last)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "kind",
    ["tiny", "mobilenet_v3_small", pytest.param("efficientnet_b0", marks=pytest.mark.slow)],
)
def test_layers_learn_from_the_top_and_frozen_ones_keep_their_statistics(kind):
    model = compiled(kind)
    model.optimizer.build(model.trainable_variables)
    everything = [layer.name for layer in model.backbone_layers()]
    count = len(everything)
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
        moved = moved_by_a_step(model)
        assert moved <= set(trained)
        # A layer before a ReLU that is dead for all rows may stand still.
        assert len(moved) >= 0.8 * learning
    apply_stage(model, NO_STAGES)
    assert [x.name for x in model.backbone_layers() if x.trainable] == trained


def test_what_is_above_the_backbone_learns_in_every_stage():
    model = compiled()
    apply_stage(model, stage(backbone=0))
    top = model.network.get_layer("image_top_dense").kernel
    before = np.array(top)
    assert moved_by_a_step(model) == set()
    assert (np.asarray(top) != before).any()


@pytest.mark.parametrize("kind", ["tiny", "mobilenet_v3_small"])
def test_a_backbone_that_was_built_frozen_stays_frozen(kind):
    model = compiled(kind, trainable=False)
    assert not model.backbone_trainable
    for each in (NO_STAGES, stage(backbone=0)):
        apply_stage(model, each)
        assert moved_by_a_step(model) == set()
    with pytest.raises(ValueError, match=r"backbone=0\.5 .*model\.image\.trainable=false"):
        apply_stage(model, stage(backbone=0.5))


def test_stages_of_a_model_without_images_are_refused():
    options = {"image": {"kind": "none", "weights": None}}
    model = build_model(ModelSpec.model_validate(options), None, (16, 16, 3), (3,))
    apply_stage(model, NO_STAGES)
    assert learning_rates(model, NO_STAGES) == {}
    with pytest.raises(ValueError, match=r"image backbone, and this model has none"):
        apply_stage(model, stage())


def test_the_rate_falls_from_the_top_of_the_backbone_to_its_bottom_in_equal_ratios():
    model = compiled()
    each = stage(backbone_rate=0.5, layer_decay=0.1)
    apply_stage(model, each)
    factors = learning_rates(model, each)
    assert set(factors) == {v.path for x in model.backbone_layers() for v in x.trainable_variables}
    for i, layer in enumerate(reversed(model.backbone_layers())):
        for v in layer.trainable_variables:
            assert factors[v.path] == pytest.approx(0.5 * 0.1 ** (i / 5))
    half = stage(backbone=0.5, backbone_rate=0.5, layer_decay=0.1)
    apply_stage(model, half)
    # A layer's depth is its place in the whole backbone, whichever part of it learns.
    assert learning_rates(model, half) == {
        path: factor for path, factor in factors.items() if factor > 0.5 * 0.1**0.5
    }
    apply_stage(model, stage())
    assert learning_rates(model, stage()) == {}


def test_a_model_of_several_images_has_the_same_backbone_and_keeps_it_when_loaded(tmp_path):
    inputs, _ = rows_of_everything()
    model = build_model(ModelSpec.model_validate(UNTRAINED), None, (3, 16, 16, 3), (3,))
    assert [layer.name for layer in model.backbone_layers()] == TINY
    model.save(tmp_path / "model.keras")
    again = mm_model.load_model(tmp_path / "model.keras")
    assert [layer.name for layer in again.backbone_layers()] == TINY
    np.testing.assert_array_equal(np.asarray(again(inputs)), np.asarray(model(inputs)))
