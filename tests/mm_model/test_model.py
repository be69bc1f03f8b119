import keras
import numpy as np
import pytest

import mm_model
from mm_model.branches import IMAGE_BRANCHES
from mm_model.fusion import FUSIONS
from mm_model.layers.blocks import BlockBuilder
from mm_model.model import build_model
from mm_model.spec import NO_AUGMENTATION, FusionSpec, ImageSpec, ModelSpec, NumericSpec
from tests.mm_model.examples import (
    SMALLEST_OF_EACH_FAMILY,
    UNTRAINED,
    rows,
)

# Its backbone is a nested model that contains layers of this project.
FAST = ("efficientnet_b0",)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "image_options",
    # Without options, the backbone is EfficientNetB5.
    [{"kind": "tiny"}, pytest.param({}, marks=pytest.mark.slow)],
)
def test_the_documented_call_trains_on_plain_arrays(image_options):
    image, numbers, y = rows(16, size=32)
    image_val, numbers_val, y_val = rows(8, size=32, seed=1)
    class_weight = mm_model.balanced_class_weight(y)
    model = mm_model.create_model(
        (32, 32, 3),
        (3,),
        mm_model.fit_numeric_statistics(numbers),
        image={"weights": None, **image_options},
    )
    history = model.fit(
        [image, numbers],
        y,
        validation_data=([image_val, numbers_val], y_val),
        epochs=1,
        batch_size=8,
        callbacks=mm_model.default_callbacks(),
        class_weight=class_weight,
        verbose=0,
    )
    if not image_options:
        assert model.network.get_layer("efficientnet_b5").count_params() > 28_000_000
    assert np.isfinite(history.history["val_loss"]).all()
    assert model.predict([image, numbers], verbose=0).shape == (16, 1)


# Tests all fusions with the tiny branch, and the other families with one fusion.
@pytest.mark.parametrize(
    ("kind", "fusion"),
    [
        *(("tiny", fusion) for fusion in FUSIONS),
        *(
            pytest.param(kind, "skip_concat", marks=() if kind in FAST else pytest.mark.slow)
            for kind in SMALLEST_OF_EACH_FAMILY
            if kind != "tiny"
        ),
    ],
)
def test_every_family_and_fusion_builds_steps_saves_and_reloads(kind, fusion, tmp_path):
    size = SMALLEST_OF_EACH_FAMILY[kind]
    image, numbers, y = rows(8, size=size)
    spec = ModelSpec(
        image=ImageSpec(kind=kind, weights=None, units=8),
        numeric=NumericSpec(units=(8, 8)),
        fusion=FusionSpec(kind=fusion, units=8),
    )
    model = build_model(spec, mm_model.fit_numeric_statistics(numbers), (size, size, 3))
    model.compile("adam", "binary_crossentropy", run_eagerly=True)
    before = model.network.get_layer("joint_head").get_weights()[0].copy()
    assert np.isfinite(model.train_on_batch([image, numbers], y))
    assert np.abs(model.network.get_layer("joint_head").get_weights()[0] - before).max() > 0
    expected = np.asarray(model({"image": image, "numeric": numbers}))
    model.save(tmp_path / "model.keras")
    again = np.asarray(mm_model.load_model(tmp_path / "model.keras")([image, numbers]))
    np.testing.assert_array_equal(again, expected)


def test_a_model_has_no_layers_for_inputs_that_it_lacks():
    spec = ModelSpec(
        image=ImageSpec(kind="tiny", weights=None),
        augmentation=NO_AUGMENTATION,
        numeric=NumericSpec(units=(8,)),
        fusion=FusionSpec(kind="skip_concat"),
    )
    statistics = mm_model.fit_numeric_statistics(rows()[1])
    model = build_model(spec, statistics, (16, 16, 3))
    dense = ("dense", "bn", "activation", "dropout")
    skipped = (*dense, "skip", "add")
    assert {layer.name for layer in model.network.layers} == {
        "image",
        "image_range",
        *(f"image_conv{i}{end}" for i in range(3) for end in ("", "_bn", "_activation")),
        "image_pool",
        *(f"image_top_{end}" for end in dense),
        "numeric",
        "numeric_encoding",
        *(f"numeric_0_{end}" for end in skipped),
        "modality_dropout",
        "fusion_concat",
        *(f"fusion_0_{end}" for end in skipped),
        *(f"fusion_1_{end}" for end in set(skipped) - {"skip"}),
        "image_head",
        "numeric_head",
        "joint_head",
        "heads",
    }


def test_a_custom_branch_and_fusion_need_only_an_entry_in_the_registries(monkeypatch):
    def mean_colour(image, spec, blocks: BlockBuilder):
        pooled = keras.layers.GlobalAveragePooling2D()(image)
        return {"pooled": pooled, "tokens": keras.layers.Reshape((1, 3))(pooled)}

    def add(image, numeric, spec, blocks: BlockBuilder):
        joint = [blocks.linear(b["pooled"], 4, n) for b, n in ((image, "a"), (numeric, "b"))]
        return keras.layers.Add()(joint)

    monkeypatch.setitem(IMAGE_BRANCHES, "mean_colour", mean_colour)
    monkeypatch.setitem(FUSIONS, "add", add)
    model = mm_model.create_model(
        (16, 16, 3), (3,), image={"kind": "mean_colour", "weights": None}, fusion={"kind": "add"}
    )
    image, numbers, _ = rows()
    assert np.asarray(model([image, np.nan_to_num(numbers)])).shape == (16, 1)


def test_list_and_dict_inputs_of_any_dtype_have_the_same_probability():
    image, numbers, _ = rows()
    model = mm_model.create_model(
        (16, 16, 3), (3,), mm_model.fit_numeric_statistics(numbers), **UNTRAINED
    )
    model.network.get_layer("joint_head").set_weights([np.ones((128, 1)), np.zeros(1)])
    by_list = np.asarray(model([image, numbers]))
    by_dict = np.asarray(
        model({"numeric": numbers.astype("float32"), "image": image.astype("float32")})
    )
    np.testing.assert_array_equal(by_list, by_dict)
    assert by_list.std() > 0


@pytest.mark.parametrize("absent", ["image", "numeric"])
def test_a_model_of_one_branch_ignores_the_input_of_the_other(absent):
    image, numbers, y = rows()
    options = {
        **UNTRAINED,
        **{absent: {"kind": "none", "weights": None} if absent == "image" else {"kind": "none"}},
    }
    model = mm_model.create_model(
        (16, 16, 3), (3,), mm_model.fit_numeric_statistics(numbers), **options
    )
    present = {"image": image, "numeric": numbers}
    del present[absent]
    assert model.input_names == list(present)
    assert model.heads == list(present)
    model.run_eagerly = True
    model.fit([image, numbers], y, epochs=1, verbose=0)
    np.testing.assert_array_equal(np.asarray(model([image, numbers])), np.asarray(model(present)))


def test_missing_numbers_yield_a_finite_probability():
    image, numbers, _ = rows()
    model = mm_model.create_model(
        (16, 16, 3), (3,), mm_model.fit_numeric_statistics(numbers), **UNTRAINED
    )
    assert np.isfinite(np.asarray(model([image, np.full_like(numbers, np.nan)]))).all()


def test_the_loss_is_the_sum_of_main_loss_heads_and_penalty():
    image, numbers, y = rows()
    spec = ModelSpec(
        image=ImageSpec(kind="tiny", weights=None),
        augmentation=NO_AUGMENTATION,
        fusion=FusionSpec(auxiliary_weight=0.5, modality_dropout=0),
        dropout=0,
    )
    model = build_model(spec, mm_model.fit_numeric_statistics(numbers), (16, 16, 3))
    model.compile(loss="binary_crossentropy")
    weight = np.linspace(0.5, 2, len(y))
    p = model([image, numbers], training=True)
    logits = np.asarray(p._head_logits, np.float64)

    def cross_entropy(z: np.ndarray) -> float:
        return float(np.mean(weight * (np.logaddexp(0, z) - y * z)))

    heads = sum(cross_entropy(logits[:, i]) for i in range(3))
    penalty = float(sum(np.asarray(loss) for loss in model.losses))
    expected = cross_entropy(logits.mean(axis=1)) + 0.5 * heads + penalty
    assert penalty > 0
    got = float(model.compute_loss(y=y, y_pred=p, sample_weight=weight))
    assert got == pytest.approx(expected, rel=1e-5)
    without_heads = float(model.compute_loss(y=y, y_pred=p, sample_weight=weight, training=False))
    assert without_heads == pytest.approx(expected - 0.5 * heads, rel=1e-5)


def test_augmentation_changes_training_and_never_inference():
    image, _, _ = rows()
    model = mm_model.create_model(
        (16, 16, 3),
        (3,),
        image={"kind": "tiny", "weights": None},
        dropout=0,
        fusion={"modality_dropout": 0},
    )
    network = model.network
    augmented = keras.Model(network.input["image"], network.get_layer("augment_colour").output)
    same = np.asarray(augmented(image.astype("float32"), training=False))
    np.testing.assert_array_equal(same, image.astype("float32"))
    changed = np.asarray(augmented(image.astype("float32"), training=True))
    assert np.abs(changed - image).mean() > 1
    assert changed.min() >= 0
    assert changed.max() <= 255


@pytest.mark.parametrize(
    ("shape_image", "shape_numeric", "message"),
    [
        ((16, 16), (3,), r"image shape \(16, 16\) is invalid; pass \(height, width, 3\)"),
        ((2, 16, 16, 1), (3,), r"\(2, 16, 16, 1\) .* or \(images, height, width, 3\)"),
        ((0, 16, 16, 3), (3,), r"shape \(0, 16, 16, 3\) is invalid"),
        ((16, 16, 3), (), r"numeric shape \(\) is invalid; pass \(columns,\)"),
        ((16, 16, 3), (4,), r"numeric shape \(4,\) does not match .* columns in the statistics, 3"),
    ],
)
def test_an_invalid_shape_is_rejected_with_its_value(shape_image, shape_numeric, message):
    statistics = mm_model.fit_numeric_statistics(rows()[1])
    with pytest.raises(ValueError, match=message):
        mm_model.create_model(shape_image, shape_numeric, statistics, **UNTRAINED)


@pytest.mark.parametrize("shape", [None, (0,)])
def test_a_numeric_branch_without_inputs_is_rejected(shape):
    with pytest.raises(
        ValueError, match=r"neither numbers nor categories.*model\.numeric\.kind=none"
    ):
        build_model(ModelSpec.model_validate(UNTRAINED), None, (16, 16, 3), shape)


def test_an_unknown_option_suggests_the_nearest_one():
    with pytest.raises(ValueError, match=r"unknown image branch 'tiney'; did you mean 'tiny'"):
        mm_model.create_model((16, 16, 3), (3,), image={"kind": "tiney", "weights": None})


def test_a_file_that_contains_code_is_rejected(tmp_path):
    inputs = keras.Input((1,))
    keras.Model(inputs, keras.layers.Lambda(lambda x: x + 1)(inputs)).save(tmp_path / "x.keras")
    with pytest.raises(ValueError, match="lambda"):
        mm_model.load_model(tmp_path / "x.keras")


def test_a_file_of_another_model_is_rejected(tmp_path):
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    other.save(tmp_path / "other.keras")
    with pytest.raises(ValueError, match="contains a Sequential, not a FusionModel"):
        mm_model.load_model(tmp_path / "other.keras")
