"""Predict rows with a trained run.

Enters: a trained run and prepared or raw rows.  Leaves: Parquet files with their probabilities.

    trained_run   opens a run folder and checks that data fits it
    row_sources   reads prepared or raw rows in tasks
    predictor     loads the model in each process and predicts the rows; also for `evaluate`
    job           writes and counts the predictions
"""

from ray_jobs.predict.job import predict

__all__ = ["predict"]
