from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from mm_model import create_model
from mm_model.branches.image_inputs import IMAGE_TOKENS
from mm_model.mean_model import MeanModel
from mm_model.model_parts import ENCODED_COLUMNS, IMAGE_FEATURES, IMAGE_MAP, CutModel, column_names
from mm_model.statistics import fit_numeric_statistics, fit_vocabulary
from ray_jobs.explain.importance import (
    ModelRows,
    UpperPart,
    missing_modalities,
    partial_dependence,
    permutation_importance,
)
from ray_jobs.explain.row_maps import column_contributions, image_maps, map_similarity
from tests.mm_model.examples import with_random_heads

NUMBERS, WORDS = ("age", "size", "copy"), ("site",)
VOCABULARY = fit_vocabulary(["arm", "arm", "leg", "leg"], "site")
SIDE, SQUARE = 96, 32  # the square is a ninth of the image


def inputs_of(num_rows: int, several: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(num_rows, 3)).astype(np.float32)
    numbers[:, 2] = 3 * numbers[:, 1] + 1
    shape = (num_rows, *((2,) if several else ()), 32, 32, 3)
    inputs = {
        "image": rng.integers(0, 256, shape).astype(np.uint8),
        "numeric": numbers,
        "category": rng.integers(0, 4, (num_rows, 1)).astype(np.int32),
    }
    return inputs | ({"image_mask": np.ones((num_rows, 2), np.float32)} if several else {})


def model_of(inputs: dict[str, np.ndarray], fusion: str = "gated", **options):
    statistics = fit_numeric_statistics(inputs["numeric"], NUMBERS)
    image = {"kind": "tiny", "weights": None, "units": 8}
    model = create_model(
        inputs["image"].shape[1:], (3,), statistics, vocabularies=[VOCABULARY], image=image,
        numeric={"units": (8,)}, fusion={"kind": fusion, "units": 16, "layers": 1}, **options,
    )  # fmt: skip
    with_random_heads(model)
    return model


def model_rows(
    model, inputs: dict[str, np.ndarray], label_N: np.ndarray, codes: Any = ()
) -> ModelRows:
    cut = CutModel(model, IMAGE_FEATURES)
    tensors = {name: np.asarray(value) for name, value in cut.tensors(inputs).items()}
    return ModelRows(
        parts=[UpperPart(cut, tensors, codes)],
        inputs={name: values for name, values in inputs.items() if name != "image"},
        columns={"numeric": NUMBERS, "category": WORDS},
        label_N=label_N,
        weight_N=np.ones(len(label_N)),
    )


@pytest.mark.parametrize("several", [False, True], ids=["one image", "two images"])
@pytest.mark.parametrize("fusion", ["gated", "skip_concat", "cross_attention"])
def test_a_model_in_two_parts_gives_the_same_logits(fusion, several):
    inputs = inputs_of(6, several)
    model = model_of(inputs, fusion)
    expected = np.asarray(model.head_logits(inputs))
    for names in (IMAGE_FEATURES, (*IMAGE_FEATURES, *ENCODED_COLUMNS), (IMAGE_MAP,)):
        cut = CutModel(model, names)
        tensors = cut.tensors(inputs)
        np.testing.assert_array_equal(np.asarray(cut.logits(tensors, inputs)), expected)
        # Without cross-attention, the tokens have no effect.
        for name in set(cut.names) - ({IMAGE_TOKENS} if fusion != "cross_attention" else set()):
            changed = np.asarray(cut.logits({**tensors, name: 2 * tensors[name]}, inputs))
            assert np.abs(changed - expected).max() > 1e-4, name


@pytest.mark.parametrize("several", [False, True], ids=["one image", "two images"])
@pytest.mark.parametrize("mean", [False, True], ids=["one model", "mean of two"])
def test_importance_is_that_of_the_whole_model_on_permuted_inputs(several, mean):
    inputs = inputs_of(40, several)
    if several:
        inputs["image_mask"][::3, 1] = 0
    model: Any = model_of(inputs)
    label = np.random.default_rng(3).integers(0, 2, 40)
    rows = model_rows(model, inputs, label)
    if mean:
        other, codes = model_of(inputs), [[0, 1, 3, 2]]
        other_rows = model_rows(other, inputs, label, codes)
        rows = replace(rows, parts=[*rows.parts, *other_rows.parts])
        model = MeanModel([model, other], [[range(4)], codes])
    found = {tuple(entry["columns"]): entry for entry in permutation_importance(rows)}
    # The third number depends on the second.
    assert set(found) == {("age",), ("size", "copy"), ("site",), ("image",)}

    def loss(inputs) -> float:
        p = np.asarray(model(inputs), np.float64)[:, 0]
        return -np.log(np.where(label == 1, p, 1 - p)).mean()

    rng = np.random.default_rng(0)
    orders = [rng.permutation(40) for _ in range(5)]
    for names, columns in {("age",): [0], ("size", "copy"): [1, 2]}.items():
        increases = []
        for order in orders:
            numeric = inputs["numeric"].copy()
            numeric[:, columns] = numeric[order][:, columns]
            increases.append(loss({**inputs, "numeric": numeric}) - loss(inputs))
        assert found[names]["log_loss"] == pytest.approx(np.mean(increases), abs=1e-6)
    increases = [
        loss({**inputs, **{n: inputs[n][o] for n in inputs if n.startswith("image")}})
        - loss(inputs)
        for o in orders
    ]
    assert found[("image",)]["log_loss"] == pytest.approx(np.mean(increases), abs=1e-6)


def test_metrics_without_a_modality_are_those_of_rows_that_lack_it():
    inputs = inputs_of(40, several=True)
    model = model_of(inputs)
    label = np.random.default_rng(3).integers(0, 2, 40)
    rows = model_rows(model, inputs, label)
    (entry,) = missing_modalities(rows)
    assert entry["without"] == "numbers and words"
    optional = replace(rows, is_image_optional=True)
    without_image, without_columns = missing_modalities(optional)
    assert (without_image["without"], without_columns) == ("image", entry)
    empty = {"numeric": np.full((40, 3), np.nan, np.float32), "category": np.zeros((40, 1), int)}
    for found, changes in (
        (entry, empty),
        (without_image, {"image_mask": np.zeros((40, 2), np.float32)}),
    ):
        before, after = (np.asarray(model(x))[:, 0] for x in (inputs, {**inputs, **changes}))
        increase = metrics.log_loss(label, after) - metrics.log_loss(label, before)
        assert found["log_loss"] == pytest.approx(increase, abs=1e-5)
        decrease = metrics.roc_auc_score(label, before) - metrics.roc_auc_score(label, after)
        assert found["roc_auc"] == pytest.approx(decrease, abs=1e-6)
    alone = {name: inputs[name] for name in ("numeric", "category")}
    without_images = [replace(rows.parts[0], tensors={})]
    assert missing_modalities(replace(rows, parts=without_images, inputs=alone)) == []


def test_partial_dependence_is_the_mean_probability_at_each_value():
    inputs = inputs_of(30)
    model = model_of(inputs)
    rows = model_rows(model, inputs, np.arange(30) % 2)
    found = partial_dependence(rows, "age") or {}
    assert found["values"][0] == inputs["numeric"][:, 0].min()
    numeric = inputs["numeric"].copy()
    numeric[:, 0] = found["values"][4]
    expected = np.asarray(model({**inputs, "numeric": numeric})).mean()
    assert found["probability"][4] == pytest.approx(expected, abs=1e-6)
    words = partial_dependence(rows, "site", VOCABULARY.words) or {}
    assert words["values"] == ["missing", "unknown", "arm", "leg"]
    inputs["numeric"][:] = 1.0
    assert partial_dependence(model_rows(model, inputs, np.arange(30) % 2), "age") is None


def test_contributions_add_up_to_the_difference_from_an_average_row():
    inputs = inputs_of(8)
    model = model_of(inputs, activation="gelu")
    columns = column_names(model, NUMBERS, WORDS)
    tensors = CutModel(model, ENCODED_COLUMNS).tensors(inputs)
    average = {name: np.asarray(value).mean(axis=0) for name, value in tensors.items()}
    found = column_contributions(model, inputs, columns, average)
    assert [set(row) for row in found] == [{*NUMBERS, *WORDS}] * 8
    cut = CutModel(model, [*IMAGE_FEATURES, *ENCODED_COLUMNS])
    tensors = cut.tensors(inputs)
    at_average = {name: np.tile(value, (8, 1)) for name, value in average.items()}
    ends, starts = (
        np.asarray(cut.logit({**tensors, **changes}, inputs))[:, 0] for changes in ({}, at_average)
    )
    sums = [sum(row.values()) for row in found]
    np.testing.assert_allclose(sums, ends - starts, atol=0.01 * np.abs(ends - starts).max())


def squares(num_rows: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return images with a striped square in positive rows, labels, and the square's pixels."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 130, (num_rows, SIDE, SIDE, 3))
    is_inside = np.zeros((num_rows, SIDE, SIDE), bool)
    label = np.arange(num_rows) % 2
    for row in range(num_rows):
        top, left = rng.integers(0, SIDE - SQUARE + 1, 2)
        is_inside[row, top : top + SQUARE, left : left + SQUARE] = True
        if label[row]:
            image[row, top : top + SQUARE : 2, left : left + SQUARE] = 250
    return {"image": image.astype(np.uint8)}, label, is_inside


def mass_inside(maps: np.ndarray, is_inside: np.ndarray) -> float:
    """Return the mean fraction of the maps inside the squares."""
    scale = SIDE // maps.shape[1]
    large = maps.repeat(scale, axis=1).repeat(scale, axis=2)
    total = large.sum(axis=(1, 2))
    return float(np.mean((large * is_inside).sum(axis=(1, 2))[total > 0] / total[total > 0]))


@pytest.mark.parametrize(
    ("kind", "num_rows", "epochs", "learning_rate", "num_maps"),
    [
        ("tiny", 240, 16, 3e-3, 30),
        pytest.param("vit_tiny", 480, 8, 5e-4, 8, marks=pytest.mark.slow),  # trains for 2 minutes
    ],
)
def test_maps_lie_on_the_part_of_the_image_that_decides(
    kind, num_rows, epochs, learning_rate, num_maps
):
    import keras

    keras.utils.set_random_seed(0)
    inputs, label, _ = squares(num_rows, seed=0)
    options = {"numeric": {"kind": "none"}, "dropout": 0.0, "augmentation": {"rotation": 0}}
    image = {"kind": kind, "weights": None, "units": 16}
    model = create_model((SIDE, SIDE, 3), (0,), image=image, learning_rate=learning_rate, **options)
    model.fit(inputs, label, epochs=epochs, batch_size=16, verbose=0)
    test, label, is_inside = squares(60, seed=1)
    probability = np.asarray(model(test))[:, 0]
    assert np.mean((probability > 0.5) == label) > 0.95
    positive = {"image": test["image"][label == 1][:num_maps]}
    is_inside = is_inside[label == 1][:num_maps]
    is_positive = np.full(num_maps, True)
    maps = image_maps(model, positive, is_positive)
    assert maps.shape == (num_maps, 12, 12)
    assert mass_inside(maps, is_inside) >= 0.7
    assert abs(map_similarity(model, positive, maps, is_positive) or 1) < 0.5
    np.testing.assert_array_equal(np.asarray(model(test))[:, 0], probability)
    fresh = create_model((SIDE, SIDE, 3), (0,), image=image, **options)
    with_random_heads(fresh)
    assert mass_inside(image_maps(fresh, positive, is_positive), is_inside) < 0.4


def test_the_maps_of_a_transformer_have_cells_of_8_pixels():
    inputs = {name: values for name, values in inputs_of(3, True).items() if "image" in name}
    inputs["image_mask"][1, 0] = 0
    image = {"kind": "vit_tiny", "weights": None, "units": 8}
    shape = inputs["image"].shape[1:]
    model = create_model(shape, (0,), image=image, numeric={"kind": "none"})
    with_random_heads(model)
    maps = image_maps(model, inputs, np.full(3, True))
    assert maps.shape == (6, 4, 4)
    assert maps.max() > 0
    # The first image of the second row is missing.
    assert maps[2].max() == 0


@pytest.mark.slow  # trains 20 models
def test_a_column_that_matters_ranks_above_noise_in_20_of_20_seeds():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        inputs = inputs_of(400, seed=seed)
        del inputs["image"]
        inputs["numeric"][:, 2] = rng.normal(size=400)
        label = (inputs["numeric"][:, 0] + rng.normal(size=400) > 0).astype(int)
        statistics = fit_numeric_statistics(inputs["numeric"], NUMBERS)
        model = create_model(
            (32, 32, 3), (3,), statistics, vocabularies=[VOCABULARY], image={"kind": "none"},
            numeric={"units": (16,)}, learning_rate=1e-2,
        )  # fmt: skip
        model.fit(inputs, label, epochs=5, verbose=0)
        ranking = permutation_importance(model_rows(model, inputs, label))
        assert ranking[0]["columns"] == ["age"], seed
