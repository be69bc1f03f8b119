"""Trains a model: prepared shards and a spec → a run folder with checkpoints and the best model.

job            the driver: resolves the spec, opens the run folder, connects to Ray
datasets       the Ray Data datasets of an attempt, and each worker's rows of them
               (reading_reservation: the CPUs of the tasks that read them)
supervisor     restarts attempts after transient failures
coordinator    passes events, failures and stop requests between the driver and the workers
worker         one Ray worker: start-up, checkpoints, reports
loop           epochs, validation and the choice of the best epoch
               (callbacks; model_factory; device_batch; train_step; metrics; graph_reuse)
finalize       best epoch → calibrated model and summary
checkpoints/   contents, files, writing and restoring of checkpoints
telemetry/     console, history, MLflow, profiler
"""

from ray_jobs.train.job import fit

__all__ = ["fit"]
