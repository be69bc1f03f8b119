"""Measure a trained run on one split of prepared data.

Reads: a run folder from `train` and prepared data.  Writes: metrics.json and the plots roc.png,
pr.png, calibration.png and confusion.png into the output folder.

Run:   python -m ray_jobs.evaluate --run runs/first --data prepared --split test --output eval
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.cluster import connection
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import EvaluateSpec
from ray_jobs.data.batch import KEY, LABEL
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.predict import predictor
from ray_jobs.predict.predictor import ERROR, PROBABILITY
from ray_jobs.predict.trained_run import open_run
from ray_jobs.storage.folder import Folder

METRICS = "metrics.json"


@dataclass(frozen=True)
class Evaluation:
    """What a run's model says of a split."""

    metrics: dict[str, Any]
    """As in metrics.json."""
    label: np.ndarray
    """0 or 1, (N,), in stored order."""
    probability: np.ndarray
    """Of 1, (N,)."""


def evaluate(spec: EvaluateSpec) -> dict[str, Any]:
    """Return the metrics of a run on a split; each of its rows counts once.

    Raises:
        JobError: if the run is not finished, the data does not fit it, the split is empty, or a row
            of it cannot be read.
    """
    found = evaluation(spec)
    manifest, output = read_manifest(Folder(spec.data)), Folder(spec.output)
    _print(found.metrics, manifest, spec, output)
    return found.metrics


def evaluation(spec: EvaluateSpec) -> Evaluation:
    """Write metrics and plots of a run on a split, and return what they are made of.

    Raises:
        JobError: as `evaluate`.
    """
    from ray_jobs.evaluate.plots import evaluation_plots
    from ray_jobs.train.metrics import binary_metrics

    run = open_run(spec.run)
    data, output = Folder(spec.data), Folder(spec.output)
    manifest = read_manifest(data)
    if not manifest.splits[spec.split].num_rows:
        raise JobError(f"the {spec.split} split of {data} has no rows to evaluate")
    source = predictor.PreparedSource(run, data, manifest, [spec.split], spec)
    with connection.connected(
        spec.address,
        num_cpus=spec.num_workers * spec.cpus_per_worker,
        num_gpus=spec.num_workers if spec.use_gpu else 0,
        worker_logs=spec.worker_logs,
    ):
        rows = pa.concat_tables(predictor.predict_rows(run, source, spec))
    _require_whole(rows, spec, data)
    label, probability = rows[LABEL].to_numpy(), rows[PROBABILITY].to_numpy()
    metrics = binary_metrics(label, probability, run.threshold)
    class_names = (manifest.negative_label, manifest.positive_label)
    for name, content in evaluation_plots(label, probability, metrics, class_names).items():
        output.write_bytes(name, content)
    output.write_json(METRICS, metrics)
    return Evaluation(metrics, label, probability)


def _require_whole(rows: pa.Table, spec: EvaluateSpec, data: Folder) -> None:
    """Refuse to measure some of the rows as if they were all."""
    bad = np.flatnonzero(rows[ERROR].is_valid().to_numpy())
    if len(bad):
        key, error = (rows[name][int(bad[0])].as_py() for name in (KEY, ERROR))
        raise JobError(
            f"{len(bad)} of {rows.num_rows} rows of the {spec.split} split of {data} cannot be "
            f"evaluated; the first is {key!r}: {error}. Prepare the data again"
        )


def _print(metrics: dict[str, Any], manifest: Manifest, spec: EvaluateSpec, output: Folder) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    negatives, positives = metrics["class_counts"]
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{escape(spec.run)}[/bold] on {spec.split}: {metrics['num_rows']:,} rows, "
        f"{positives:,} of them {escape(repr(manifest.positive_label))}"
    )
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        if name not in ("confusion", "num_rows", "class_counts"):
            table.add_row(name, "undefined" if value is None else f"{value:.4f}")
    ((tn, fp), (fn, tp)) = metrics["confusion"]
    console.print(table)
    console.print(
        f"  of {negatives:,} negatives {tn:,} right and {fp:,} wrong, "
        f"of {positives:,} positives {tp:,} right and {fn:,} wrong"
    )
    console.print(f"  [green]done[/green] → {escape(str(output))}")
