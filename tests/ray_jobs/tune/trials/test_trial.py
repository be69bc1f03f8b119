import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.config.spec import RunSpec
from ray_jobs.data.folds import make_folds, read_fold_rows
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint import Checkpoint, LoopState
from ray_jobs.train.job import run_folder
from ray_jobs.tune.results.search_state import PARTS
from ray_jobs.tune.search.space import Space
from ray_jobs.tune.trials.trial import ENDED, ERROR, SearchContext, seconds_of
from tests.ray_jobs.tune.searches import spec_in


def trial_class() -> Any:
    from ray_jobs.tune.trials.trial import Trial

    class Local(Trial):
        """A trial that runs without Tune and returns its checkpoints."""

        name = "first"

        def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
            super().setup(config["values"], config["context"])

        @property
        def trial_id(self) -> str:
            return self.name

        def start(self, name: str, **values: float) -> None:
            self.name = name
            assert self.reset_config(settings(**values))

        def saved(self) -> list[Checkpoint]:
            """Return a checkpoint of each worker after an epoch."""
            import ray

            (state,), group = self.states, self.group
            others = ray.get([worker.take_checkpoint.remote(state) for worker in group.remote])
            return [group.local.take_checkpoint(state), *others]

        def step_from(self) -> tuple[Checkpoint, dict[str, Any]]:
            """Return a checkpoint from before the next step, and the result of the epoch."""
            self._start()
            worker, initial = self.group.local, []
            before = worker.callbacks.before_step

            def save_first(step: int, num_steps: int) -> None:
                if not initial:
                    initial.append(worker.take_checkpoint(LoopState()))
                before(step, num_steps)

            worker.callbacks.before_step = save_first
            result = self._train_epoch()
            return initial[0], result

        def restore_from(self, path: str) -> None:
            """Restore as Tune does, which passes the result that a checkpoint belongs to."""
            from ray.tune import Checkpoint
            from ray.tune.trainable.trainable import _TrainingResult

            self.restore(_TrainingResult(Checkpoint.from_directory(path), {}))

        def fresh_run(self, **values: float) -> Checkpoint:
            """Return the final checkpoint of a training with some values in this process."""
            spec = self.context.spec_of(settings(**values))
            return self.fresh_run_of(spec, Folder(spec.data.prepared))

        def fresh_folds(self, **values: float) -> list[Checkpoint]:
            """Return the final checkpoint of each fold, trained alone in this process."""
            specs = self.context.begin_trial(self.context.spec_of(settings(**values), "alone"))
            return [self.fresh_run_of(spec, run_folder(spec)) for spec in specs]

        def fresh_run_of(self, spec: RunSpec, folder: Folder) -> Checkpoint:
            from ray_jobs.cluster.strategy import WorkerContext
            from ray_jobs.train.loop import Loop

            loop = Loop(spec, read_manifest(folder), WorkerContext())
            return loop.snapshots.take(loop.run(), {}, {})

    return Local


def settings(learning_rate: float, dropout: float) -> dict[str, float]:
    return {"train.learning_rate": learning_rate, "model.dropout": dropout}


@contextmanager
def actor(
    folder: Path, num_workers: int, num_folds: int | None = None
) -> Iterator[Callable[..., Any]]:
    """Start a trial with its workers in actors, as Tune does; yields `call(method, …)`."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    spec = spec_in(folder, model__activation="silu")
    rows = read_fold_rows(Folder(spec.data.prepared), read_manifest(Folder(spec.data.prepared)))
    context = SearchContext(
        space=Space(spec),
        trials=Folder(folder / f"trials-{num_workers}-{num_folds}"),
        objectives=(spec.train.monitor,),
        num_workers=num_workers,
        gpus_per_worker=None,
        checkpoint_every_s=1000.0,
        feeding={"decode": "trainer", "cache": "none", "index": None},
        rows=rows if num_folds else None,
        folds=make_folds(rows, num_folds, 1, 0) if num_folds else (),
    )
    placement = placement_group([{"CPU": 1}] * num_workers)
    strategy = PlacementGroupSchedulingStrategy(placement, 0)
    trial_actor = ray.remote(trial_class()).options(num_cpus=1, scheduling_strategy=strategy)
    trial = trial_actor.remote({"values": settings(1e-3, 0.4), "context": context})
    try:
        yield lambda method, *a, **named: ray.get(getattr(trial, method).remote(*a, **named))
    finally:
        ray.kill(trial)
        remove_placement_group(placement)


@pytest.fixture(scope="module")
def call(ray_local, data) -> Iterator[Callable[..., Any]]:
    with actor(data, num_workers=1) as call:
        yield call


def require_same(one: Checkpoint, other: Checkpoint, rtol: float = 0.0) -> None:
    for part in ("model", "optimizer"):
        ours, theirs = getattr(one, part), getattr(other, part)
        # By position, because Keras numbers unnamed layers per process.
        for name, array, other_name in zip(ours, ours.values(), theirs, strict=True):
            expected = theirs[other_name]
            np.testing.assert_allclose(array, expected, rtol, 1e-3 * rtol, err_msg=name)


def test_a_trial_in_a_reused_process_equals_a_new_training(call):
    call("step")
    call("start", "warm", learning_rate=3e-3, dropout=0.2)
    results = [call("step") for _ in range(4)]
    assert [result["epochs"] for result in results] == [1, 2, 3, 4]
    assert [result["done"] for result in results] == [False, False, False, True]
    expected = call("fresh_run", learning_rate=3e-3, dropout=0.2)
    # Only rounding differs: the reused graph reads hyperparameters from variables.
    require_same(call("saved")[0], expected, rtol=1e-4)
    history = [record["val/log_loss"] for record in expected.state.history]
    assert [result["val/log_loss"] for result in results] == pytest.approx(history, rel=1e-6)
    assert results[-1]["best/val/log_loss"] == pytest.approx(min(history), rel=1e-6)
    seconds = seconds_of(results[-1])
    assert set(seconds) == set(PARTS)
    assert all(seconds[part] > 0 for part in ("start", "data", "compute", "validation"))


def test_a_clone_starts_from_exactly_the_donors_checkpoint(call, tmp_path):
    call("start", "donor", learning_rate=3e-3, dropout=0.2)
    for _ in range(2):
        call("step")
    (donor,) = call("saved")
    call("save", str(tmp_path / "checkpoint"))
    call("step")  # The clone does not receive what the donor learns later.
    call("start", "clone", learning_rate=1e-4, dropout=0.4)
    call("step")
    call("start", "clone", learning_rate=4e-3, dropout=0.3)
    call("restore", str(tmp_path / "checkpoint"))
    initial, result = call("step_from")
    require_same(initial, donor)
    # The schedule continues at the donor's step (11 of 15 after the warm-up), with the clone's
    # own peak.
    assert (result["epochs"], result["step"]) == (3, 12)
    rate = 4e-3 * (1 + math.cos(math.pi * 11 / 15)) / 2
    assert result["train/learning_rate"] == pytest.approx(rate, rel=1e-5)


def test_a_failed_trial_returns_its_error_and_the_process_continues(call, tmp_path):
    call("start", "diverges", learning_rate=1e30, dropout=0.2)
    result = call("step")
    assert result["done"]
    assert "lower train.learning_rate=1e+30" in result[ERROR]
    call("save", str(tmp_path / "nothing"))
    call("start", "converges", learning_rate=1e-3, dropout=0.2)
    assert "val/log_loss" in call("step")


def test_a_trial_with_a_recorded_end_is_not_run_again(call, data):
    folder = data / "trials-1-None/ended"
    folder.mkdir(parents=True)
    (folder / ENDED).write_text(json.dumps({"epochs": 4, "best/val/log_loss": 0.5}))
    call("start", "ended", learning_rate=1e-3, dropout=0.2)
    result = call("step")
    assert (result["epochs"], result["best/val/log_loss"], result["done"]) == (4, 0.5, True)


def test_a_trial_whose_checkpoint_is_gone_continues_from_its_newest_complete_one(call, data):
    folder = data / "trials-1-None/gone"
    call("start", "gone", learning_rate=2e-3, dropout=0.2)
    for number in (1, 2, 3):
        call("step")
        call("save", str(folder / f"checkpoint_{number:06d}"))
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {
        "run.yaml", "manifest.json", "environment.json", "reference.parquet", "history.jsonl",
    }  # fmt: skip
    assert len((folder / "history.jsonl").read_text().splitlines()) == 3
    # As if the driver was killed while it copied the last checkpoint.
    (folder / "checkpoint_000003/checkpoints/steps/00000012/model.npz").unlink()
    call("start", "gone", learning_rate=2e-3, dropout=0.2)
    call("restore_from", str(folder / "checkpoint_000000"))
    assert call("step")["epochs"] == 3
    # There is no substitute for another trial's checkpoint, which a clone needs.
    with pytest.raises(Exception, match="does not exist on storage"):
        call("restore_from", str(data / "trials-1-None/other/checkpoint_000000"))


@pytest.mark.slow
def test_a_trial_on_folds_has_the_mean_of_their_scores_and_continues(ray_local, data, tmp_path):
    with actor(data, num_workers=1, num_folds=3) as call:
        call("step")  # Starts TensorFlow.
        expected = call("fresh_folds", learning_rate=3e-3, dropout=0.2)
        histories = [
            [record["val/log_loss"] for record in checkpoint.state.history]
            for checkpoint in expected
        ]
        assert len(histories) == 3
        means = np.mean(histories, axis=0)
        # The second trial reuses the graphs of the first one.
        for name in ("first", "second"):
            call("start", name, learning_rate=3e-3, dropout=0.2)
            results = [call("step") for _ in range(2)]
            call("save", str(tmp_path / name))
            results += [call("step") for _ in range(2)]
            assert [result["val/log_loss"] for result in results] == pytest.approx(means, rel=1e-5)
            assert [result["done"] for result in results] == [False, False, False, True]
            best = np.mean([min(history) for history in histories])
            assert results[-1]["best/val/log_loss"] == pytest.approx(best, rel=1e-5)
        names = {path.name for path in (tmp_path / "first").iterdir()}
        assert names >= {"fold-1", "fold-2", "fold-3"}
        call("start", "continued", learning_rate=3e-3, dropout=0.2)
        call("restore", str(tmp_path / "first"))
        again = [call("step") for _ in range(2)]
        assert [result["val/log_loss"] for result in again] == [
            result["val/log_loss"] for result in results[2:]
        ]


@pytest.mark.slow
@pytest.mark.multiworker
def test_both_workers_of_a_clone_start_from_the_donors_checkpoint(ray_local, data, tmp_path):
    with actor(data, num_workers=2) as call:
        call("start", "donor", learning_rate=3e-3, dropout=0.2)
        for _ in range(2):
            call("step")
        donor, second_worker = call("saved")
        # Workers average the batch norm statistics at the end of an epoch.
        require_same(second_worker, donor)
        call("save", str(tmp_path / "checkpoint"))
        call("start", "clone", learning_rate=1e-4, dropout=0.4)
        call("step")
        call("start", "clone", learning_rate=1e-3, dropout=0.3)
        call("restore", str(tmp_path / "checkpoint"))
        initial, result = call("step_from")
        require_same(initial, donor)
        assert result["epochs"] == 3
