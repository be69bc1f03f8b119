"""Writes, finds and deletes the checkpoints that Ray Tune keeps in a trial's folder.

A checkpoint has the layout of a run folder. That of a trial with several models, one for each fold,
has a folder `fold-N` with that layout for each of them.
"""

from collections.abc import Callable, Sequence

from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint import Checkpoint
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager


def _fail(text: str) -> None:
    raise OSError(text)


def write_checkpoints(folder: Folder, checkpoints: Sequence[Checkpoint]) -> None:
    """Write a checkpoint of all models of a trial.

    Raises:
        OSError: If it cannot be written.
    """
    for place, checkpoint in zip(_places(folder, len(checkpoints)), checkpoints, strict=True):
        manager = CheckpointManager(place, warn=_fail)
        manager.save(checkpoint)
        manager.close()


def read_checkpoints(
    folder: Folder, num_models: int, warn: Callable[[str], None] = _fail
) -> list[Checkpoint] | None:
    """Return the checkpoint of each model of a trial, or None if any is absent.

    Args:
        folder: Folder of the checkpoint.
        num_models: Number of models.
        warn: Receives a message about a damaged checkpoint, which counts as absent.

    Raises:
        OSError: If a checkpoint is damaged, unless there is another `warn`.
    """
    found: list[Checkpoint] = []
    for place in _places(folder, num_models):
        checkpoint = CheckpointManager(place, warn=warn).newest()
        if checkpoint is None:
            return None
        found.append(checkpoint)
    return found


def newest_checkpoint(trial: Folder, num_models: int = 1) -> tuple[Folder, list[Checkpoint]] | None:
    """Return the folder and the content of a trial's newest complete checkpoint, or None."""
    for name in sorted(_checkpoint_names(trial), reverse=True):
        # A killed driver leaves an incomplete copy behind.
        if found := read_checkpoints(trial / name, num_models, warn=lambda _: None):
            return trial / name, found
    return None


def delete_checkpoints(trial: Folder) -> None:
    """Delete Tune's checkpoints of a trial."""
    for name in _checkpoint_names(trial):
        trial.delete(name)


def _places(folder: Folder, num_models: int) -> list[Folder]:
    return [folder] if num_models == 1 else [folder / f"fold-{n + 1}" for n in range(num_models)]


def _checkpoint_names(trial: Folder) -> set[str]:
    names = {path.split("/")[0] for path in trial.names()}
    return {name for name in names if name.startswith("checkpoint_")}
