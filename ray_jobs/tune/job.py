"""Search for the settings that train the best model, and train it.

Reads: manifest.json from `prepare`.  Writes: a search folder with a folder of each trial, the
leaderboard, a page, the best trial's specification and its run folder. The same name again goes on
with a search that did not finish.

Run:   python -m ray_jobs.tune ray_jobs/specs/houses_tune.yaml --run.name search
       python -m ray_jobs.submit tune ray_jobs/specs/houses_tune.yaml
"""

from typing import Any

from ray_jobs.cluster import connection
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import SUMMARY
from ray_jobs.train.job import feeding, require_same, require_trainable, resolved, run_folder
from ray_jobs.tune.results.search_state import Objective, Search
from ray_jobs.tune.search.space import Space

SPEC = "tune.yaml"

_MAY_DIFFER = ("budget", "max_concurrent_trials", "max_failures", "checkpoint_every_s", "promote")
"""Settings of `tune` that a search may go on with otherwise."""
_NO_DECODING = {"decode": "trainer", "cache": "none", "index": None}
_SAME_SEARCH = (
    "run.seed", "data.image_size", "data.shuffle_window_rows", "data.buffer_bytes",
    "model", "train", "tune",
)  # fmt: skip
"""Parts of a spec in which a search that goes on must agree with what it was begun with."""


def search(spec: RunSpec) -> dict[str, Any]:
    """Search, train the best, and return the search's summary.

    Raises:
        JobError: if the data, the cluster or the search folder does not allow it, or every trial
            failed.
        ValueError: if the space does not fit the settings.
        Interrupted: if the user stopped it.
    """
    spec = resolved(spec)
    folder = run_folder(spec)
    manifest = read_manifest(Folder(spec.data.prepared))
    space = Space(spec)
    if not space.distributions:
        raise JobError("tune.space is empty; say which settings to search over")
    require_trainable(spec, manifest)
    if folder.exists(SPEC):
        may_differ = {"tune": _MAY_DIFFER}
        require_same("search", spec, manifest, folder, SPEC, _SAME_SEARCH, may_differ)
    if folder.exists(SUMMARY):
        print(f"search {spec.run.name} is finished already: {folder}")
        return folder.read_json(SUMMARY)
    _begin(spec, manifest, folder)
    train = spec.train
    workers = spec.tune.workers_per_trial or train.workers_range[0]
    gpus = workers * (spec.tune.gpus_per_worker or train.gpus_per_worker)
    # A local Ray has room for a trial, and afterwards for the training of the best.
    in_full = train.workers_range[0] * train.cpus_per_worker + 1
    with connection.connected(
        spec.run.address,
        num_cpus=max(workers * train.cpus_per_worker, in_full),
        num_gpus=gpus if train.use_gpu else 0,
        data_cpus=0,
        worker_logs=spec.run.worker_logs,
        object_store_memory=spec.data.object_store_memory,
    ):
        from ray_jobs.checks.preflight import preflight
        from ray_jobs.tune.results.best_run import finish_search
        from ray_jobs.tune.search.feature_trials import uses_features

        preflight(spec, manifest)
        found = trials_of(spec, manifest, space)
        return finish_search(spec, space, folder, found, uses_features(spec, space))


def trials_of(spec: RunSpec, manifest: Manifest, space: Space) -> Search:
    """Run the trials of a search, in the Ray that is connected, and return how they ended.

    Leaderboard and page are written in any case.

    Raises:
        JobError: as `search`.
        Interrupted: likewise.
    """
    from ray_jobs.tune.results.best_run import write_results
    from ray_jobs.tune.run_trials import run_trials
    from ray_jobs.tune.search.feature_trials import all_features, uses_features

    folder = run_folder(spec)
    found = Search(
        name=str(spec.run.name),
        objectives=objectives_of(spec),
        trials=[],
        budget=spec.tune.budget.model_dump(exclude_none=True),
    )
    try:
        if uses_features(spec, space):
            print("features of the frozen backbone: computing those that are not there yet")
            features = all_features(spec, space)
            run_trials(spec, space, folder, found, _NO_DECODING, features)
        else:
            with feeding(spec, manifest) as feed:
                run_trials(spec, space, folder, found, feed)
    finally:
        if found.trials:
            write_results(found, folder)
    return found


def objectives_of(spec: RunSpec) -> list[Objective]:
    """Return what a search improves."""
    from ray_jobs.train.telemetry.console import FALLING

    metrics = spec.tune.metrics or (spec.train.monitor,)
    return [Objective(metric, "min" if metric in FALLING else "max") for metric in metrics]


def _begin(spec: RunSpec, manifest: Manifest, folder: Folder) -> None:
    import yaml

    manifest.write(folder)
    folder.write_text(SPEC, yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False))
