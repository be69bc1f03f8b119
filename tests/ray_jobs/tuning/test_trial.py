import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.checkpoint import LoopState, Saved
from ray_jobs.spec import RunSpec
from ray_jobs.storage import Folder
from ray_jobs.tune import objectives_of
from ray_jobs.tuning.result import PARTS
from ray_jobs.tuning.space import Space
from ray_jobs.tuning.trial import ENDED, ERROR, Job, seconds_of
from tests.ray_jobs.tuning.searches import prepared_in, spec_in

FEED = {"decode": "trainer", "cache": "none", "index": None}


def job_of(spec: RunSpec, folder: Path, num_workers: int = 1) -> Job:
    return Job(
        space=Space(spec),
        trials=Folder(folder / "trials"),
        objectives=tuple(objectives_of(spec)),
        num_workers=num_workers,
        gpus_per_worker=None,
        checkpoint_every_s=1000.0,
        feeding=FEED,
    )


def trial_class(job: Job) -> Any:
    from ray_jobs.tuning.trial import Trial

    class Local(Trial):
        def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
            super().setup(config, job)

        @property
        def trial_id(self) -> str:
            return "one"

        def step_from(self) -> tuple[Saved, dict[str, Any]]:
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

        def weights_of_all(self) -> list[dict[str, np.ndarray]]:
            import ray

            state = self.done.state
            others = ray.get([member.saved.remote(state) for member in self.group.others])
            return [saved.model for saved in (self.group.saved(state), *others)]

    return Local


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trial")
    prepared_in(folder)
    return folder


def require_same(one: Saved, other: Saved) -> None:
    for part in ("model", "optimizer"):
        ours, theirs = getattr(one, part), getattr(other, part)
        # By place: Keras numbers unnamed layers by process.
        for name, array, other_name in zip(ours, ours.values(), theirs, strict=True):
            np.testing.assert_array_equal(array, theirs[other_name], err_msg=name)


def test_a_trial_in_a_warm_process_is_the_run_that_train_would_make(ray_local, data, tmp_path):
    from ray_jobs.loop import Loop
    from ray_jobs.manifest import read_manifest
    from ray_jobs.replicas import Place

    spec = spec_in(data)
    job = job_of(spec, tmp_path)
    values = {"train.learning_rate": 3e-3, "model.dropout": 0.2}
    trial = trial_class(job)({"train.learning_rate": 1e-3, "model.dropout": 0.4})
    trial.step()
    assert trial.reset_config(values)
    results = [trial.step() for _ in range(4)]
    assert [result["epochs"] for result in results] == [1, 2, 3, 4]
    assert [result["done"] for result in results] == [False, False, False, True]
    loop = Loop(job.spec_of(values), read_manifest(Folder(data / "prepared")), Place())
    outcome = loop.run()
    expected = loop.snapshots.take(outcome.state, {}, {})
    require_same(trial.group.saved(trial.done.state), expected)
    history = [record["val/log_loss"] for record in outcome.state.history]
    assert [result["val/log_loss"] for result in results] == history
    assert results[-1]["best/val/log_loss"] == min(history)
    seconds = seconds_of(results[-1])
    assert set(seconds) == set(PARTS)
    assert all(seconds[part] > 0 for part in ("start", "data", "compute", "validation"))


def test_a_clone_starts_from_exactly_what_the_donor_had(ray_local, data, tmp_path):
    job = job_of(spec_in(data), tmp_path)
    donor = trial_class(job)({"train.learning_rate": 3e-3, "model.dropout": 0.2})
    for _ in range(2):
        donor.step()
    expected = donor.group.saved(donor.done.state)
    donor.save(str(tmp_path / "checkpoint"))
    donor.step()  # What the donor learns later is not the clone's.
    clone = trial_class(job)({"train.learning_rate": 1e-4, "model.dropout": 0.4})
    clone.step()
    clone.reset_config({"train.learning_rate": 4e-3, "model.dropout": 0.3})
    clone.restore(str(tmp_path / "checkpoint"))
    begun, record = clone.step_from()
    require_same(begun, expected)
    # The schedule goes on where the donor was, towards the clone's own peak.
    assert record["epochs"] == 3
    optimizer = clone.group.first._loop.optimizer
    assert int(optimizer.iterations.numpy()) == record["step"] == 12
    own = clone.group.first._loop.spec.train
    assert (own.learning_rate, clone.group.first._loop.spec.model.dropout) == (4e-3, 0.3)


@pytest.mark.multiworker
def test_both_workers_of_a_clone_start_from_what_the_donor_had(ray_local, data, tmp_path):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    job = job_of(spec_in(data), tmp_path, num_workers=2)
    place = placement_group([{"CPU": 1}] * 2)
    here = PlacementGroupSchedulingStrategy(place, 0)
    actor = ray.remote(trial_class(job)).options(num_cpus=1, scheduling_strategy=here)
    trial = actor.remote({"train.learning_rate": 3e-3, "model.dropout": 0.2})
    try:
        for _ in range(2):
            ray.get(trial.step.remote())
        donor = ray.get(trial.weights_of_all.remote())
        ray.get(trial.save.remote(str(tmp_path / "checkpoint")))
        ray.get(trial.reset_config.remote({"train.learning_rate": 1e-4, "model.dropout": 0.4}))
        ray.get(trial.step.remote())
        assert ray.get(
            trial.reset_config.remote({"train.learning_rate": 1e-3, "model.dropout": 0.3})
        )
        ray.get(trial.restore.remote(str(tmp_path / "checkpoint")))
        begun, record = ray.get(trial.step_from.remote())
        for name, array in donor[0].items():
            np.testing.assert_array_equal(begun.model[name], array, err_msg=name)
            # Batch norms' statistics are agreed on at the end of an epoch.
            np.testing.assert_array_equal(donor[1][name], array, err_msg=name)
        assert record["epochs"] == 3
    finally:
        ray.kill(trial)
        remove_placement_group(place)


def test_an_error_of_the_trials_own_is_its_result_and_the_process_goes_on(
    ray_local, data, tmp_path
):
    job = job_of(spec_in(data), tmp_path)
    trial = trial_class(job)({"train.learning_rate": 1e30, "model.dropout": 0.2})
    result = trial.step()
    assert result["done"]
    assert result[ERROR].startswith("ValueError: ")
    assert "lower train.learning_rate=1e+30" in result[ERROR]
    trial.save(str(tmp_path / "nothing"))
    trial.reset_config({"train.learning_rate": 1e-3, "model.dropout": 0.2})
    assert "val/log_loss" in trial.step()


def test_a_trial_whose_end_was_written_down_is_not_run_again(ray_local, data, tmp_path):
    job = job_of(spec_in(data), tmp_path)
    folder = tmp_path / "trials/one"
    folder.mkdir(parents=True)
    (folder / ENDED).write_text(json.dumps({"epochs": 4, "best/val/log_loss": 0.5}))
    trial = trial_class(job)({"train.learning_rate": 1e-3, "model.dropout": 0.2})
    assert trial.step() == {"epochs": 4, "best/val/log_loss": 0.5, "done": True}


def test_a_trial_leaves_a_run_folder_behind(ray_local, data, tmp_path):
    job = job_of(spec_in(data), tmp_path)
    trial = trial_class(job)({"train.learning_rate": 2e-3, "model.dropout": 0.2})
    trial.step()
    trial.save(str(tmp_path / "checkpoint"))
    folder = tmp_path / "trials/one"
    names = {path.name for path in folder.iterdir()}
    assert names == {"run.yaml", "manifest.json", "environment.json", "history.jsonl"}
    assert len((folder / "history.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "checkpoint/checkpoints/steps/00000004/state.json").exists()
