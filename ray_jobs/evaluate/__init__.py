"""Evaluates a trained run on a split.

Input: a trained run and prepared data. Output: report.html, metrics.json, rows.parquet, plots,
and the model card of the run.

    job             predicts the split, runs everything below, writes the results
    evaluated_rows  joins predictions with stored columns
    baselines       trains simple models on the same training rows
    analysis        puts all figures together
    uncertainty/    intervals, comparisons of models, calibration
    slices          finds rows in which the model is worse
    thresholds      chooses thresholds, computes costs and the decision curve
    model_findings  states what readers should know first
    model_card      writes model_card.md into the run folder
    plots           draws ROC curve, precision-recall curve, calibration and confusion
    report_page     renders report.html
"""

from ray_jobs.evaluate.job import evaluate

__all__ = ["evaluate"]
