"""Tunes distributed training as in Ray's documentation; a baseline for `benchmarks.tuning`.

Each trial is a function that calls `fit()` of a trainer with `TuneReportCallback`, so it starts a
process for the trial, a controller and a worker.
"""

from typing import Any

import numpy as np

from ray_jobs.config.spec import RunSpec
from ray_jobs.config.tune_spec import DistributionSpec
from ray_jobs.train.callbacks import Callbacks, CopyCheckpoint
from ray_jobs.tune.search.space import Space


class _Report(Callbacks):
    def on_epoch(self, record: dict[str, Any], copy: CopyCheckpoint) -> None:
        import ray.train

        ray.train.report(record)


def train_on_worker(config: dict[str, Any]) -> None:
    """Train on the worker of a trial."""
    from ray_jobs.cluster.strategy import WorkerContext, set_devices
    from ray_jobs.data.loader import FeedOptions
    from ray_jobs.data.manifest import read_manifest
    from ray_jobs.storage.folder import Folder
    from ray_jobs.train.loop import Loop

    set_devices(1, use_gpu=False)
    spec = RunSpec.model_validate(config)
    manifest = read_manifest(Folder(spec.data.prepared))
    Loop(spec, manifest, WorkerContext(), feed_options=FeedOptions(data=spec.data)).run(_Report())


def run_documented(spec: RunSpec, max_concurrent: int) -> list[str]:
    """Run the trials of a search as documented, and return their states."""
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from ray_jobs.cluster.tf_backend import KerasTrainer

    space, storage, count = Space(spec), spec.run.storage_path, spec.tune.budget.trials

    def trial(values: dict[str, Any]) -> None:
        KerasTrainer(
            train_on_worker,
            train_loop_config=space.spec_of(values).model_dump(mode="json"),
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name=f"{spec.run.name}-{tune.get_context().get_trial_id()}",
                storage_path=f"{storage}/documented",
                callbacks=[TuneReportCallback()],
            ),
        ).fit()

    rng = np.random.default_rng(0)
    points = [space.values(lambda _, values: _draw(rng, values)) for _ in range(count)]
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 1}),
        # The points replace these values.
        param_space=points[0],
        tune_config=tune.TuneConfig(
            search_alg=BasicVariantGenerator(
                points_to_evaluate=points, max_concurrent=max_concurrent
            ),
            num_samples=count,
        ),
        run_config=tune.RunConfig(storage_path=f"{storage}/documented-tune", verbose=0),
    )
    return ["failed" if result.error else "finished" for result in tuner.fit()]


def _draw(rng: np.random.Generator, values: DistributionSpec) -> Any:
    if values.kind == "choice":
        return values.values()[rng.integers(len(values.values()))]
    if values.is_log:
        return float(np.exp(rng.uniform(np.log(values.low), np.log(values.high))))
    return float(rng.uniform(values.low, values.high))
