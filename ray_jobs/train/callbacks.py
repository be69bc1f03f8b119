"""What the loop calls while it trains: for checkpoints and records, and to learn when to stop."""

from dataclasses import dataclass
from typing import Any, Protocol

from ray_jobs.train.checkpoints.checkpoint import Checkpoint
from ray_jobs.train.telemetry.console import Event


class CopyCheckpoint(Protocol):
    """Copies a checkpoint out of the model; at once or never, since the next step changes it."""

    def __call__(self, spare: Checkpoint | None = None) -> Checkpoint:
        """Return the checkpoint; `spare` is an earlier one that nobody needs, to be overwritten."""
        ...


@dataclass(frozen=True)
class ControlRequest:
    """What the world outside asks of the loop."""

    save: bool = False
    """Save a checkpoint soon, such as before a node goes."""
    stop: bool = False
    """Save a checkpoint and end."""


class Callbacks:
    """Every rank calls all of them alike; as they stand here they do nothing."""

    def post(self, event: Event) -> None:
        """Take a progress event."""

    def before_step(self, step: int, num_steps: int) -> None:
        """Learn that the next `num_steps` steps begin, after `step` of them."""

    def after_step(self, step: int) -> None:
        """Learn that `step` steps are done."""

    def alive(self) -> None:
        """Learn that something else is done, such as a batch of the validation."""

    def poll_control(self) -> ControlRequest:
        """Return what this worker was asked for, every few seconds; ranks are combined by OR."""
        return ControlRequest()

    def on_checkpoint(self, step: int, copy: CopyCheckpoint) -> None:
        """Take a checkpoint in the middle of an epoch."""

    def measures(self) -> dict[str, Any]:
        """Return more of an epoch's record."""
        return {}

    def on_epoch(self, record: dict[str, Any], copy: CopyCheckpoint) -> None:
        """Take an epoch's record and its checkpoint."""
