"""Finds and deletes the checkpoints that Ray Tune keeps in a trial's folder."""

from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint import Checkpoint
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager


def newest_checkpoint(trial: Folder) -> tuple[Folder, Checkpoint] | None:
    """Return the folder and the content of a trial's newest complete checkpoint, or None."""
    for name in sorted(_checkpoint_names(trial), reverse=True):
        # A killed driver leaves an incomplete copy behind.
        saved = CheckpointManager(trial / name, warn=lambda _: None).newest()
        if saved is not None:
            return trial / name, saved
    return None


def delete_checkpoints(trial: Folder) -> None:
    """Delete Tune's checkpoints of a trial."""
    for name in _checkpoint_names(trial):
        trial.delete(name)


def _checkpoint_names(trial: Folder) -> set[str]:
    names = {path.split("/")[0] for path in trial.names()}
    return {name for name in names if name.startswith("checkpoint_")}
