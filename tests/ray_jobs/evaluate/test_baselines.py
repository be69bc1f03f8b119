import numpy as np
import pyarrow as pa
import pytest
from sklearn import metrics

from ray_jobs.evaluate.baselines import predict_baselines


def table(num_rows: int, seed: int, **columns) -> pa.Table:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, num_rows)
    number = rng.normal(size=num_rows) + label
    number[rng.random(num_rows) < 0.2] = np.nan
    word = np.where(rng.random(num_rows) < 0.7, label, 1 - label)
    words = [None if rng.random() < 0.1 else "ab"[w] for w in word]
    return pa.table({"label": label, "number": number, "empty": np.full(num_rows, np.nan),
                     "word": pa.array(words), **columns})  # fmt: skip


def test_the_baselines_learn_from_numbers_and_words_with_missing_and_new_values():
    test = table(500, seed=1)
    test = test.set_column(3, "word", pa.array(["new", *test["word"].to_pylist()[1:]]))
    found = predict_baselines(table(500, seed=0), test, ["number", "empty"], ["word"])
    assert list(found) == ["base rate", "logistic regression", "gradient boosting"]
    label = test["label"].to_numpy()
    aucs = [metrics.roc_auc_score(label, probability) for probability in found.values()]
    assert aucs[0] == 0.5
    assert min(aucs[1:]) > 0.7


def test_the_baselines_are_weighted():
    label, weight = np.r_[np.zeros(50), np.ones(50)], np.r_[np.ones(50), np.full(50, 3.0)]
    train = pa.table({"label": label, "number": np.ones(100)})
    found = predict_baselines(train, train, ["number"], [], weight)
    for name, probability in found.items():
        assert probability == pytest.approx(0.75, abs=0.01), name


def test_without_numbers_and_words_there_is_only_the_base_rate():
    train = pa.table({"label": [0, 0, 0, 1]})
    found = predict_baselines(train, train, [], [])
    assert {name: p.tolist() for name, p in found.items()} == {"base rate": [0.25] * 4}
