import keras
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import mm_model
from mm_model.branches import IMAGE_BRANCHES
from mm_model.branches.image_application import make_backbone
from mm_model.fusion import FUSIONS
from mm_model.layers import Blocks
from mm_model.model import build_model
from mm_model.spec import NO_AUGMENTATION, FusionSpec, ImageSpec, ModelSpec, NumericSpec
from mm_model.statistics import Vocabulary

SMALLEST_OF_EACH_FAMILY = {
    "tiny": 16,
    "efficientnet_b0": 32,
    "efficientnet_v2_b0": 32,
    "mobilenet_v3_small": 32,
    "convnext_tiny": 32,
    "resnet50": 32,
}
UNTRAINED = {"image": {"kind": "tiny", "weights": None}}
NO_CHANCE = {
    **UNTRAINED,
    "augmentation": NO_AUGMENTATION.model_dump(),
    "dropout": 0,
    "fusion": {"modality_dropout": 0},
}
COLOUR = Vocabulary(column="colour", words=("blue", "green", "red"))


def rows(
    count: int = 16, size: int = 16, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(count, 3)) * [1, 10, 100]
    y = (numbers[:, 0] > 0).astype(int)
    y[:2] = 0, 1
    numbers[rng.random(numbers.shape) < 0.1] = np.nan
    return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), numbers, y


def rows_of_everything(
    count: int = 16, num_images: int = 3, size: int = 16
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs by name, several images a row among them, some of which are missing."""
    rng = np.random.default_rng(7)
    _, numbers, y = rows(count)
    image = rng.integers(0, 256, (count, num_images, size, size, 3), dtype=np.uint8)
    mask = (rng.random((count, num_images)) < 0.6).astype(np.float32)
    mask[np.arange(count), rng.integers(0, num_images, count)] = 1
    category = rng.integers(0, COLOUR.num_codes, (count, 1)).astype(np.int32)
    return {"image": image, "image_mask": mask, "numeric": numbers, "category": category}, y


def told_apart(model: mm_model.FusionModel) -> mm_model.FusionModel:
    """Give heads that start at zero weights by which different features give different logits."""
    rng = np.random.default_rng(3)
    for name in model.heads:
        head = model.network.get_layer(f"{name}_head")
        head.set_weights([rng.normal(size=w.shape) for w in head.get_weights()])
    return model


@pytest.mark.timeout(900)
def test_the_documented_call_trains_efficientnet_b5_on_plain_arrays():
    image, numbers, y = rows(16, size=32)
    image_val, numbers_val, y_val = rows(8, size=32, seed=1)
    class_weight = mm_model.balanced_class_weight(y)
    model = mm_model.create_model(
        (32, 32, 3), (3,), mm_model.fit_numeric_statistics(numbers), image={"weights": None}
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
    assert model.network.get_layer("efficientnet_b5").count_params() > 28_000_000
    assert np.isfinite(history.history["val_loss"]).all()
    assert model.predict([image, numbers], verbose=0).shape == (16, 1)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kind", SMALLEST_OF_EACH_FAMILY)
def test_every_family_and_fusion_builds_steps_saves_and_reloads(kind, fusion, tmp_path):
    if kind != "tiny" and fusion != "skip_concat":
        pytest.skip("each fusion sees the tiny branch; the other families see one fusion")
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


@pytest.mark.parametrize("kind", SMALLEST_OF_EACH_FAMILY)
def test_every_family_takes_several_images_and_categories(kind, tmp_path):
    size = SMALLEST_OF_EACH_FAMILY[kind]
    inputs, y = rows_of_everything(4, num_images=2, size=size)
    spec = ModelSpec(
        image=ImageSpec(kind=kind, weights=None, units=8),
        numeric=NumericSpec(units=(8,)),
        fusion=FusionSpec(units=8),
    )
    statistics = mm_model.fit_numeric_statistics(inputs["numeric"])
    model = build_model(spec, statistics, (2, size, size, 3), vocabularies=[COLOUR])
    assert model.input_names == ["image", "image_mask", "numeric", "category"]
    model.compile("adam", "binary_crossentropy", run_eagerly=True)
    assert np.isfinite(model.train_on_batch(inputs, y))
    # The heads start at zero, so that the second step is the first that moves what is below them.
    entries = np.asarray(model.network.get_layer("category_embedding").entries[0])
    top = model.network.get_layer("image_top_dense").get_weights()[0]
    assert np.isfinite(model.train_on_batch(inputs, y))
    assert np.abs(model.network.get_layer("image_top_dense").get_weights()[0] - top).max() > 0
    moved = np.asarray(model.network.get_layer("category_embedding").entries[0]) - entries
    assert np.abs(moved).max() > 0
    expected = np.asarray(model(inputs))
    model.save(tmp_path / "model.keras")
    again = mm_model.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.asarray(again(inputs)), expected)
    assert again.network.get_layer("category_embedding").vocabularies == (COLOUR,)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_neither_a_missing_image_nor_the_order_of_the_images_changes_a_logit(fusion):
    keras.utils.set_random_seed(0)
    inputs, _ = rows_of_everything()
    model = mm_model.create_model(
        (3, 16, 16, 3),
        (3,),
        mm_model.fit_numeric_statistics(inputs["numeric"]),
        vocabularies=[COLOUR],
        **UNTRAINED,
        fusion={"kind": fusion},
    )
    told_apart(model)
    expected = np.asarray(model.head_logits(inputs))
    image, mask = inputs["image"], inputs["image_mask"]
    other = np.where(mask[:, :, None, None, None] > 0, image, 255 - image)
    assert (other != image).any()
    np.testing.assert_array_equal(
        np.asarray(model.head_logits({**inputs, "image": other})), expected
    )
    order = np.array([2, 0, 1])
    turned = {**inputs, "image": image[:, order], "image_mask": mask[:, order]}
    np.testing.assert_allclose(np.asarray(model.head_logits(turned)), expected, atol=1e-4)
    present = np.where(mask[:, :, None, None, None] > 0, 255 - image, image)
    changed = np.asarray(model.head_logits({**inputs, "image": present}))
    assert (changed != expected).any(axis=1).all()


def test_a_row_of_equal_images_has_the_probability_of_one_image_by_the_same_weights():
    image, numbers, _ = rows()
    statistics = mm_model.fit_numeric_statistics(numbers)
    one = told_apart(mm_model.create_model((16, 16, 3), (3,), statistics, **UNTRAINED))
    three = mm_model.create_model((3, 16, 16, 3), (3,), statistics, **UNTRAINED)
    for layer in one.network.layers:
        three.network.get_layer(layer.name).set_weights(layer.get_weights())
    expected = np.asarray(one([image, numbers]))
    got = np.asarray(three([np.stack([image] * 3, axis=1), numbers]))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert expected.std() > 0


def test_missing_images_do_not_move_the_statistics_of_batch_norm():
    inputs, _ = rows_of_everything(count=2, num_images=2)
    photo, numbers = inputs["image"][:, :1], np.zeros((2, 3))

    def moved_by(second: np.ndarray, mask: list[float]) -> list[np.ndarray]:
        keras.utils.set_random_seed(0)
        model = mm_model.create_model((2, 16, 16, 3), (3,), **NO_CHANCE)
        image = np.concatenate([photo, second], axis=1)
        given = {"image": image, "image_mask": np.array([mask] * 2), "numeric": numbers}
        model(given, training=True)
        return [np.asarray(v) for v in model.non_trainable_variables if "moving" in v.path]

    twice = moved_by(photo, [1, 1])
    for a, b in zip(twice, moved_by(np.zeros_like(photo), [1, 0]), strict=True):
        np.testing.assert_array_equal(a, b)
    black = moved_by(np.zeros_like(photo), [1, 1])
    assert any((a != b).any() for a, b in zip(twice, black, strict=True))


def test_without_a_mask_all_images_are_there():
    inputs, y = rows_of_everything()
    model = mm_model.create_model(
        (3, 16, 16, 3),
        (3,),
        mm_model.fit_numeric_statistics(inputs["numeric"]),
        vocabularies=[COLOUR],
        **UNTRAINED,
    )
    told_apart(model)
    as_list = [inputs["image"], inputs["numeric"], inputs["category"]]
    as_dict = {name: inputs[name] for name in ("category", "image", "numeric")}
    model.fit(as_list, y, validation_data=(as_dict, y), epochs=1, verbose=0)
    expected = np.asarray(model({**inputs, "image_mask": np.ones((16, 3))}))
    np.testing.assert_array_equal(np.asarray(model(as_list)), expected)
    np.testing.assert_array_equal(np.asarray(model(as_dict)), expected)
    np.testing.assert_allclose(model.predict(as_dict, verbose=0), expected, rtol=1e-4)
    assert (np.asarray(model(inputs)) != expected).any()


def test_each_image_of_a_row_is_augmented_by_draws_of_its_own():
    image, _, _ = rows(count=2)
    model = mm_model.create_model((3, 16, 16, 3), (3,), **UNTRAINED)
    network = model.network
    augmented = keras.Model(
        [network.input["image"], network.input["image_mask"]],
        network.get_layer("augment_brightness").output,
    )
    same = [np.stack([image] * 3, axis=1).astype("float32"), np.ones((2, 3), "float32")]
    seen = np.asarray(augmented(same, training=True)).reshape(2, 3, -1)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(seen[:, a] - seen[:, b]).mean(axis=1) > 1).all()


def test_a_model_of_one_image_and_numbers_alone_has_no_layer_for_more():
    spec = ModelSpec(
        image=ImageSpec(kind="tiny", weights=None),
        augmentation=NO_AUGMENTATION,
        numeric=NumericSpec(units=(8,)),
        fusion=FusionSpec(kind="skip_concat"),
    )
    statistics = mm_model.fit_numeric_statistics(rows()[1])
    model = build_model(spec, statistics, (16, 16, 3))
    dense = ("dense", "bn", "relu", "dropout")
    skipped = (*dense, "skip", "add")
    assert {layer.name for layer in model.network.layers} == {
        "image",
        "image_range",
        *(f"image_conv{i}{end}" for i in range(3) for end in ("", "_bn", "_relu")),
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


def test_categories_without_numbers_are_enough_for_the_numeric_branch():
    inputs, y = rows_of_everything()
    empty = mm_model.fit_numeric_statistics(np.empty((16, 0)))
    for statistics, shape in ((None, (0,)), (None, None), (empty, (0,))):
        spec = ModelSpec.model_validate({"image": {"kind": "none", "weights": None}})
        model = build_model(spec, statistics, (16, 16, 3), shape, [COLOUR])
        assert model.input_names == ["category"]
        assert model.heads == ["numeric"]
        model.compile("adam", "binary_crossentropy")
        model.fit({"category": inputs["category"]}, y, epochs=1, verbose=0)
        by_place = np.asarray(model([inputs["image"], inputs["numeric"], inputs["category"]]))
        np.testing.assert_array_equal(by_place, np.asarray(model(inputs["category"])))


def test_without_a_numeric_branch_categories_are_left_out_too():
    inputs, _ = rows_of_everything(num_images=1)
    spec = ModelSpec.model_validate({**UNTRAINED, "numeric": {"kind": "none"}})
    model = build_model(spec, None, (16, 16, 3), vocabularies=[COLOUR])
    assert model.input_names == ["image"]
    image = inputs["image"][:, 0]
    expected = np.asarray(model({"image": image}))
    np.testing.assert_array_equal(
        np.asarray(model([image, inputs["numeric"], inputs["category"]])), expected
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x: [x["image"], x["numeric"]], r"takes \['image', 'numeric', 'category'\]; got 2"),
        (lambda x: [x["image"]] * 4, r"takes \['image', 'numeric', 'category'\]; got 4"),
        (
            lambda x: {"image": x["image"], "numeric": x["numeric"]},
            r"\['category'\] missing from \['image', 'numeric', 'image_mask'\]",
        ),
    ],
)
def test_inputs_that_are_not_there_are_named(given, message):
    inputs, _ = rows_of_everything()
    model = mm_model.create_model((3, 16, 16, 3), (3,), vocabularies=[COLOUR], **UNTRAINED)
    with pytest.raises(ValueError, match=message):
        model(given(inputs))


def test_a_model_learns_what_a_category_alone_says_and_doubts_where_it_says_nothing():
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    words = rng.choice(list("abcdefgh"), 1024)
    y = np.isin(words, ("a", "b")).astype(int)
    numbers = rng.normal(size=(1024, 2))
    letter = mm_model.fit_vocabulary(words, "letter")
    model = mm_model.create_model(
        (16, 16, 3),
        (2,),
        mm_model.fit_numeric_statistics(numbers),
        vocabularies=[letter],
        learning_rate=3e-3,
        image={"kind": "none", "weights": None},
        numeric={"category_dropout": 0.2},
    )
    model.fit([numbers, letter.codes(words)[:, None]], y, epochs=15, batch_size=32, verbose=0)

    def mean_probability(code: int) -> float:
        # Of numbers that training has not seen.
        unseen = rng.normal(size=(64, 2))
        return float(model.predict([unseen, np.full((64, 1), code)], verbose=0).mean())

    for word in letter.words:
        p = mean_probability(int(letter.codes([word])[0]))
        assert p > 0.9 if word in "ab" else p < 0.1, word
    # Training has neither a missing nor an unknown word, nor a code beyond the vocabulary; the
    # loss is that of a guess for all words alike, of which a quarter is positive.
    for code in (Vocabulary.MISSING, Vocabulary.UNKNOWN, 99, -5):
        p = mean_probability(code)
        assert -0.25 * np.log(p) - 0.75 * np.log(1 - p) < 0.65, p


def test_a_model_learns_from_the_one_image_of_several_that_decides():
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    y = rng.integers(0, 2, 384)
    image = rng.integers(0, 120, (384, 3, 16, 16, 3))
    # In a third of the rows each, the first, second or last image is the bright one.
    image[np.arange(384), rng.integers(0, 3, 384)] += 100 * y[:, None, None, None]
    model = mm_model.create_model(
        (3, 16, 16, 3), (1,), **{**NO_CHANCE, "numeric": {"kind": "none"}}, learning_rate=3e-3
    )
    train, test = slice(256), slice(256, None)
    model.fit([image[train]], y[train], epochs=6, batch_size=32, verbose=0)
    p = model.predict([image[test]], verbose=0)[:, 0]
    assert roc_auc_score(y[test], p) > 0.99


def test_a_foreign_branch_and_fusion_need_an_entry_in_the_dicts_alone(monkeypatch):
    def mean_colour(image, kind, spec, blocks: Blocks):
        pooled = keras.layers.GlobalAveragePooling2D()(image)
        return {"pooled": pooled, "tokens": keras.layers.Reshape((1, 3))(pooled)}

    def add(image, numeric, spec, blocks: Blocks):
        kernels = [blocks.kernel(b["pooled"], 4, n) for b, n in ((image, "a"), (numeric, "b"))]
        return keras.layers.Add()(kernels)

    monkeypatch.setitem(IMAGE_BRANCHES, "mean_colour", mean_colour)
    monkeypatch.setitem(FUSIONS, "add", add)
    model = mm_model.create_model(
        (16, 16, 3), (3,), image={"kind": "mean_colour", "weights": None}, fusion={"kind": "add"}
    )
    image, numbers, _ = rows()
    assert np.asarray(model([image, np.nan_to_num(numbers)])).shape == (16, 1)


def test_list_and_dict_inputs_and_any_number_type_give_the_same_probability():
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
def test_a_model_of_one_branch_takes_its_input_from_both(absent):
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
    model.fit([image, numbers], y, epochs=1, verbose=0)
    np.testing.assert_array_equal(np.asarray(model([image, numbers])), np.asarray(model(present)))


def test_missing_numbers_do_not_make_the_probability_missing():
    image, numbers, _ = rows()
    model = mm_model.create_model(
        (16, 16, 3), (3,), mm_model.fit_numeric_statistics(numbers), **UNTRAINED
    )
    assert np.isfinite(np.asarray(model([image, np.full_like(numbers, np.nan)]))).all()


def test_no_layer_with_a_bias_stands_before_a_batch_norm():
    spec = ModelSpec(image=ImageSpec(kind="tiny", weights=None))
    for fusion in FUSIONS:
        spec = spec.model_copy(update={"fusion": FusionSpec(kind=fusion)})
        network = build_model(spec, None, (16, 16, 3), (3,)).network
        norms = [x for x in network.layers if isinstance(x, keras.layers.BatchNormalization)]
        assert norms
        for norm in norms:
            before = norm.input._keras_history.operation
            assert not getattr(before, "use_bias", False), before.name


def test_the_loss_is_main_plus_heads_plus_penalty():
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
    augmented = keras.Model(network.input["image"], network.get_layer("augment_brightness").output)
    same = np.asarray(augmented(image.astype("float32"), training=False))
    np.testing.assert_array_equal(same, image.astype("float32"))
    changed = np.asarray(augmented(image.astype("float32"), training=True))
    assert np.abs(changed - image).mean() > 1
    assert changed.min() >= 0
    assert changed.max() <= 255


@pytest.mark.parametrize("kind", [k for k in SMALLEST_OF_EACH_FAMILY if k != "tiny"])
def test_every_backbone_sees_the_range_that_it_was_trained_on(kind):
    """The first convolution's input, for black and white, as each family's papers have it."""
    model = mm_model.create_model((32, 32, 3), (3,), image={"kind": kind, "weights": None})
    backbone = model.network.get_layer(kind)
    first = next(
        x
        for x in backbone.layers
        if isinstance(x, keras.layers.Conv2D | keras.layers.DepthwiseConv2D)
    )
    # ConvNeXt's first convolution is inside a block; its preprocessing stands right before.
    probe = backbone.layers[1].output if kind == "convnext_tiny" else first.input
    seen = keras.Model(backbone.input, probe)
    pixels = np.stack([np.zeros((32, 32, 3)), np.full((32, 32, 3), 255)]).astype("float32")
    if kind == "resnet50":
        pixels = np.asarray(model.network.get_layer("image_range")(pixels))
    inner = np.asarray(seen(pixels))[:, 10:20, 10:20]
    low, high = inner[0].mean((0, 1)), inner[1].mean((0, 1))
    expected = {
        "efficientnet_b0": ([0] * 3, [1] * 3),
        "efficientnet_v2_b0": (
            -np.divide([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            np.divide(np.subtract(1, [0.485, 0.456, 0.406]), [0.229, 0.224, 0.225]),
        ),
        "mobilenet_v3_small": ([-1] * 3, [1] * 3),
        "convnext_tiny": (
            -np.divide([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            np.divide(np.subtract(1, [0.485, 0.456, 0.406]), [0.229, 0.224, 0.225]),
        ),
        "resnet50": ([-103.939, -116.779, -123.68], [151.061, 138.221, 131.32]),
    }[kind]
    np.testing.assert_allclose(low, expected[0], atol=1e-2)
    np.testing.assert_allclose(high, expected[1], atol=1e-2)


def test_a_local_efficientnet_file_gets_the_scale_that_imagenet_weights_get(tmp_path):
    backbone = keras.applications.EfficientNetB0(
        include_top=False, weights=None, input_shape=(32, 32, 3)
    )
    normalization = next(x for x in backbone.layers if isinstance(x, keras.layers.Normalization))
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    normalization.adapt_mean.assign(mean)
    normalization.adapt_variance.assign(deviation)  # as the files of keras.applications have it
    path = tmp_path / "b0.weights.h5"
    backbone.save_weights(path)
    for uri in (str(path), path.as_uri()):
        loaded = make_backbone("efficientnet_b0", (32, 32, 3), uri, synchronized=False)
        inside = next(x for x in loaded.layers if isinstance(x, keras.layers.Normalization))
        seen = np.asarray(keras.Model(loaded.input, inside.output)(np.full((1, 32, 32, 3), 255.0)))
        np.testing.assert_allclose(
            seen[0, 0, 0], np.divide(np.subtract(1, mean), deviation), rtol=1e-4
        )


def test_weights_of_a_file_are_the_ones_that_were_saved(tmp_path):
    first = make_backbone("mobilenet_v3_small", (32, 32, 3), None, synchronized=False)
    first.save_weights(tmp_path / "w.weights.h5")
    for synchronized in (False, True):
        again = make_backbone(
            "mobilenet_v3_small", (32, 32, 3), str(tmp_path / "w.weights.h5"), synchronized
        )
        for a, b in zip(first.get_weights(), again.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    norms = [x for x in again.layers if isinstance(x, keras.layers.BatchNormalization)]
    assert norms
    assert all(norm.synchronized for norm in norms)


def test_a_failed_download_names_the_other_ways(monkeypatch):
    def offline(**_):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.applications, "EfficientNetB0", offline)
    with pytest.raises(
        OSError, match=r"could not be downloaded.*to a file that you have, or to none"
    ):
        make_backbone("efficientnet_b0", (32, 32, 3), "imagenet", synchronized=False)


def test_a_weights_file_that_is_not_there_names_the_other_ways():
    with pytest.raises(OSError, match=r"no file nowhere\.h5.*imagenet, or to none"):
        make_backbone("efficientnet_b0", (32, 32, 3), "nowhere.h5", synchronized=False)


@pytest.mark.parametrize(
    ("shape_image", "shape_numeric", "message"),
    [
        ((16, 16), (3,), r"images are \(height, width, 3\)"),
        ((2, 16, 16, 1), (3,), r"several a row \(images, height, width, 3\), got .*\(2, 16, 16, 1"),
        ((0, 16, 16, 3), (3,), r"got shape \(0, 16, 16, 3\)"),
        ((16, 16, 3), (), r"numbers are \(columns,\)"),
        ((16, 16, 3), (4,), r"does not fit the statistics' 3 columns"),
    ],
)
def test_a_wrong_shape_names_itself(shape_image, shape_numeric, message):
    statistics = mm_model.fit_numeric_statistics(rows()[1])
    with pytest.raises(ValueError, match=message):
        mm_model.create_model(shape_image, shape_numeric, statistics, **UNTRAINED)


@pytest.mark.parametrize("shape", [None, (0,)])
def test_a_numeric_branch_without_numbers_and_categories_says_what_to_set(shape):
    with pytest.raises(
        ValueError, match=r"no numbers and no categories.*model\.numeric\.kind=none"
    ):
        build_model(ModelSpec.model_validate(UNTRAINED), None, (16, 16, 3), shape)


def test_a_wrong_option_names_the_nearest_one():
    with pytest.raises(ValueError, match=r"'tiney' is no image branch; did you mean 'tiny'"):
        mm_model.create_model((16, 16, 3), (3,), image={"kind": "tiney", "weights": None})


def test_a_file_of_another_model_is_refused(tmp_path):
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    other.save(tmp_path / "other.keras")
    with pytest.raises(ValueError, match="no FusionModel"):
        mm_model.load_model(tmp_path / "other.keras")
