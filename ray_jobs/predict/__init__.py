"""Predicts rows with a trained run.

Input: a trained run and prepared or raw rows. Output: Parquet files with their probabilities.

    trained_run   opens a run folder and checks that data matches it
    row_sources   reads prepared or raw rows in tasks
    row_distance  measures how far rows are from the training rows
    predictor     loads the model in each process and predicts rows, also for `evaluate`
    job           writes and counts the predictions
"""

from ray_jobs.predict.job import predict

__all__ = ["predict"]
