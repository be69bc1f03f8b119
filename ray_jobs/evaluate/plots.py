"""Draws the plots of an evaluation as PNG files: ROC, precision-recall, calibration, confusion.

Scikit-learn's displays draw the curves. Equal rows give equal bytes. Figures are created without
pyplot, so plots share no state.
"""

import io
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay

from ray_jobs.config.text import count_text
from ray_jobs.train.metrics import ECE_BINS, reliability

INK, MUTED, GRID = "#22303c", "#75828e", "#e6eaee"
BLUE, ORANGE = "#2a6fbb", "#e07b39"

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c3cbd3",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlepad": 26,
    "axes.labelpad": 7,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.constrained_layout.w_pad": 0.16,
    "figure.constrained_layout.h_pad": 0.16,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}
_DOTS_PER_INCH = 160
_REFERENCE_LINE: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (4, 3))}
_CURVE: dict[str, Any] = {"color": BLUE, "linewidth": 2.2, "clip_on": False, "label": "model"}


def evaluation_plots(
    label: np.ndarray,
    probability: np.ndarray,
    metrics: dict[str, Any],
    class_names: tuple[str, str] = ("0", "1"),
    weight: np.ndarray | None = None,
) -> dict[str, bytes]:
    """Return the four plots by file name; a text replaces a curve that is undefined.

    Args:
        label: 0 or 1, (N,).
        probability: Probability of 1, (N,).
        metrics: Metrics of these rows from `binary_metrics`.
        class_names: Names of the classes 0 and 1.
        weight: Weights of the rows, (N,), for the curves; by default, 1.
    """
    label = np.ravel(label).astype(np.int64)
    probability = np.ravel(probability).astype(np.float64)
    with rc_context(_STYLE):
        return {
            "roc.png": _roc(label, probability, metrics, weight),
            "pr.png": _precision_recall(label, probability, metrics, weight),
            "calibration.png": _calibration(label, probability, metrics, weight),
            "confusion.png": _confusion(metrics, class_names),
        }


def _roc(
    label: np.ndarray, probability: np.ndarray, metrics: dict[str, Any], weight: np.ndarray | None
) -> bytes:
    figure, axes = _figure()
    if metrics["roc_auc"] is None:
        _undefined(axes, "All rows are of one class")
    else:
        RocCurveDisplay.from_predictions(
            label, probability, sample_weight=weight, ax=axes, curve_kwargs=_CURVE,
            plot_chance_level=True, chance_level_kw={**_REFERENCE_LINE, "label": "chance"},
        )  # fmt: skip
        false_positives = 1 + metrics["recall"] - 2 * metrics["balanced_accuracy"]
        _mark(axes, false_positives, metrics["recall"], metrics["threshold"])
    axes.set(xlabel="False positive rate", ylabel="True positive rate")
    return _png(figure, axes, "ROC curve", f"AUC {_number(metrics['roc_auc'])}", metrics)


def _precision_recall(
    label: np.ndarray, probability: np.ndarray, metrics: dict[str, Any], weight: np.ndarray | None
) -> bytes:
    figure, axes = _figure()
    if metrics["pr_auc"] is None:
        _undefined(axes, "No row is positive")
    else:
        PrecisionRecallDisplay.from_predictions(
            label, probability, sample_weight=weight, ax=axes, curve_kwargs=_CURVE,
            plot_chance_level=True, chance_level_kw={**_REFERENCE_LINE, "label": "chance"},
        )  # fmt: skip
        if metrics["confusion"][0][1] + metrics["confusion"][1][1]:
            _mark(axes, metrics["recall"], metrics["precision"], metrics["threshold"])
    axes.set(xlabel="Recall", ylabel="Precision")
    score = f"average precision (AUC) {_number(metrics['pr_auc'])}"
    return _png(figure, axes, "Precision–recall curve", score, metrics)


def _calibration(
    label: np.ndarray, probability: np.ndarray, metrics: dict[str, Any], weight: np.ndarray | None
) -> bytes:
    figure = Figure(figsize=(5.8, 7.1), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4.4, 1))
    # scikit-learn's calibration curve has no weights.
    rows, mean, fraction = reliability(label, probability, weight)
    CalibrationDisplay(fraction[rows > 0], mean[rows > 0], probability, pos_label=1).plot(
        ax=axes, **_CURVE
    )
    axes.set(xlabel="", ylabel="Fraction of positives")
    below.hist(probability, bins=ECE_BINS, range=(0, 1), color=BLUE, edgecolor="white")
    below.axvline(metrics["threshold"], color=ORANGE, linewidth=1.4, label="threshold")
    below.legend()
    below.set(ylabel="Rows", xlabel="Predicted probability")
    below.grid(False, axis="x")
    below.locator_params(axis="y", nbins=3, integer=True)
    score = f"ECE {metrics['ece']:.4f} · Brier {metrics['brier']:.4f}"
    return _png(figure, axes, "Calibration", score, metrics)


def _confusion(metrics: dict[str, Any], class_names: tuple[str, str]) -> bytes:
    figure, axes = _figure()
    counts = np.asarray(metrics["confusion"])
    names = [_short(name) for name in class_names]
    display = ConfusionMatrixDisplay(counts, display_labels=names)
    display.plot(ax=axes, cmap="Blues", colorbar=False, text_kw={"fontsize": 18})
    totals = counts.sum(axis=1)
    for (true, predicted), text in np.ndenumerate(display.text_):
        count = counts[true, predicted]
        text.set_text(f"{count:,}\n{count / max(totals[true], 1):.1%} of row")
    axes.set(xlabel="Predicted", ylabel="True")
    axes.grid(False)
    score = f"accuracy {metrics['accuracy']:.3f} · F1 {_number(metrics['f1'])}"
    return _png(figure, axes, f"Confusion at threshold {metrics['threshold']:.3g}", score, metrics)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.8, 5.9), layout="constrained")
    return figure, figure.subplots()


def _mark(axes: Axes, x: float, y: float, threshold: float) -> None:
    """Mark the point of the curve at the threshold."""
    axes.plot(
        [x], [y], marker="o", markersize=9, color=ORANGE, linestyle="none",
        markeredgecolor="white", markeredgewidth=1.5, zorder=4, clip_on=False,
        label=f"threshold {threshold:.3g}",
    )  # fmt: skip
    axes.legend()


def _undefined(axes: Axes, reason: str) -> None:
    axes.text(
        0.5, 0.5, f"{reason}:\nthe curve is not defined.",
        ha="center", va="center", color=MUTED, backgroundcolor="white",
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _short(name: str) -> str:
    # A dollar sign would start a formula.
    return (name if len(name) <= 18 else f"{name[:17]}…").replace("$", r"\$")


def _png(figure: Figure, axes: Axes, title: str, score: str, metrics: dict[str, Any]) -> bytes:
    """Add the title and the subtitle and return the plot as a PNG."""
    rows = f"{count_text(metrics['num_rows'], 'row')}, {metrics['class_counts'][1]:,} positive"
    axes.set_title(title)
    axes.annotate(
        f"{score}  —  {rows}",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 9),
        textcoords="offset points",
        color=MUTED,
        fontsize=10,
    )
    buffer = io.BytesIO()
    # Matplotlib would write its version, so that equal rows would not give equal bytes.
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()
