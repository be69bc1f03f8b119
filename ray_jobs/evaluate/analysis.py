"""Analyses the predictions of a run: certainty, comparisons, slices, thresholds.

Input: the evaluated rows, and other models' predictions of them. Output: the content of
metrics.json, as plain numbers.

Shapes: N rows, M heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_jobs.data.batch import LABEL, WEIGHT
from ray_jobs.evaluate.evaluated_rows import DISTANCE_COLUMN, EvaluatedRows
from ray_jobs.evaluate.slices import cohorts, slice_metrics
from ray_jobs.evaluate.thresholds import choose_thresholds, threshold_curves
from ray_jobs.evaluate.uncertainty.bootstrap import Interval, bootstrap_intervals
from ray_jobs.evaluate.uncertainty.calibration_check import calibration_check, reliability_diagram
from ray_jobs.evaluate.uncertainty.draw_metrics import BIASED, METRICS, DrawMetrics
from ray_jobs.evaluate.uncertainty.model_comparison import COMPARED, compare, mcnemar, values_of
from ray_jobs.predict.trained_run import TrainedRun
from ray_jobs.train.finalize import EMBEDDINGS, read_sample
from ray_jobs.train.metrics import ThresholdCounts, binary_metrics, row_log_loss

HEAD, BASELINE, RUN = "head", "baseline", "run"

_CERTAIN = tuple(name for name in METRICS if name not in BIASED)
_NUM_SHOWN = 12


@dataclass(frozen=True)
class OtherModel:
    """A model to compare with."""

    kind: str
    """`head`, `baseline` or `run`."""
    name: str
    probability_N: np.ndarray
    threshold: float


def analyse(
    rows: EvaluatedRows,
    threshold: float,
    others: list[OtherModel],
    validation: EvaluatedRows | None,
    costs: tuple[float, float] = (1.0, 1.0),
) -> dict[str, Any]:
    """Return the content of metrics.json without findings.

    Args:
        rows: The evaluated rows.
        threshold: Decision threshold of the run.
        others: Models to compare with, with their predictions of the same rows.
        validation: Rows to choose thresholds on; None if there are none.
        costs: Cost of a false negative and of a false positive.
    """
    label_N, probability_N, weight_N = rows.label_N, rows.probability_N, rows.weight_N
    metrics = binary_metrics(label_N, probability_N, threshold, weight_N)
    draws = DrawMetrics(label_N, probability_N, threshold, weight_N, _CERTAIN)
    intervals = bootstrap_intervals(draws.of, label_N, rows.group_N)
    num_groups = None if rows.group_N is None else len(np.unique(rows.group_N))
    # The tests of calibration and of predictions assume independent rows.
    is_grouped = num_groups is not None and num_groups < len(label_N)
    return {
        **metrics,
        "num_groups": num_groups,
        "intervals": {name: _as_list(intervals.get(name)) for name in METRICS},
        "calibration": None if is_grouped else calibration_check(label_N, probability_N, weight_N),
        "reliability": reliability_diagram(label_N, probability_N, weight_N),
        "comparisons": _comparisons(rows, threshold, others, is_grouped),
        "slices": slice_metrics(rows, threshold),
        "cohorts": cohorts(rows, threshold),
        "thresholds": _thresholds(rows, validation, costs),
    }


def worst_rows(rows: EvaluatedRows, threshold: float) -> dict[str, list[int]]:
    """Return the indices of the rows to look at, by title."""
    true_N = np.where(rows.label_N == 1, rows.probability_N, 1 - rows.probability_N)
    is_wrong_N = (rows.probability_N >= threshold) != (rows.label_N == 1)
    confident = np.argsort(true_N, kind="stable")
    uncertain = np.argsort(np.abs(rows.probability_N - threshold), kind="stable")
    distance_N = rows.numbers.get(DISTANCE_COLUMN, np.zeros(len(true_N)))
    far = np.argsort(-distance_N, kind="stable")
    return {
        "Most confident errors": confident[is_wrong_N[confident]][:_NUM_SHOWN].tolist(),
        "Least certain rows": uncertain[:_NUM_SHOWN].tolist(),
        "Rows unlike the training rows": far[distance_N[far] > 1][:_NUM_SHOWN].tolist(),
    }


def training_gap(run: TrainedRun) -> dict[str, float] | None:
    """Return how much higher the log loss is on validation rows than on training rows.

    `training` and `validation` are the log losses of the final model on samples of both, and `low`
    to `high` the 95 % interval of the `difference`. Returns None if the run does not store them.
    """
    rows = read_sample(run.folder, EMBEDDINGS)
    if rows is None:
        return None
    loss_N = row_log_loss(rows[LABEL].to_numpy(), rows["probability"].to_numpy())
    has_weight = WEIGHT in rows.column_names
    weight_N = rows[WEIGHT].to_numpy() if has_weight else np.ones(len(loss_N))
    means, variance = [], 0.0
    for split in ("train", "validation"):
        part_N = rows["split"].to_numpy() == split
        share = weight_N[part_N] / weight_N[part_N].sum()
        means.append(float(share @ loss_N[part_N]))
        variance += float(((share * (loss_N[part_N] - means[-1])) ** 2).sum())
    difference, margin = means[1] - means[0], 1.96 * variance**0.5
    return {
        "training": means[0],
        "validation": means[1],
        "difference": difference,
        "low": difference - margin,
        "high": difference + margin,
    }


def head_models(
    rows: EvaluatedRows,
    heads: tuple[str, ...],
    threshold: float,
    validation: EvaluatedRows | None,
) -> list[OtherModel]:
    """Return each head as a model of its own, calibrated on the validation rows, the best first."""
    from mm_model.calibration import fit_calibration, log_loss, sigmoid

    if validation is None or not validation.logits_NM.size or len(heads) < 2:
        return []
    label_N, weight_N = validation.label_N, validation.weight_N
    if weight_N is not None:
        # As in `finalize`: the priors have the strength of a number of rows.
        weight_N = weight_N / weight_N.mean()
    models: list[tuple[float, OtherModel]] = []
    for m, head in enumerate(heads):
        logit_N = validation.logits_NM[:, m]
        scale, bias = fit_calibration(logit_N, label_N, weight_N)
        model = OtherModel(HEAD, head, sigmoid(scale * rows.logits_NM[:, m] + bias), threshold)
        models.append((log_loss(scale * logit_N + bias, label_N, weight_N), model))
    return [model for _, model in sorted(models, key=lambda item: item[0])]


def _as_list(interval: Interval) -> list[float] | None:
    return None if interval is None else list(interval)


def _comparisons(
    rows: EvaluatedRows, threshold: float, others: list[OtherModel], is_grouped: bool
) -> list[dict[str, Any]]:
    label_N, weight_N = rows.label_N, rows.weight_N
    if not others:
        return []

    def draws(probability_N: np.ndarray, threshold: float) -> DrawMetrics:
        return DrawMetrics(label_N, probability_N, threshold, weight_N, COMPARED)

    def correct(probability_N: np.ndarray, threshold: float) -> np.ndarray:
        return (probability_N >= threshold) == (label_N == 1)

    ours = draws(rows.probability_N, threshold).of
    theirs = {
        str(i): draws(other.probability_N, other.threshold).of for i, other in enumerate(others)
    }
    differences = compare(ours, theirs, label_N, rows.group_N)
    is_correct_N = correct(rows.probability_N, threshold)
    return [
        {
            "kind": other.kind,
            "name": other.name,
            "metrics": values_of(theirs[str(i)], len(label_N)),
            "differences": differences[str(i)],
            "mcnemar": None
            if is_grouped
            else mcnemar(is_correct_N, correct(other.probability_N, other.threshold)),
        }
        for i, other in enumerate(others)
    ]


def _thresholds(
    rows: EvaluatedRows, validation: EvaluatedRows | None, costs: tuple[float, float]
) -> dict[str, Any]:
    label_N, probability_N, weight_N = rows.label_N, rows.probability_N, rows.weight_N
    chosen: Mapping[str, float | None] = {}
    if validation is not None:
        counts = ThresholdCounts.of(
            validation.label_N, validation.probability_N, validation.weight_N
        )
        chosen = choose_thresholds(counts, *costs)
    found: dict[str, Any] = {}
    for purpose, threshold in chosen.items():
        found[purpose] = None
        if threshold is not None:
            at = ThresholdCounts.of(label_N, probability_N, weight_N, np.array([threshold]))
            found[purpose] = {**at.at(0), "cost": float(at.cost_T(*costs)[0])}
    return {
        "cost_false_negative": costs[0],
        "cost_false_positive": costs[1],
        "chosen": found,
        "curves": threshold_curves(label_N, probability_N, weight_N, *costs),
    }
