"""Tune's checkpoints of a trial, as they lie in its folder: the newest, and their end."""

from collections.abc import Iterator

from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint import Checkpoint
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager


def checkpoints(trial: Folder) -> list[Folder]:
    """Return the checkpoints of a trial, the newest first; one may not be whole."""
    names = {path.split("/")[0] for path in trial.names()}
    return [trial / name for name in sorted(names, reverse=True) if name.startswith("checkpoint_")]


def newest_checkpoint(trial: Folder) -> Folder | None:
    """Return the newest checkpoint of a trial that is whole, if there is any."""
    return next((folder for folder, _ in _whole(trial)), None)


def newest_saved(trial: Folder) -> Checkpoint | None:
    """Return what the newest whole checkpoint of a trial holds, if there is any."""
    return next((saved for _, saved in _whole(trial)), None)


def delete_checkpoints(trial: Folder) -> None:
    """Delete Tune's checkpoints of a trial."""
    for folder in checkpoints(trial):
        trial.delete(folder.path.rpartition("/")[2])


def _whole(trial: Folder) -> Iterator[tuple[Folder, Checkpoint]]:
    for folder in checkpoints(trial):
        # A killed driver leaves behind what it was copying.
        saved = CheckpointManager(folder, warn=lambda _: None).newest()
        if saved is not None:
            yield folder, saved
