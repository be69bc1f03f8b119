"""Compares the fusion model with numbers only and with gradient boosting on 400 real houses.

Method: five-fold cross-validation; a fifth of the rows outside a fold is used for validation. The
fusion model and the same model with numbers only run through the jobs `prepare`, `train` and
`predict` with ray_jobs/specs/houses.yaml. scikit-learn's histogram gradient boosting with default
settings is trained on the training and validation rows. Metrics are computed on all 400 held-out
predictions of a model. Differences in ROC AUC have a 95 % interval from a paired bootstrap over the
rows (10,000 samples).

Run:   python -m benchmarks.houses [--seed 0] [--data ../shared/data/houses]
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
from pyarrow import csv

from ray_jobs.cluster import connection
from ray_jobs.config import command_line
from ray_jobs.config.inference_spec import PredictSpec
from ray_jobs.config.spec import RunSpec
from ray_jobs.evaluate.uncertainty.draw_metrics import DrawMetrics
from ray_jobs.evaluate.uncertainty.model_comparison import COMPARED, compare
from ray_jobs.predict.job import predict
from ray_jobs.prepare.job import prepare
from ray_jobs.train.job import fit
from ray_jobs.train.metrics import binary_metrics

NUM_FOLDS = 5
VARIANTS: dict[str, dict[str, Any]] = {"fusion": {}, "numeric only": {"model.image.kind": "none"}}
BOOSTING = "gradient boosting"


def folds(label: np.ndarray, seed: int) -> list[np.ndarray]:
    """Return the split (train, validation or test) of each row, for each fold."""
    from sklearn.model_selection import StratifiedKFold, train_test_split

    splits = []
    splitter = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    for rest, test in splitter.split(label, label):
        _, validation = train_test_split(
            rest, test_size=0.2, stratify=label[rest], random_state=seed
        )
        split = np.full(len(label), "train", dtype="<U10")
        split[validation], split[test] = "validation", "test"
        splits.append(split)
    return splits


def predict_fold(base: RunSpec, table: pa.Table, split: np.ndarray, folder: Path) -> dict[str, Any]:
    """Return the probabilities of the test rows of a fold by key, for each variant."""
    folder.mkdir()
    csv.write_csv(table.append_column("split", pa.array(split)), folder / "table.csv")
    base = base.overlay(
        {
            "prepare.table": str(folder / "table.csv"),
            "prepare.split_column": "split",
            "prepare.output": str(folder / "prepared"),
            "data.prepared": str(folder / "prepared"),
            "run.storage_path": str(folder / "runs"),
        }
    )
    prepare(base)
    probabilities = {}
    for variant, changes in VARIANTS.items():
        name = variant.replace(" ", "-")
        fit(base.overlay({**changes, "run.name": name}))
        output = folder / "predictions" / name
        run = str(folder / "runs" / name)
        predict(PredictSpec(run=run, data=base.data.prepared, split="test", output=str(output)))
        rows = pq.read_table(output)
        probabilities[variant] = dict(
            zip(rows["key"].to_pylist(), rows["probability"].to_pylist(), strict=True)
        )
    return probabilities


def boost(table: pa.Table, columns: tuple[str, ...], label: np.ndarray, split: np.ndarray) -> Any:
    """Return the probabilities of gradient boosting for the test rows of a fold."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    x = np.stack([table[name].to_numpy().astype(float) for name in columns], axis=1)
    model = HistGradientBoostingClassifier(random_state=0)
    model.fit(x[split != "test"], label[split != "test"])
    return model.predict_proba(x[split == "test"])[:, 1]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="seed of folds and training")
    parser.add_argument("--data", default="../shared/data/houses", help="folder with the houses")
    arguments = parser.parse_args()
    base = command_line.validate_spec(
        RunSpec, command_line.read_yaml("ray_jobs/specs/houses.yaml")
    ).overlay({"prepare.images": f"{arguments.data}/images", "run.seed": arguments.seed})
    table = csv.read_csv(f"{arguments.data}/houses.csv")
    keys = [str(key) for key in table[base.prepare.key_column].to_pylist()]
    label = table[base.prepare.label_column].to_numpy().astype(int)
    columns = base.prepare.numeric_columns or ()
    predicted = {name: np.full(len(label), np.nan) for name in (*VARIANTS, BOOSTING)}
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        connection.connected("local", num_cpus=base.train.workers_range[0]),
    ):
        for number, split in enumerate(folds(label, arguments.seed)):
            test = split == "test"
            predicted[BOOSTING][test] = boost(table, columns, label, split)
            probabilities = predict_fold(base, table, split, Path(folder) / f"fold-{number}")
            for variant, by_key in probabilities.items():
                predicted[variant][test] = [by_key[keys[i]] for i in np.flatnonzero(test)]
    result: dict[str, Any] = {"seed": arguments.seed, "seconds": time.monotonic() - started}
    print("\n| model | ROC AUC | accuracy | log loss | ECE |\n|---|---|---|---|---|")
    for name, probability in predicted.items():
        metrics = binary_metrics(label, probability, 0.5)
        shown = {key: metrics[key] for key in ("roc_auc", "accuracy", "log_loss", "ece")}
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in shown.values()) + " |")
        result[name] = shown
    statistics = {n: DrawMetrics(label, p, 0.5, names=COMPARED).of for n, p in predicted.items()}
    others = {name: statistics[name] for name in ("numeric only", BOOSTING)}
    for other, differences in compare(statistics["fusion"], others, label).items():
        gain = differences["roc_auc"]
        result[f"fusion vs {other}"] = gain
        print(
            f"\nfusion − {other}: {gain['difference']:+.4f} "
            f"(95 % interval {gain['low']:+.4f} to {gain['high']:+.4f})"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
