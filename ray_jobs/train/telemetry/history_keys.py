"""Names the metrics of a run's history and compares their values.

A run folder's history has one record per epoch that maps these keys to numbers. Training, tuning
and the HTML pages import the keys from here. Imports neither Ray nor TensorFlow.
"""

import math

HISTORY = "history.jsonl"
"""File of a run folder with one JSON line per epoch."""
HISTORY_TABLE = "history.parquet"
"""The same records as a table."""

EPOCH = "epoch"
STEP = "step"
TRAIN_LOSS = "train/loss"
LEARNING_RATE = "train/learning_rate"
VAL_LOG_LOSS = "val/log_loss"
VAL_ROC_AUC = "val/roc_auc"
VAL_PR_AUC = "val/pr_auc"
VAL_ACCURACY = "val/accuracy"
INFERENCE_ROW_S = "inference/row_s"
ROWS_PER_S = "data/rows_per_s"
DATA_WAIT_S = "data/wait_s"
TEXTS_CUT = "data/texts_cut"
EPOCH_S = "time/epoch_s"
STEP_S = "time/step_s"
COLLECTIVE_S = "time/collective_s"
VALIDATION_S = "time/validation_s"
CHECKPOINT_S = "time/checkpoint_s"
STARTUP_RAY_S = "startup/ray_s"
STARTUP_WORKERS_S = "startup/workers_s"
STARTUP_IMPORTS_S = "startup/imports_s"
STARTUP_BUILD_S = "startup/build_s"
STARTUP_CHECKPOINT_S = "startup/checkpoint_s"
STARTUP_FIRST_STEP_S = "startup/first_step_s"
WORKER_BYTES = "memory/worker_bytes"
NODE_MEMORY_FRACTION = "memory/node_used_fraction"
CPU_CORES = "cpu/process_cores"
GPU_UTILIZATION = "gpu/utilization"
GPU_BYTES = "gpu/memory_bytes"
GPU_PEAK_BYTES = "gpu/memory_peak_bytes"

MINIMIZED = (VAL_LOG_LOSS, INFERENCE_ROW_S)
"""Metrics for which less is better; all other metrics are maximized."""


def sort_key(metric: str, value: float | None) -> float:
    """Return a number that sorts values of a metric best first, None and non-finite values last."""
    if value is None or not math.isfinite(value):
        return math.inf
    return value if metric in MINIMIZED else -value
