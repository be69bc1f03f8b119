"""Compares one model, the mean of five folds' models, and tree ensembles on real data.

Method: the data is prepared with several seeds, which give different test splits. For each of them,
`train` trains one model, `cross_validate` trains five and exports their mean, and scikit-learn's
gradient boosting and random forest are trained on the training and validation rows, from numbers
and one-hot encoded words. All predictions of test rows are scored together. Differences have 95 %
intervals from a paired bootstrap that draws whole rows of the table, with their predictions in all
test splits.

Run:   python -m benchmarks.cross_validation houses
       python -m benchmarks.cross_validation ham10000 --splits 1
The last line of the output is JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.cluster import connection
from ray_jobs.config import command_line
from ray_jobs.config.inference_spec import PredictSpec
from ray_jobs.config.spec import CrossValidateSpec, RunSpec
from ray_jobs.cross_validate.job import cross_validate
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.evaluate.uncertainty.draw_metrics import DrawMetrics
from ray_jobs.evaluate.uncertainty.model_comparison import compare
from ray_jobs.predict.job import predict
from ray_jobs.prepare.job import prepare
from ray_jobs.storage.folder import Folder
from ray_jobs.train.job import fit
from ray_jobs.train.metrics import binary_metrics

SHOWN = ("roc_auc", "pr_auc", "log_loss", "ece")
ONE, MEAN = "one model", "mean of five models"
ENSEMBLES = ("gradient boosting", "random forest")


def stored_rows(folder: Path, manifest: Manifest, *splits: str) -> pa.Table:
    """Return stored rows without their images."""
    columns = ["key", "label", *manifest.numeric_columns]
    columns += [vocabulary.column for vocabulary in manifest.vocabularies]
    shards = [s for name, split in manifest.splits.items() if name in splits for s in split.shards]
    return pa.concat_tables(pq.read_table(folder / s.path, columns=columns) for s in shards)


def ensembles(train: pa.Table, test: pa.Table, manifest: Manifest) -> dict[str, np.ndarray]:
    """Return the probabilities of the test rows by scikit-learn's ensembles."""
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    words = [vocabulary.column for vocabulary in manifest.vocabularies]
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    models = (
        HistGradientBoostingClassifier(random_state=0),
        make_pipeline(SimpleImputer(), RandomForestClassifier(500, random_state=0, n_jobs=-1)),
    )
    found = {}
    for name, model in zip(ENSEMBLES, models, strict=True):
        columns = make_column_transformer((encoder, words), remainder="passthrough")
        pipeline = make_pipeline(columns, model)
        x, x_test = (t.drop(["key", "label"]).to_pandas() for t in (train, test))
        pipeline.fit(x, train["label"].to_numpy())
        found[name] = pipeline.predict_proba(x_test)[:, 1]
    return found


def predict_split(base: RunSpec, folder: Path) -> tuple[pa.Table, dict[str, Any], dict[str, float]]:
    """Return the test rows of a split, their probabilities by model, and seconds by job."""
    places = {"prepare.output": folder / "prepared", "data.prepared": folder / "prepared"}
    places["run.storage_path"] = folder / "runs"
    base = base.overlay({name: str(path) for name, path in places.items()})
    prepare(base)
    manifest = read_manifest(Folder(base.data.prepared))
    test = stored_rows(folder / "prepared", manifest, "test")
    train = stored_rows(folder / "prepared", manifest, "train", "validation")
    predicted, seconds = ensembles(train, test, manifest), {}
    started = time.monotonic()
    fit(base.overlay({"run.name": "one"}))
    seconds["train"] = time.monotonic() - started
    started = time.monotonic()
    spec = CrossValidateSpec.model_validate(base.model_dump())
    cross_validate(spec.overlay({"run.name": "cv", "cv.export": "mean"}))
    seconds["cross_validate"] = time.monotonic() - started
    for name, run in ((ONE, "one"), (MEAN, "cv/mean")):
        output = folder / "predicted" / run
        run = str(folder / "runs" / run)
        predict(PredictSpec(run=run, data=base.data.prepared, split="test", output=str(output)))
        rows = pq.read_table(output)
        by_key = dict(zip(rows["key"].to_pylist(), rows["probability"].to_pylist(), strict=True))
        predicted[name] = np.array([by_key[key] for key in test["key"].to_pylist()])
    return test, predicted, seconds


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("preset", choices=("houses", "ham10000"))
    parser.add_argument("--splits", type=int, default=5, help="number of test splits")
    parser.add_argument("--workers", type=int, default=1, help="workers of each training")
    arguments = parser.parse_args()
    tree = command_line.read_yaml(f"ray_jobs/specs/{arguments.preset}.yaml")
    base = command_line.validate_spec(RunSpec, tree)
    base = base.overlay({"train.num_workers": arguments.workers})
    splits: list[tuple[pa.Table, dict[str, Any], dict[str, float]]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        connection.connected("local", num_cpus=arguments.workers),
    ):
        for seed in range(arguments.splits):
            place = Path(folder) / str(seed)
            splits.append(predict_split(base.overlay({"run.seed": seed}), place))
            print(f"split {seed + 1}: {splits[-1][2]}", flush=True)
    label = np.concatenate([test["label"].to_numpy() for test, _, _ in splits])
    keys = [key for test, _, _ in splits for key in test["key"].to_pylist()]
    row = np.unique(keys, return_inverse=True)[1]
    names = (ONE, MEAN, *ENSEMBLES)
    probability = {name: np.concatenate([p[name] for _, p, _ in splits]) for name in names}

    def metrics(name: str) -> dict[str, float]:
        values = binary_metrics(label, probability[name], 0.5)
        return {metric: values[metric] for metric in SHOWN}

    result: dict[str, Any] = {"predictions": len(label), "models": {n: metrics(n) for n in names}}
    print("\n| model | " + " | ".join(SHOWN) + " |\n|" + "---|" * (len(SHOWN) + 1))
    for name, values in result["models"].items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values.values()) + " |")
    print("\n| mean of five models − | ROC AUC | log loss |\n|---|---|---|")
    for other in (ONE, *ENSEMBLES):
        ours, theirs = (DrawMetrics(label, probability[name], 0.5).of for name in (MEAN, other))
        found = compare(ours, {other: theirs}, label, row)[other]
        gains = {metric: found[metric] for metric in ("roc_auc", "log_loss")}
        result[f"{MEAN} vs {other}"] = gains
        cells = [
            "{difference:+.4f} ({low:+.4f} to {high:+.4f})".format(**g) for g in gains.values()
        ]
        print(f"| {other} | " + " | ".join(cells) + " |")
    seconds = [seconds for _, _, seconds in splits]
    result["seconds"] = {job: float(np.median([s[job] for s in seconds])) for job in seconds[0]}
    ratio = result["seconds"]["cross_validate"] / result["seconds"]["train"]
    print(f"\nmedian seconds: {result['seconds']}, ratio {ratio:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
