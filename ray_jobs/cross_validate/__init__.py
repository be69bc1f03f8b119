"""Cross-validation: prepared data → out-of-fold predictions, metrics with intervals, a mean model.

Input: the training and validation rows of prepared data. Output: a folder with rows.parquet,
metrics.json, a run folder for each fold, and optionally one for the mean of their models.

    job.py              divides the rows, trains the folds, and writes the results
    run_folds.py        trains the folds on the cluster, several at a time
    fold_worker.py      trains one fold after another in a process, and predicts its scored rows
    cv_results.py       metrics of the out-of-fold predictions, with intervals, and comparisons
    export_mean.py      writes the run folder of the mean model
"""

from ray_jobs.cross_validate.job import cross_validate

__all__ = ["cross_validate"]
