import io
import warnings

import numpy as np
import pytest
from PIL import Image

from ray_jobs.evaluate.plots import BLUE, ORANGE, evaluation_plots
from ray_jobs.train.metrics import binary_metrics

NAMES = ["roc.png", "pr.png", "calibration.png", "confusion.png"]


def plots(
    num_rows: int = 60, threshold: float = 0.4, seed: int = 0, label=None
) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    label = np.arange(num_rows) % 3 == 0 if label is None else label
    probability = 1 / (1 + np.exp(-rng.normal(size=len(label)) - label))
    metrics = binary_metrics(label, probability, threshold)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return evaluation_plots(label, probability, metrics, ("no", "yes"))


def pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def share_of(colour: str, image: np.ndarray) -> float:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(image.astype(int) - rgb).max(axis=2) < 12).mean())


@pytest.fixture(scope="module")
def drawn() -> dict[str, bytes]:
    return plots()


def test_four_readable_plots_are_drawn(drawn):
    assert list(drawn) == NAMES
    for content in drawn.values():
        assert min(pixels(content).shape[:2]) > 800


@pytest.mark.parametrize("name", NAMES[:3])
def test_the_model_and_the_threshold_are_drawn(drawn, name):
    image = pixels(drawn[name])
    assert share_of(BLUE, image) > 2e-3
    assert share_of(ORANGE, image) > 2e-4


def test_equal_rows_give_equal_bytes(drawn):
    assert plots() == drawn
    assert b"matplotlib" not in b"".join(drawn.values()).lower()


@pytest.mark.parametrize("name", NAMES)
def test_other_probabilities_change_the_plot(drawn, name):
    assert plots(seed=2)[name] != drawn[name]


@pytest.mark.parametrize("only", [0, 1])
def test_rows_of_one_class_are_drawn_without_a_warning(only, drawn):
    one_class = plots(label=np.full(7, only))
    assert list(one_class) == NAMES
    # Without a curve, no threshold is marked.
    assert share_of(ORANGE, pixels(one_class["roc.png"])) == 0


def test_a_class_name_with_formula_characters_is_drawn():
    label, probability = np.array([0, 1]), np.array([0.2, 0.8])
    metrics = binary_metrics(label, probability, 0.5)
    names = ("over $100 {", "\\frac$x$" + "long" * 20)
    assert evaluation_plots(label, probability, metrics, names)["confusion.png"]


def test_one_row_suffices_for_every_plot():
    assert list(plots(label=np.array([1]))) == NAMES
