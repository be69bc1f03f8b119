"""Evaluate a trained run on a split.

Enters: a trained run and prepared data.  Leaves: metrics.json and plots.

    job     predicts the split and computes the metrics
    plots   draws ROC, precision-recall, calibration and confusion
"""

from ray_jobs.evaluate.job import evaluate

__all__ = ["evaluate"]
