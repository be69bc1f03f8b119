"""Compares image branches and fusions on HAM10000 by cross-validation with five folds.

Method: `cross_validate` with the preset `ham10000.yaml` and the changes below. All models are
scored on the same out-of-fold rows; the mean of the folds' models is also scored on the test rows.
Lite0 is EfficientNet-Lite0 with the ImageNet weights of the package index, at 160 pixels, and tuned
as in the preset; `tiny` is trained from scratch at 96 pixels.

Run:   python -m benchmarks.ham10000 --output FOLDER [--models "tiny, gated;Lite0 tuned, gated"]
The same command continues an interrupted run. The last line of the output is JSON.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ray_jobs.config import command_line
from ray_jobs.config.spec import CrossValidateSpec, RunSpec
from ray_jobs.cross_validate.job import cross_validate
from ray_jobs.data.manifest import MANIFEST
from ray_jobs.prepare.job import prepare

METRICS = ("roc_auc", "pr_auc", "log_loss", "ece")
TUNED: dict[str, Any] = {}
FROZEN = {"model.image.trainable": False, "train.stages": []}
TINY = {
    "data.image_size": 96,
    "model.image": {"kind": "tiny", "weights": None, "units": 64},
    "model.augmentation": {},
    "train.global_batch_size": 64,
    "train.learning_rate": 0.002,
    "train.ema_momentum": None,
    "train.epochs": 15,
    "train.stages": [],
}
ATTENTION = {"model.fusion.kind": "cross_attention"}
MODELS: dict[str, dict[str, Any]] = {
    "metadata alone": {**TINY, "model.image.kind": "none"},
    "tiny, gated": TINY,
    "tiny, cross_attention": {**TINY, **ATTENTION},
    "Lite0 frozen, gated": FROZEN,
    "Lite0 frozen, cross_attention": {**FROZEN, **ATTENTION},
    "Lite0 tuned, gated": TUNED,
    "Lite0 tuned, cross_attention": {**TUNED, **ATTENTION},
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", required=True, help="folder for the data and the runs")
    parser.add_argument("--models", default=";".join(MODELS), help="separated by semicolons")
    arguments = parser.parse_args()
    output = Path(arguments.output).absolute()
    tree = command_line.read_yaml("ray_jobs/specs/ham10000.yaml")
    base = command_line.validate_spec(RunSpec, tree).overlay(
        {
            "run.storage_path": str(output),
            "prepare.output": str(output / "prepared"),
            "data.prepared": str(output / "prepared"),
        }
    )
    if not (output / "prepared" / MANIFEST).exists():
        prepare(base)
    found: dict[str, Any] = {}
    for name in arguments.models.split(";"):
        started, run = time.monotonic(), name.replace(", ", "-").replace(" ", "-")
        changes = {**MODELS[name], "run.name": run, "cv.folds": 5, "cv.export": "mean"}
        spec = CrossValidateSpec.model_validate(base.model_dump()).overlay(changes)
        result = cross_validate(spec)
        found[name] = {"minutes": (time.monotonic() - started) / 60, **result}
        print(name, json.dumps(found[name]), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
