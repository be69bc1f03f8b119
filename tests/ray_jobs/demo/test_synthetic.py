from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline

from ray_jobs.demo.synthetic import NUMERIC_COLUMNS, TEXT_COLUMN, draw_notes, write_demo_data


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo_data(folder, num_rows=1200, seed=0)
    return folder


def numbers_of(table: pa.Table) -> np.ndarray:
    return np.stack([table.column(name).to_numpy() for name in NUMERIC_COLUMNS], axis=1)


def tint_of(folder: Path, table: pa.Table) -> np.ndarray:
    """Return red minus blue of the only disc that is neither green nor gray."""
    tints = []
    for key in table.column("key").to_pylist():
        pixels = cv2.imread(str(folder / "images" / f"{key}.jpg")).astype(np.float64)
        blue, green, red = cv2.blur(pixels, (5, 5)).transpose(2, 0, 1)
        disc = (red + blue) / 2 - green > 25
        tints.append((red - blue)[disc].mean() if disc.any() else 0.0)
    return np.asarray(tints)


def test_the_table_and_the_images_are_as_documented(demo):
    """A quarter of the rows is positive, and 8 % of the numbers and notes are missing."""
    table = csv.read_csv(demo / "table.csv")
    assert table.column_names == ["key", *NUMERIC_COLUMNS, TEXT_COLUMN, "label"]
    assert np.bincount(table.column("label").to_numpy()).tolist() == [900, 300]
    assert np.isnan(numbers_of(table)).mean() == pytest.approx(0.08, abs=0.01)
    notes = table.column(TEXT_COLUMN).to_pylist()
    assert np.mean([not note for note in notes]) == pytest.approx(0.08, abs=0.03)
    images = {f"{key}.jpg" for key in table.column("key").to_pylist()}
    assert images == {path.name for path in (demo / "images").iterdir()}
    assert cv2.imread(str(demo / "images" / images.pop())).shape == (64, 64, 3)


def test_image_numbers_and_text_together_predict_better_than_each_alone(demo):
    table = csv.read_csv(demo / "table.csv")
    label, tint, numbers = table.column("label").to_numpy(), tint_of(demo, table), numbers_of(table)
    notes = table.column(TEXT_COLUMN).to_pylist()

    def held_out(model, features) -> np.ndarray:
        return cross_val_predict(model, features, label, cv=5, method="predict_proba")[:, 1]

    words = make_pipeline(CountVectorizer(ngram_range=(1, 2)), LogisticRegression(C=0.3))
    trees = HistGradientBoostingClassifier(max_iter=60, max_depth=4, random_state=0)
    image = roc_auc_score(label, held_out(LogisticRegression(), tint[:, None] / 100))
    numeric = roc_auc_score(label, held_out(trees, numbers))
    of_text = held_out(words, notes)
    text = roc_auc_score(label, of_text)
    every = roc_auc_score(label, held_out(trees, np.column_stack([tint, numbers, of_text])))
    assert all(0.68 < alone < 0.8 for alone in (image, numeric, text))
    assert every > max(image, numeric, text) + 0.1
    assert abs(np.corrcoef(tint, np.nan_to_num(numbers[:, 0]))[0, 1]) < 0.1


def test_single_words_of_a_note_tell_less_than_pairs():
    damage, notes = draw_notes(4000, np.random.default_rng(0))
    assert (damage.mean(), damage.std()) == pytest.approx((0, 1), abs=0.05)
    label = damage > np.median(damage)
    single, pairs = (
        cross_val_score(
            make_pipeline(CountVectorizer(ngram_range=(1, n)), LogisticRegression()),
            notes,
            label,
            scoring="roc_auc",
        ).mean()
        for n in (1, 2)
    )
    assert single < 0.9
    assert pairs > single + 0.05


def test_the_files_depend_only_on_the_seed(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_demo_data(tmp_path / name, num_rows=12, seed=seed)
    files = [
        [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))] for name in "abc"
    ]
    assert files[0] == files[1]
    assert files[0] != files[2]
