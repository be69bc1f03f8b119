"""Defines the callbacks of the training loop: progress, records, checkpoints, control requests."""

from dataclasses import dataclass
from typing import Any, Protocol

from ray_jobs.train.checkpoints.checkpoint import Checkpoint
from ray_jobs.train.telemetry.console import Event


class CopyCheckpoint(Protocol):
    """Copies the current state into a checkpoint. Call it only before the callback returns."""

    def __call__(self, spare: Checkpoint | None = None) -> Checkpoint:
        """Return the checkpoint; reuse the memory of `spare`, an earlier checkpoint, if given."""
        ...


@dataclass(frozen=True)
class ControlRequest:
    """A request to the loop from outside."""

    save: bool = False
    """Save a checkpoint soon, for example before a node is preempted."""
    stop: bool = False
    """Save a checkpoint and stop."""


class Callbacks:
    """Callbacks that do nothing. The loop calls every method on all ranks at the same steps."""

    def post(self, event: Event) -> None:
        """Receive a progress event."""

    def before_step(self, step: int, num_steps: int) -> None:
        """Run before a call of `num_steps` steps; `step` steps are completed."""

    def after_step(self, step: int) -> None:
        """Run after a call of one or several steps; `step` steps are completed."""

    def alive(self) -> None:
        """Run after other progress, such as a validation batch."""

    def poll_control(self) -> ControlRequest:
        """Return this worker's request; every few seconds, the requests of all ranks are ORed."""
        return ControlRequest()

    def on_checkpoint(self, step: int, copy: CopyCheckpoint) -> None:
        """Receive a checkpoint within an epoch."""

    def measures(self) -> dict[str, Any]:
        """Return additional measurements for an epoch's record."""
        return {}

    def on_epoch(self, record: dict[str, Any], copy: CopyCheckpoint) -> None:
        """Receive the record and the checkpoint of an epoch."""
