"""Compares image, numbers and text alone with their fusion on the data of the demo.

Method: the generator of the demo (`ray_jobs/demo/synthetic.py`) draws rows whose label depends
equally on the photo, the numbers and the note. Each model is trained on the same rows with the
settings of the demo, and scored on the test rows.

Run:   python -m benchmarks.text [--rows 4000] [--epochs 20]
The last line of the output is JSON: metrics by model.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ray_jobs.cluster import connection
from ray_jobs.config import command_line
from ray_jobs.config.inference_spec import PredictSpec
from ray_jobs.config.spec import RunSpec
from ray_jobs.demo.synthetic import write_demo_data
from ray_jobs.predict.job import predict
from ray_jobs.prepare.job import prepare
from ray_jobs.train.job import fit
from ray_jobs.train.metrics import binary_metrics

NONE = {name: f"model.{name}.kind" for name in ("image", "numeric", "text")}
BERT = {"model.text.kind": "bert_tiny"}
ATTENTION = {"model.fusion.kind": "cross_attention"}
MODELS: dict[str, dict[str, Any]] = {
    "image": {NONE["numeric"]: "none", NONE["text"]: "none"},
    "numbers": {NONE["image"]: "none", NONE["text"]: "none"},
    "text, hashed": {NONE["image"]: "none", NONE["numeric"]: "none"},
    "text, bert_tiny": {NONE["image"]: "none", NONE["numeric"]: "none", **BERT},
    "all, hashed, gated": {},
    "all, bert_tiny, gated": BERT,
    "all, hashed, cross_attention": ATTENTION,
    "all, bert_tiny, cross_attention": {**BERT, **ATTENTION},
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, connection.connected("local", num_cpus=1):
        write_demo_data(f"{folder}/data", arguments.rows)
        tree = command_line.read_yaml("ray_jobs/specs/demo.yaml")
        base = command_line.validate_spec(RunSpec, tree).overlay(
            {
                "run.storage_path": f"{folder}/runs",
                "prepare.images": f"{folder}/data/images",
                "prepare.table": f"{folder}/data/table.csv",
                "prepare.output": f"{folder}/prepared",
                "data.prepared": f"{folder}/prepared",
                "train.epochs": arguments.epochs,
                "train.num_workers": 1,
            }
        )
        prepare(base)
        for i, (name, changes) in enumerate(MODELS.items()):
            fit(base.overlay({**changes, "run.name": str(i)}))
            run, output = f"{folder}/runs/{i}", f"{folder}/predicted/{i}"
            prepared = f"{folder}/prepared"
            predict(PredictSpec(run=run, data=prepared, split="test", output=output))
            found[name] = _scores(Path(folder), output)
            print(name, found[name], flush=True)
    print("| model | ROC AUC | average precision | log loss | ECE |")
    print("|---|---|---|---|---|")
    for name, scores in found.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in scores.values()) + " |")
    print(json.dumps(found))


def _scores(folder: Path, output: str) -> dict[str, float]:
    rows = pq.read_table(output)
    shards = pq.read_table(folder / "prepared" / "test", columns=["key", "label"])
    label_of = dict(zip(shards["key"].to_pylist(), shards["label"].to_pylist(), strict=True))
    label = np.asarray([label_of[key] for key in rows["key"].to_pylist()])
    metrics = binary_metrics(label, rows["probability"].to_numpy(), 0.5)
    return {name: metrics[name] for name in ("roc_auc", "pr_auc", "log_loss", "ece")}


if __name__ == "__main__":
    main()
