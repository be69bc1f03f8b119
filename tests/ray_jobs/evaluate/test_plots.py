import io
import warnings

import numpy as np
import pytest
from PIL import Image

from ray_jobs.evaluate.plots import BLUE, ORANGE, evaluation_plots
from ray_jobs.train.metrics import binary_metrics

NAMES = ["roc.png", "pr.png", "calibration.png", "confusion.png"]


def plots(seed: int = 0, label=None, names: tuple[str, str] = ("no", "yes")) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    label = np.arange(60) % 3 == 0 if label is None else np.array(label)
    probability = 1 / (1 + np.exp(-rng.normal(size=len(label)) - label))
    metrics = binary_metrics(label, probability, 0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return evaluation_plots(label, probability, metrics, names)


def pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def share_of(colour: str, image: np.ndarray) -> float:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(image.astype(int) - rgb).max(axis=2) < 12).mean())


def test_four_readable_plots_depend_on_the_rows_only():
    drawn = plots()
    assert list(drawn) == NAMES
    for name, content in drawn.items():
        image = pixels(content)
        assert min(image.shape[:2]) > 800
        if name != "confusion.png":
            # The model and the threshold.
            assert share_of(BLUE, image) > 2e-3
            assert share_of(ORANGE, image) > 2e-4
    assert plots() == drawn
    assert b"matplotlib" not in b"".join(drawn.values()).lower()
    others = plots(seed=2)
    assert all(others[name] != drawn[name] for name in NAMES)


@pytest.mark.parametrize("label", [[0] * 7, [1] * 7, [1]])
def test_rows_of_one_class_are_drawn_without_a_warning(label):
    one_class = plots(label=label)
    assert list(one_class) == NAMES
    # Without a curve, no threshold is marked.
    assert share_of(ORANGE, pixels(one_class["roc.png"])) == 0


def test_a_class_name_with_formula_characters_is_drawn():
    assert plots(names=("over $100 {", "\\frac$x$" + "long" * 20))["confusion.png"]
