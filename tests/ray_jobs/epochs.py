"""Creates and writes records of epochs for the tests of tracking."""

from pathlib import Path
from typing import Any

from ray_jobs.config.spec import RunSpec
from ray_jobs.train.telemetry import history_keys as keys
from ray_jobs.train.telemetry.history import Tracker


def record(epoch: int, attempt: int = 0, **changes: Any) -> dict[str, Any]:
    """Return the record of an epoch, which differs between attempts."""
    return {
        keys.EPOCH: epoch,
        keys.STEP: 10 * (epoch + 1),
        keys.TRAIN_LOSS: 0.5 / (epoch + 1) + attempt,
        keys.VAL_ROC_AUC: None,
        **changes,
    }


def history(count: int, attempt: int = 0) -> tuple[dict[str, Any], ...]:
    return tuple(record(epoch, attempt) for epoch in range(count))


def spec_in(folder: Path, tracking: str = "mlflow", **changes: Any) -> RunSpec:
    run = {"storage_path": str(folder), "name": "first", "tracking": tracking}
    spec = RunSpec.model_validate({"run": run})
    return spec.overlay({name.replace("__", "."): value for name, value in changes.items()})


def write_epochs(tracker: Tracker, start: int, stop: int, attempt: int = 0) -> None:
    for count in range(start + 1, stop + 1):
        epochs = (*history(start), *history(count, attempt)[start:])
        tracker.write(epochs)
