import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint import Checkpoint, LoopState
from ray_jobs.tune.job import objectives_of
from ray_jobs.tune.results.search_state import PARTS
from ray_jobs.tune.search.space import Space
from ray_jobs.tune.trials.trial import ENDED, ERROR, Job, seconds_of
from tests.ray_jobs.tune.searches import prepared_in, spec_in


def trial_class() -> Any:
    from ray_jobs.tune.trials.trial import Trial

    class Local(Trial):
        """A trial that Tune does not run, and that shows what is in it."""

        name = "first"

        def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
            super().setup(config["values"], config["job"])

        @property
        def trial_id(self) -> str:
            return self.name

        def become(self, name: str, **values: float) -> None:
            self.name = name
            assert self.reset_config(settings(**values))

        def saved(self) -> list[Checkpoint]:
            """What each worker's model and optimizer hold after an epoch."""
            import ray

            state = self.done.state
            others = ray.get([member.saved.remote(state) for member in self.group.others])
            return [self.group.saved(state), *others]

        def step_from(self) -> tuple[Checkpoint, dict[str, Any]]:
            """Return what model and optimizer hold before the next step, and the epoch's result."""
            self._start()
            first, begun = self.group.first, []
            before = first._hooks.before_step

            def look(step: int, num_steps: int) -> None:
                if not begun:
                    begun.append(first.saved(LoopState()))
                before(step, num_steps)

            first._hooks.before_step = look
            result = self._epoch()
            return begun[0], result

        def restore_from(self, path: str) -> None:
            """Restore as Tune does, which hands over what a checkpoint came with."""
            from ray.tune import Checkpoint
            from ray.tune.trainable.trainable import _TrainingResult

            self.restore(_TrainingResult(Checkpoint.from_directory(path), {}))

        def fresh_run(self, **values: float) -> Checkpoint:
            """What the run that `train` would make of some values ends with, in this process."""
            from ray_jobs.cluster.strategy import WorkerContext
            from ray_jobs.data.manifest import read_manifest
            from ray_jobs.train.loop import Loop

            spec = self.job.spec_of(settings(**values))
            loop = Loop(spec, read_manifest(Folder(spec.data.prepared)), WorkerContext())
            return loop.snapshots.take(loop.run().state, {}, {})

    return Local


def settings(learning_rate: float, dropout: float) -> dict[str, float]:
    return {"train.learning_rate": learning_rate, "model.dropout": dropout}


@contextmanager
def actor(folder: Path, num_workers: int) -> Iterator[Callable[..., Any]]:
    """A trial in a process of its own, with its workers, as Tune would have it: call(method, …)."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    spec = spec_in(folder, model__activation="silu")
    job = Job(
        space=Space(spec),
        trials=Folder(folder / f"trials-{num_workers}"),
        objectives=tuple(objectives_of(spec)),
        num_workers=num_workers,
        gpus_per_worker=None,
        checkpoint_every_s=1000.0,
        feeding={"decode": "trainer", "cache": "none", "index": None},
    )
    place = placement_group([{"CPU": 1}] * num_workers)
    here = PlacementGroupSchedulingStrategy(place, 0)
    made = ray.remote(trial_class()).options(num_cpus=1, scheduling_strategy=here)
    trial = made.remote({"values": settings(1e-3, 0.4), "job": job})
    try:
        yield lambda method, *a, **named: ray.get(getattr(trial, method).remote(*a, **named))
    finally:
        ray.kill(trial)
        remove_placement_group(place)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trial")
    prepared_in(folder)
    return folder


@pytest.fixture(scope="module")
def call(ray_local, data) -> Iterator[Callable[..., Any]]:
    with actor(data, num_workers=1) as call:
        yield call


def require_same(one: Checkpoint, other: Checkpoint, rtol: float = 0.0) -> None:
    for part in ("model", "optimizer"):
        ours, theirs = getattr(one, part), getattr(other, part)
        # By place: Keras numbers unnamed layers by process.
        for name, array, other_name in zip(ours, ours.values(), theirs, strict=True):
            expected = theirs[other_name]
            np.testing.assert_allclose(array, expected, rtol, 1e-3 * rtol, err_msg=name)


def test_a_trial_in_a_warm_process_is_the_run_that_train_would_make(call):
    call("step")
    call("become", "warm", learning_rate=3e-3, dropout=0.2)
    results = [call("step") for _ in range(4)]
    assert [result["epochs"] for result in results] == [1, 2, 3, 4]
    assert [result["done"] for result in results] == [False, False, False, True]
    expected = call("fresh_run", learning_rate=3e-3, dropout=0.2)
    # But for rounding: the graph of the trial before reads its numbers from variables.
    require_same(call("saved")[0], expected, rtol=1e-4)
    history = [record["val/log_loss"] for record in expected.state.history]
    assert [result["val/log_loss"] for result in results] == pytest.approx(history, rel=1e-6)
    assert results[-1]["best/val/log_loss"] == pytest.approx(min(history), rel=1e-6)
    seconds = seconds_of(results[-1])
    assert set(seconds) == set(PARTS)
    assert all(seconds[part] > 0 for part in ("start", "data", "compute", "validation"))


def test_a_clone_starts_from_exactly_what_the_donor_had(call, tmp_path):
    call("become", "donor", learning_rate=3e-3, dropout=0.2)
    for _ in range(2):
        call("step")
    (donor,) = call("saved")
    call("save", str(tmp_path / "checkpoint"))
    call("step")  # What the donor learns later is not the clone's.
    call("become", "clone", learning_rate=1e-4, dropout=0.4)
    call("step")
    call("become", "clone", learning_rate=4e-3, dropout=0.3)
    call("restore", str(tmp_path / "checkpoint"))
    begun, result = call("step_from")
    require_same(begun, donor)
    # The schedule goes on where the donor was (11 of 15 steps after the warm-up), from the clone's
    # own peak.
    assert (result["epochs"], result["step"]) == (3, 12)
    rate = 4e-3 * (1 + math.cos(math.pi * 11 / 15)) / 2
    assert result["train/learning_rate"] == pytest.approx(rate, rel=1e-5)


def test_an_error_of_the_trials_own_is_its_result_and_the_process_goes_on(call, tmp_path):
    call("become", "diverges", learning_rate=1e30, dropout=0.2)
    result = call("step")
    assert result["done"]
    assert result[ERROR].startswith("ValueError: ")
    assert "lower train.learning_rate=1e+30" in result[ERROR]
    call("save", str(tmp_path / "nothing"))
    call("become", "converges", learning_rate=1e-3, dropout=0.2)
    assert "val/log_loss" in call("step")


def test_a_trial_whose_end_was_written_down_is_not_run_again(call, data):
    folder = data / "trials-1/ended"
    folder.mkdir(parents=True)
    (folder / ENDED).write_text(json.dumps({"epochs": 4, "best/val/log_loss": 0.5}))
    call("become", "ended", learning_rate=1e-3, dropout=0.2)
    result = call("step")
    assert {name: result[name] for name in ("epochs", "best/val/log_loss", "done")} == {
        "epochs": 4, "best/val/log_loss": 0.5, "done": True,
    }  # fmt: skip


def test_a_trial_whose_checkpoint_is_gone_goes_on_from_its_newest_whole_one(call, data):
    folder = data / "trials-1/gone"
    call("become", "gone", learning_rate=2e-3, dropout=0.2)
    for number in (1, 2, 3):
        call("step")
        call("save", str(folder / f"checkpoint_{number:06d}"))
    # The driver was killed while the last one was copied.
    (folder / "checkpoint_000003/checkpoints/steps/00000012/model.npz").unlink()
    call("become", "gone", learning_rate=2e-3, dropout=0.2)
    call("restore_from", str(folder / "checkpoint_000000"))
    assert call("step")["epochs"] == 3
    # Another trial's is not made up for: its clone would not be one.
    with pytest.raises(Exception, match="does not exist on storage"):
        call("restore_from", str(data / "trials-1/other/checkpoint_000000"))


def test_a_trial_leaves_a_run_folder_behind(call, data, tmp_path):
    call("become", "leaves", learning_rate=2e-3, dropout=0.2)
    call("step")
    call("save", str(tmp_path / "checkpoint"))
    folder = data / "trials-1/leaves"
    names = {path.name for path in folder.iterdir()}
    assert names == {"run.yaml", "manifest.json", "environment.json", "history.jsonl"}
    assert len((folder / "history.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "checkpoint/checkpoints/steps/00000004/state.json").exists()


@pytest.mark.slow
@pytest.mark.multiworker
def test_both_workers_of_a_clone_start_from_what_the_donor_had(ray_local, data, tmp_path):
    with actor(data, num_workers=2) as call:
        call("become", "donor", learning_rate=3e-3, dropout=0.2)
        for _ in range(2):
            call("step")
        donor, of_the_other = call("saved")
        # Batch norms' statistics are agreed on at the end of an epoch.
        require_same(of_the_other, donor)
        call("save", str(tmp_path / "checkpoint"))
        call("become", "clone", learning_rate=1e-4, dropout=0.4)
        call("step")
        call("become", "clone", learning_rate=1e-3, dropout=0.3)
        call("restore", str(tmp_path / "checkpoint"))
        begun, result = call("step_from")
        require_same(begun, donor)
        assert result["epochs"] == 3
