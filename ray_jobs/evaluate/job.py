"""Evaluate a trained run on one split of prepared data.

Reads: a run folder from `train` and prepared data.  Writes into the output folder:

    report.html     the whole evaluation as one page that works offline
    metrics.json    its figures
    rows.parquet    key, label, probability, logits of the heads, and columns of each row
    roc.png, pr.png, calibration.png, confusion.png

and model_card.md into the run folder.

Run:   python -m ray_jobs.evaluate --run runs/first --data prepared --split test --output eval
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ray_jobs.cluster.connection import root_cause
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import EvaluateSpec
from ray_jobs.config.text import NONE, count_text
from ray_jobs.data.batch import FEATURES, KEY
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.evaluate.evaluated_rows import EvaluatedRows
from ray_jobs.explain.explanation import Explanation
from ray_jobs.predict.input_drift import input_drift
from ray_jobs.predict.predictor import PROBABILITY, connected, predict_rows
from ray_jobs.predict.row_sources import ERROR, PreparedRows
from ray_jobs.predict.trained_run import TrainedRun, open_run
from ray_jobs.storage.folder import Folder

if TYPE_CHECKING:
    from rich.table import Table

METRICS, REPORT, ROWS = "metrics.json", "report.html", "rows.parquet"


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a trained run for a split, and its rows."""

    metrics: dict[str, Any]
    """Content of metrics.json."""
    rows: EvaluatedRows


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
    """Write the evaluation of a trained run for a split; return its metrics and rows.

    Raises:
        JobError: As in `evaluate`.
    """
    from rich.console import Console

    from ray_jobs.evaluate.analysis import (
        BASELINE,
        RUN,
        OtherModel,
        analyse,
        head_models,
        training_gap,
        worst_rows,
    )
    from ray_jobs.evaluate.baselines import fit_baselines, training_shards
    from ray_jobs.evaluate.evaluated_rows import is_held_out, num_shared_groups, validation_rows
    from ray_jobs.evaluate.model_card import MODEL_CARD, model_card
    from ray_jobs.evaluate.model_findings import model_findings
    from ray_jobs.evaluate.plots import evaluation_plots
    from ray_jobs.evaluate.report_page import html

    run, other_runs = open_run(spec.run), {path: open_run(path) for path in spec.compare}
    data, output = Folder(spec.data), Folder(spec.output)
    manifest = read_manifest(data)
    if not manifest.splits[spec.split].num_rows:
        raise JobError(f"the {spec.split} split of {data} has no rows; choose another --split")
    sources = {
        path: PreparedRows(each, data, manifest, [spec.split], spec)
        for path, each in {spec.run: run, **other_runs}.items()
    }
    with connected(spec):
        predicted = {
            path: _predict(source, spec, data, with_distance=path == spec.run)
            for path, source in sources.items()
        }
        rows = EvaluatedRows.of(predicted[spec.run], data, manifest, spec.split)
        train, reason = training_shards(run, data, manifest)
        simple: dict[str, np.ndarray] = {}
        if spec.baselines and not reason:
            arguments = (data, train, manifest, rows.numbers, rows.words)
            simple, reason = _run_task("train the baselines", fit_baselines, arguments, spec, 0)
        sheets = worst_rows(rows, run.threshold)
        explanation, unexplained = _explanation(run, rows, sheets, data, manifest, spec)
    validation = validation_rows(run)
    others = [
        *head_models(rows, run.heads, run.threshold, validation),
        *(OtherModel(BASELINE, name, p_N, run.threshold) for name, p_N in (simple or {}).items()),
        *(
            OtherModel(RUN, path, predicted[path][PROBABILITY].to_numpy(), each.threshold)
            for path, each in other_runs.items()
        ),
    ]
    costs = (spec.cost_false_negative, spec.cost_false_positive)
    with Console().status("compute intervals"):
        metrics = analyse(rows, run.threshold, others, validation, costs)
    metrics["baselines_skipped"] = reason or None
    metrics["explanation_skipped"] = unexplained or None
    held_out = metrics["is_held_out"] = is_held_out(run, manifest, spec.split)
    shared = num_shared_groups(data, manifest, spec.split, train) if held_out else 0
    metrics["shared_groups"] = shared
    metrics["num_unfamiliar"] = rows.num_unfamiliar
    metrics["training_gap"] = training_gap(run)
    metrics["drift"] = input_drift(run, rows.numbers, rows.words, rows.logits_NM)
    explanation = explanation or Explanation()
    metrics["explanation"] = explanation.figures(rows.keys)
    if rows.weight_N is not None:
        metrics["weight_column"] = manifest.prepare.weight_column
    class_names = (manifest.negative_label, manifest.positive_label)
    findings = model_findings(metrics, run.blend, class_names)
    metrics["findings"] = [asdict(finding) for finding in findings]
    plots = evaluation_plots(rows.label_N, rows.probability_N, metrics, class_names, rows.weight_N)
    for name, content in plots.items():
        output.write_bytes(name, content)
    output.write_parquet(ROWS, rows.table(run.heads))
    output.write_json(METRICS, metrics)
    output.write_text(REPORT, html(metrics, findings, rows, sheets, explanation, manifest, spec))
    card = model_card(run, metrics, findings, spec)
    try:
        run.folder.write_text(MODEL_CARD, card)
    except OSError:
        # The run may be somebody else's.
        output.write_text(MODEL_CARD, card)
    return Evaluation(metrics, rows)


def _predict(
    source: PreparedRows, spec: EvaluateSpec, data: Folder, with_distance: bool
) -> pa.Table:
    rows = pa.concat_tables(predict_rows(source.run, source, spec, with_distance))
    bad = np.flatnonzero(rows[ERROR].is_valid().to_numpy())
    if len(bad):
        key, error = (rows[name][int(bad[0])].as_py() for name in (KEY, ERROR))
        raise JobError(
            f"{len(bad)} of {count_text(rows.num_rows, 'row')} of the {spec.split} split of {data} "
            f"cannot be evaluated; the first is {key!r}: {error}; prepare the data again"
        )
    return rows


def _explanation(
    run: TrainedRun,
    rows: EvaluatedRows,
    sheets: Mapping[str, Sequence[int]],
    data: Folder,
    manifest: Manifest,
    spec: EvaluateSpec,
) -> tuple[Explanation | None, str]:
    """Return the explanation, or None and the reason; none if it was not asked for."""
    from ray_jobs.explain.explain_run import explain_run

    if spec.explain == "none":
        return None, ""
    if FEATURES in run.input_shapes:
        return None, "the model takes features instead of images"
    shown = sheets.values() if spec.explain == "rows" else ()
    indices = sorted({row for part in shown for row in part})
    arguments = (
        run, data, manifest, spec.split, rows.weight_N, indices, spec.cpus_per_worker, spec.use_gpu,
    )  # fmt: skip
    return _run_task("explain the model", explain_run, arguments, spec, int(spec.use_gpu))


def _run_task(
    what: str, function: Any, arguments: tuple[Any, ...], spec: EvaluateSpec, num_gpus: int
) -> tuple[Any, str]:
    """Run a function on the cluster; return its result, or None and the reason why it failed."""
    import ray
    from ray.exceptions import RayError
    from rich.console import Console

    task = ray.remote(function).options(num_cpus=spec.cpus_per_worker, num_gpus=num_gpus)
    try:
        with Console().status(what):
            return ray.get(task.remote(*arguments)), ""
    except RayError as error:
        # The metrics do not depend on it.
        return None, f"could not {what}: {root_cause(error)}"


def _comparison_table(metrics: dict[str, Any]) -> "Table":
    from rich.markup import escape
    from rich.table import Column, Table

    names = ("ROC AUC", "log loss")
    colors = {"better": "green", "worse": "red"}
    table = Table("compared with", *(Column(name, justify="right") for name in names))
    for other in metrics["comparisons"]:
        found = [other["differences"][name] for name in ("roc_auc", "log_loss")]
        cells = [
            NONE
            if each["low"] is None
            else f"[{colors.get(each['verdict'], 'default')}]{each['difference']:+.3f}[/] "
            f"({each['low']:+.3f} to {each['high']:+.3f})"
            for each in found
        ]
        name = escape(other["name"]) + (" head" if other["kind"] == "head" else "")
        table.add_row(name, *cells)
    return table


def _print(metrics: dict[str, Any], manifest: Manifest, spec: EvaluateSpec) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    from ray_jobs.checks.finding import Finding, print_findings

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{escape(spec.run)}[/bold] on {spec.split}: "
        f"{count_text(metrics['num_rows'], 'row')}, {metrics['class_counts'][1]:,} of them "
        f"{escape(repr(manifest.positive_label))}"
    )
    table = Table("metric", *(Column(name, justify="right") for name in ("value", "95 % interval")))
    for name, interval in metrics["intervals"].items():
        value = metrics[name]
        table.add_row(
            name,
            "undefined" if value is None else f"{value:.4f}",
            NONE if interval is None else "{:.4f} to {:.4f}".format(*interval),
        )
    table.add_row("threshold", f"{metrics['threshold']:.4f}", "")
    console.print(table)
    if column := metrics.get("weight_column"):
        console.print(f"  weighted by {escape(column)}, except for the numbers of rows")
    (negatives, positives) = metrics["confusion"]
    console.print(
        f"  negatives: {negatives[0]:,} correct, {negatives[1]:,} wrong; "
        f"positives: {positives[1]:,} correct, {positives[0]:,} wrong"
    )
    if metrics["roc_auc"] is not None:
        console.print(_comparison_table(metrics))
    for what in ("baselines", "explanation"):
        if reason := metrics[f"{what}_skipped"]:
            console.print(f"  no {what}: {escape(reason)}")
    print_findings(Finding(**finding) for finding in metrics["findings"])
    output = Folder(spec.output)
    console.print(f"  [green]done[/green] → {escape(str(output))}/{REPORT}")
