"""Trains simple models on the numbers and words of a run's training rows.

They show what the run's model adds: the base rate, logistic regression, and gradient boosting.

Shapes: N rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.config.text import count_text
from ray_jobs.data.batch import LABEL, WEIGHT
from ray_jobs.data.manifest import Manifest, Shard
from ray_jobs.data.reader import read_columns
from ray_jobs.predict.trained_run import TrainedRun
from ray_jobs.storage.folder import Folder

BASE_RATE = "base rate"
MAX_ROWS = 200_000
"""Training rows of the baselines; of more, a random sample is used."""

_MAX_CATEGORIES = 254  # of HistGradientBoostingClassifier: 255, including unknown ones


def training_shards(
    run: TrainedRun, folder: Folder, manifest: Manifest
) -> tuple[tuple[Shard, ...], str]:
    """Return the shards with the run's training rows, or none and the reason.

    Args:
        run: The run.
        folder: Prepared data.
        manifest: Its manifest.
    """
    stored = {s.path: s.sha256 for split in manifest.splits.values() for s in split.shards}
    shards = run.manifest.splits["train"].shards
    if missing := [shard for shard in shards if stored.get(shard.path) != shard.sha256]:
        count = f"{count_text(len(missing), 'shard')} of the run's training rows"
        return (), f"{folder} does not contain {count}"
    return shards, ""


def fit_baselines(
    folder: Folder,
    shards: Sequence[Shard],
    manifest: Manifest,
    numbers: Mapping[str, np.ndarray],
    words: Mapping[str, pa.Array],
) -> dict[str, np.ndarray]:
    """Return the probabilities (N,) of each baseline for the evaluated rows.

    Args:
        folder: Prepared data.
        shards: Shards with the training rows.
        manifest: Manifest of the data.
        numbers: Columns of numbers of the evaluated rows.
        words: Columns of words of the evaluated rows.
    """
    columns = [LABEL, *manifest.numeric_columns, *words]
    columns += [WEIGHT] if manifest.is_weighted else []
    train = read_columns(folder, shards, columns)
    test = {name: numbers[name] for name in manifest.numeric_columns} | dict(words)
    if train.num_rows > MAX_ROWS:
        train = train.take(np.random.default_rng(0).permutation(train.num_rows)[:MAX_ROWS])
    weight_N = train[WEIGHT].to_numpy() if manifest.is_weighted else None
    columns = (manifest.numeric_columns, list(words))
    return predict_baselines(train, pa.table(test), *columns, weight_N)


def predict_baselines(
    train: pa.Table,
    test: pa.Table,
    numbers: Sequence[str],
    words: Sequence[str],
    weight_N: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return the probabilities of each baseline.

    Args:
        train: Training rows: label, numbers, words.
        test: Rows to predict: numbers and words.
        numbers: Columns of numbers.
        words: Columns of words.
        weight_N: Weights of the training rows; by default, 1.
    """
    label = train[LABEL].to_numpy()
    weight = np.ones(len(label)) if weight_N is None else weight_N
    rate = float(np.average(label, weights=weight))
    found = {BASE_RATE: np.full(test.num_rows, rate)}
    # Gradient boosting fails on columns without any value.
    numbers = [name for name in numbers if not np.isnan(train[name].to_numpy()).all()]
    words = [name for name in words if train[name].null_count < train.num_rows]
    columns = [*numbers, *words]
    if columns and 0 < rate < 1:
        x = train.select(columns).to_pandas()
        x_test = test.select(columns).to_pandas()
        for name, model in _models(numbers, words).items():
            model.fit(x, label, **{f"{model.steps[-1][0]}__sample_weight": weight})
            found[name] = model.predict_proba(x_test)[:, 1]
    return found


def _models(numbers: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

    scaled = make_pipeline(
        SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True),
        StandardScaler(),
    )
    one_hot = OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=_MAX_CATEGORIES)
    codes = OrdinalEncoder(
        handle_unknown="use_encoded_value",
        unknown_value=np.nan,
        encoded_missing_value=np.nan,
        max_categories=_MAX_CATEGORIES,
    )
    without: Any = False
    is_word: Any = [False] * len(numbers) + [True] * len(words)
    return {
        "logistic regression": make_pipeline(
            make_column_transformer((scaled, list(numbers)), (one_hot, list(words))),
            LogisticRegression(max_iter=1000),
        ),
        "gradient boosting": make_pipeline(
            make_column_transformer(("passthrough", list(numbers)), (codes, list(words))),
            HistGradientBoostingClassifier(
                categorical_features=is_word, early_stopping=without, random_state=0
            ),
        ),
    }
