"""Renders an evaluation as report.html, from report_page.html.j2."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_jobs.checks.finding import Finding
from ray_jobs.config.inference_spec import EvaluateSpec
from ray_jobs.data.images import decode_stored
from ray_jobs.data.manifest import Manifest
from ray_jobs.evaluate.analysis import HEAD
from ray_jobs.evaluate.evaluated_rows import EvaluatedRows
from ray_jobs.evaluate.uncertainty.model_comparison import METRIC_NAMES
from ray_jobs.explain.explanation import Explanation
from ray_jobs.explain.map_overlay import overlay_map
from ray_jobs.inspect.report_schema import ImageRef
from ray_jobs.inspect.shard_scan import read_thumbnails
from ray_jobs.pages.page_kit import chart, render
from ray_jobs.storage.folder import Folder

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MAX_POINTS = 400
_MAX_SLICES = 15
_MAX_CONTRIBUTIONS = 3
_TILES = ("roc_auc", "pr_auc", "log_loss", "accuracy")


def html(
    metrics: Mapping[str, Any],
    findings: Sequence[Finding],
    rows: EvaluatedRows,
    sheets: Mapping[str, Sequence[int]],
    explanation: Explanation,
    manifest: Manifest,
    spec: EvaluateSpec,
) -> str:
    """Return the page.

    Args:
        metrics: Content of metrics.json.
        findings: What its readers should know first.
        rows: The evaluated rows.
        sheets: Indices of the rows whose images are shown, by title.
        explanation: What the model looks at.
        manifest: Manifest of the prepared data.
        spec: Settings of the job.
    """
    images = _images(
        [row for shown in sheets.values() for row in shown], explanation, manifest, spec
    )
    return render(
        "evaluate/report_page.html.j2",
        title=f"Evaluation of {spec.run}",
        name=spec.run.rstrip("/").rpartition("/")[2],
        spec=spec,
        metrics=metrics,
        findings=findings,
        class_names=(manifest.negative_label, manifest.positive_label),
        tiles=_TILES,
        metric_names=METRIC_NAMES,
        slices=metrics["slices"][:_MAX_SLICES],
        sheets=sheets,
        images=images,
        columns=manifest.image.columns,
        rows=rows,
        branch=_best_branch(metrics),
        explanation=explanation,
        grouped=metrics["calibration"] is None,
        leading=_leading(explanation),
        charts=_charts(metrics, rows),
        importance=chart(
            _importance(explanation), "Importance of columns", 60 + 26 * len(explanation.importance)
        ),
        dependences={
            found["column"]: chart(_dependence(found), f"Dependence on {found['column']}", 260)
            for found in explanation.partial_dependence
        },
    )


def _best_branch(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the comparison with the branch of the lowest log loss on the validation rows."""
    heads = (c for c in metrics["comparisons"] if c["kind"] == HEAD)
    return next((head for head in heads if head["name"] != "joint"), None)


def _charts(metrics: Mapping[str, Any], rows: EvaluatedRows) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(("roc", "precision_recall", "thresholds", "decision"), "")
    if metrics["roc_auc"] is not None:
        found["roc"] = chart(_roc(rows), "ROC curve")
        found["precision_recall"] = chart(_precision_recall(rows), "Precision-recall curve")
        found["thresholds"] = chart(_threshold_curves(metrics), "Metrics by threshold")
        found["decision"] = chart(_decision_curve(metrics), "Decision curve")
    return {
        **found,
        "reliability": chart(_reliability(metrics), "Reliability diagram"),
        "histogram": chart(_histogram(metrics, rows), "Predicted probabilities by class"),
    }


def _roc(rows: EvaluatedRows) -> "Figure":
    from sklearn.metrics import roc_curve

    x, y, _ = roc_curve(rows.label_N, rows.probability_N, sample_weight=rows.weight_N)
    return _curve(x, y, "False positive rate", "Recall", diagonal=True)


def _precision_recall(rows: EvaluatedRows) -> "Figure":
    from sklearn.metrics import precision_recall_curve

    y, x, _ = precision_recall_curve(rows.label_N, rows.probability_N, sample_weight=rows.weight_N)
    return _curve(x, y, "Recall", "Precision")


def _curve(
    x: np.ndarray, y: np.ndarray, x_title: str, y_title: str, diagonal: bool = False
) -> "Figure":
    from plotly.graph_objects import Figure

    shown = np.unique(np.linspace(0, len(x) - 1, _MAX_POINTS).astype(int))
    figure = Figure()
    if diagonal:
        _add_line(figure, "chance", [0, 1], [0, 1], "var(--rest)", dash="dot")
    _add_line(figure, "model", x[shown].tolist(), y[shown].tolist(), "var(--c1)")
    figure.update_layout(showlegend=diagonal)
    return _axes(figure, x_title, y_title)


def _reliability(metrics: Mapping[str, Any]) -> "Figure":
    from plotly.graph_objects import Figure

    bins = metrics["reliability"]
    figure = Figure()
    _add_line(figure, "calibrated", [0, 1], [0, 1], "var(--rest)", dash="dot")
    figure.add_scatter(
        x=[b["probability"] for b in bins],
        y=[b["positives"] for b in bins],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [b["high"] - b["positives"] for b in bins],
            "arrayminus": [b["positives"] - b["low"] for b in bins],
            "color": "var(--c1)",
            "thickness": 1.2,
            "width": 3,
        },
        mode="lines+markers",
        name="model, with 95 % intervals",
        line={"color": "var(--c1)", "width": 1.5},
        text=[f"{b['num_rows']:,} rows, {b['low']:.3f} to {b['high']:.3f}" for b in bins],
        hovertemplate="%{x:.3f} predicted, %{y:.3f} positive; %{text}<extra></extra>",
    )
    return _axes(figure, "Predicted probability", "Fraction of positives")


def _histogram(metrics: Mapping[str, Any], rows: EvaluatedRows) -> "Figure":
    from plotly.graph_objects import Figure

    edges = np.linspace(0, 1, 31)
    figure = Figure()
    for label, (name, color) in enumerate((("negative", "c1"), ("positive", "c2"))):
        counts, _ = np.histogram(rows.probability_N[rows.label_N == label], edges)
        figure.add_bar(
            x=((edges[1:] + edges[:-1]) / 2).tolist(),
            y=(counts / max(counts.sum(), 1)).tolist(),
            name=name,
            marker={"color": f"var(--{color})"},
            opacity=0.65,
            hovertemplate="%{x:.2f}: %{y:.1%}<extra></extra>",
        )
    figure.update_layout(barmode="overlay", bargap=0.02)
    figure.add_vline(metrics["threshold"], line={"color": "var(--ink)", "width": 1, "dash": "dash"})
    figure.update_yaxes(tickformat=".0%")
    return _axes(figure, "Predicted probability", "Fraction of class", y_range=None)


def _threshold_curves(metrics: Mapping[str, Any]) -> "Figure":
    from plotly.graph_objects import Figure

    curves = metrics["thresholds"]["curves"]
    figure = Figure()
    names = ("precision", "recall", "specificity", "f1")
    for name, color in zip(names, ("c1", "c2", "c3", "c4"), strict=True):
        title = METRIC_NAMES.get(name, name)
        _add_line(figure, title, curves["threshold"], curves[name], f"var(--{color})")
    figure.add_vline(metrics["threshold"], line={"color": "var(--ink)", "width": 1, "dash": "dash"})
    return _axes(figure, "Threshold", "")


def _decision_curve(metrics: Mapping[str, Any]) -> "Figure":
    from plotly.graph_objects import Figure

    curves = metrics["thresholds"]["curves"]
    known = [value for value in curves["net_benefit"] if value is not None]
    top = max(known)
    figure = Figure()
    threshold = curves["threshold"]
    _add_line(figure, "model", threshold, curves["net_benefit"], "var(--c1)")
    _add_line(figure, "all positive", threshold, curves["net_benefit_of_all"], "var(--c2)")
    _add_line(figure, "all negative", [0, 1], [0, 0], "var(--rest)", dash="dot")
    # The curves fall without bound near a threshold of 1.
    return _axes(figure, "Threshold", "Net benefit", y_range=(-0.4 * top, 1.1 * top))


def _add_line(
    figure: "Figure", name: str, x: Sequence, y: Sequence, color: str, dash: str | None = None
) -> None:
    figure.add_scatter(
        x=x,
        y=y,
        name=name,
        mode="lines",
        line={"color": color, "width": 1.4 if dash else 2, "dash": dash},
        hovertemplate=f"{name}: %{{x:.3f}}, %{{y:.3f}}<extra></extra>",
    )


def _axes(
    figure: "Figure", x_title: str, y_title: str, y_range: tuple[float, float] | None = (0, 1.02)
) -> "Figure":
    figure.update_xaxes(title={"text": x_title}, range=[0, 1])
    figure.update_yaxes(title={"text": y_title}, range=y_range)
    return figure


def _importance(explanation: Explanation) -> "Figure | None":
    from plotly.graph_objects import Figure

    entries = explanation.importance[::-1]
    if not entries:
        return None
    figure = Figure()
    figure.add_bar(
        y=[escape(", ".join(entry["columns"])) for entry in entries],
        x=[entry["log_loss"] for entry in entries],
        error_x={
            "type": "data",
            "array": [entry["high"] - entry["log_loss"] for entry in entries],
            "color": "var(--ink)",
            "thickness": 1,
            "width": 3,
        },
        orientation="h",
        marker={"color": "var(--c1)"},
        hovertemplate="%{y}: %{x:+.4f}<extra></extra>",
    )
    figure.update_xaxes(title={"text": "Increase in log loss"})
    # By default, names that look like numbers or dates would become an axis of numbers.
    figure.update_yaxes(type="category")
    return figure


def _dependence(found: Mapping[str, Any]) -> "Figure":
    from plotly.graph_objects import Figure

    figure, values = Figure(), found["values"]
    if isinstance(values[0], str):
        names = [escape(value) for value in values[::-1]]
        mean = found["probability"][::-1]
        figure.add_bar(y=names, x=mean, orientation="h", marker={"color": "var(--c1)"})
        figure.update_yaxes(type="category")
        figure.update_xaxes(title={"text": "Mean probability"})
    else:
        _add_line(figure, "probability", values, found["probability"], "var(--c1)")
        figure.update_yaxes(rangemode="tozero", title={"text": "Mean probability"})
    return figure


def _leading(explanation: Explanation) -> dict[int, str]:
    """Return the columns that add most to the logit of each explained row."""
    found = {}
    for row, parts in explanation.contributions.items():
        names = sorted(parts, key=lambda name, parts=parts: -abs(parts[name]))[:_MAX_CONTRIBUTIONS]
        found[row] = ", ".join(f"{name} {parts[name]:+.2f}" for name in names)
    return found


def _images(
    shown: Sequence[int], explanation: Explanation, manifest: Manifest, spec: EvaluateSpec
) -> dict[tuple[int, str], list[str]]:
    """Return the data URIs of a small image, and of its map if there is one, by row and column."""
    if manifest.image.features:
        return {}
    columns = manifest.image.columns
    references = [
        ImageRef(split=spec.split, row=row, key="", column=column, label=0)
        for row in set(shown)
        for column in columns
    ]
    thumbnails = read_thumbnails(Folder(spec.data), manifest, references)
    found = {}
    for (_, row, column), content in thumbnails.items():
        maps = explanation.maps.get(row)
        overlay = [] if maps is None else [_draw(content, maps[columns.index(column)])]
        found[row, column] = [
            f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
            for image in (content, *overlay)
        ]
    return found


def _draw(content: bytes, map_HW: np.ndarray) -> bytes:
    return overlay_map(decode_stored(content), map_HW)
