"""Evaluates a trained run on a split.

Input: a trained run and prepared data. Output: metrics.json and plots.

    job     predicts the split and computes the metrics
    plots   draws ROC curve, precision-recall curve, calibration and confusion
"""

from ray_jobs.evaluate.job import evaluate

__all__ = ["evaluate"]
