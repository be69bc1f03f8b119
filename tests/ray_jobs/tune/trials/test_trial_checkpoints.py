import numpy as np
import pytest

from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint import Checkpoint, LoopState
from ray_jobs.tune.trials.trial_checkpoints import (
    newest_checkpoint,
    read_checkpoints,
    write_checkpoints,
)


@pytest.mark.parametrize("num_models", [1, 3])
def test_a_damaged_checkpoint_is_an_error_unless_an_earlier_one_can_replace_it(
    tmp_path, num_models
):
    trial = Folder(tmp_path)
    for number in (1, 2):
        arrays = [{"00000 w": np.full(2, 10.0 * number + i)} for i in range(num_models)]
        saved = [Checkpoint(LoopState(step=number), model, {}) for model in arrays]
        write_checkpoints(trial / f"checkpoint_{number:06d}", saved)
    read = read_checkpoints(trial / "checkpoint_000002", num_models)
    assert read is not None
    assert [c.model["00000 w"][0] for c in read] == [20.0 + i for i in range(num_models)]
    assert read_checkpoints(trial / "checkpoint_000003", num_models) is None
    # Of the last model.
    sorted((tmp_path / "checkpoint_000002").rglob("model.npz"))[-1].write_bytes(b"damaged")
    with pytest.raises(OSError, match="damaged"):
        read_checkpoints(trial / "checkpoint_000002", num_models)
    found = newest_checkpoint(trial, num_models)
    assert found is not None
    assert found[0].uri.endswith("checkpoint_000001")
    assert [c.state.step for c in found[1]] == [1] * num_models
