"""Evaluate a trained run on one split of prepared data.

Reads: a run folder from `train` and prepared data.  Writes: metrics.json and the plots roc.png,
pr.png, calibration.png and confusion.png into the output folder.

Run:   python -m ray_jobs.evaluate --run runs/first --data prepared --split test --output eval
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import EvaluateSpec
from ray_jobs.config.text import count_text
from ray_jobs.data.batch import KEY, LABEL
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.data.reader import read_weights
from ray_jobs.predict.predictor import PROBABILITY, connected, predict_rows
from ray_jobs.predict.row_sources import ERROR, PreparedRows
from ray_jobs.predict.trained_run import open_run
from ray_jobs.storage.folder import Folder

METRICS = "metrics.json"


@dataclass(frozen=True)
class Evaluation:
    """Metrics and predictions of a trained run for the N rows of a split, in stored order."""

    metrics: dict[str, Any]
    """Content of metrics.json."""
    label: np.ndarray
    """0 or 1, (N,)."""
    probability: np.ndarray
    """Probability of 1, (N,)."""
    weight: np.ndarray | None = None
    """Weights, (N,); None if the data has none."""


def evaluate(spec: EvaluateSpec) -> dict[str, Any]:
    """Write, print and return the metrics of a trained run for a split.

    Raises:
        JobError: If the run is not finished, the data does not match the run, the split is empty,
            or one of its rows cannot be read.
    """
    metrics = evaluate_split(spec).metrics
    _print(metrics, read_manifest(Folder(spec.data)), spec)
    return metrics


def evaluate_split(spec: EvaluateSpec) -> Evaluation:
    """Write metrics and plots of a trained run for a split; return the metrics and predictions.

    Raises:
        JobError: As in `evaluate`.
    """
    from ray_jobs.evaluate.plots import evaluation_plots
    from ray_jobs.train.metrics import binary_metrics

    run = open_run(spec.run)
    data, output = Folder(spec.data), Folder(spec.output)
    manifest = read_manifest(data)
    if not manifest.splits[spec.split].num_rows:
        raise JobError(f"the {spec.split} split of {data} has no rows; choose another --split")
    source = PreparedRows(run, data, manifest, [spec.split], spec)
    with connected(spec):
        rows = pa.concat_tables(predict_rows(run, source, spec))
    _require_no_errors(rows, spec, data)
    label, probability = rows[LABEL].to_numpy(), rows[PROBABILITY].to_numpy()
    weight = read_weights(data, manifest, spec.split)
    metrics = binary_metrics(label, probability, run.threshold, weight)
    if weight is not None:
        metrics["weight_column"] = manifest.prepare.weight_column
    class_names = (manifest.negative_label, manifest.positive_label)
    plots = evaluation_plots(label, probability, metrics, class_names, weight)
    for name, content in plots.items():
        output.write_bytes(name, content)
    output.write_json(METRICS, metrics)
    return Evaluation(metrics, label, probability, weight)


def _require_no_errors(rows: pa.Table, spec: EvaluateSpec, data: Folder) -> None:
    bad = np.flatnonzero(rows[ERROR].is_valid().to_numpy())
    if len(bad):
        key, error = (rows[name][int(bad[0])].as_py() for name in (KEY, ERROR))
        raise JobError(
            f"{len(bad)} of {count_text(rows.num_rows, 'row')} of the {spec.split} split of {data} "
            f"cannot be evaluated; the first is {key!r}: {error}; prepare the data again"
        )


def _print(metrics: dict[str, Any], manifest: Manifest, spec: EvaluateSpec) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{escape(spec.run)}[/bold] on {spec.split}: "
        f"{count_text(metrics['num_rows'], 'row')}, {metrics['class_counts'][1]:,} of them "
        f"{escape(repr(manifest.positive_label))}"
    )
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        if name not in ("confusion", "num_rows", "class_counts", "weight_column"):
            table.add_row(name, "undefined" if value is None else f"{value:.4f}")
    console.print(table)
    if column := metrics.get("weight_column"):
        console.print(f"  weighted by {escape(column)}, except for the numbers of rows")
    (negatives, positives) = metrics["confusion"]
    console.print(
        f"  negatives: {negatives[0]:,} correct, {negatives[1]:,} wrong; "
        f"positives: {positives[1]:,} correct, {positives[0]:,} wrong"
    )
    console.print(f"  [green]done[/green] → {escape(str(Folder(spec.output)))}")
