"""Search for the best hyperparameters and train the best model.

Reads: shards and manifest.json from `prepare`.
Writes: a search folder with the leaderboard, a report page, a folder per trial, and the spec and
run folder of the best trial. Running `tune` again with the same `run.name` resumes an unfinished
search.

Run:   python -m ray_jobs.tune ray_jobs/specs/houses_tune.yaml --run.name search
       python -m ray_jobs.submit tune ray_jobs/specs/houses_tune.yaml
"""

from dataclasses import replace
from typing import Any

import yaml

from ray_jobs.checks.preflight import preflight
from ray_jobs.cluster import connection
from ray_jobs.cluster.capacity import cpu_settings
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.folds import make_folds, read_fold_rows
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import SUMMARY
from ray_jobs.train.job import Run, open_run, require_same, shared_feed
from ray_jobs.tune.results.search_state import Search
from ray_jobs.tune.search.feature_trials import compute_feature_sets, should_use_features
from ray_jobs.tune.search.space import Space

SPEC = "tune.yaml"

_SAME_SEARCH = (
    "run.seed", "data.image_size", "data.text_length", "data.shuffle_window_rows",
    "data.buffer_bytes", "model", "train", "tune",
)  # fmt: skip
"""Settings that must not change when a search resumes."""
_CHANGEABLE = ("budget", "max_concurrent_trials", "max_failures", "checkpoint_every_s", "promote")
"""Settings of `tune` that may change when a search resumes."""
_NO_DECODING = {"decode": "trainer", "cache": "none", "index": None}


def search(spec: RunSpec) -> dict[str, Any]:
    """Run a search, train the best trial in full, and return the summary of the search.

    Raises:
        JobError: If the data, the cluster or the search folder is unsuitable, or every trial
            failed.
        ValueError: If the search space does not fit the other settings.
        Interrupted: If the user stopped the search.
    """
    run = open_run(spec)
    spec, manifest, folder = run.spec, run.manifest, run.folder
    space = Space(spec)
    if not space.distributions:
        raise JobError("tune.space is empty; add at least one setting to search over")
    if folder.exists(SPEC):
        require_same("search", run, SPEC, _SAME_SEARCH, {"tune": _CHANGEABLE})
    if folder.exists(SUMMARY):
        print(f"search {spec.run.name} is already finished: {folder}")
        return folder.read_json(SUMMARY)
    manifest.write(folder)
    folder.write_text(SPEC, yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False))
    train = spec.train
    workers = spec.tune.workers_per_trial or train.workers_range[0]
    gpus = workers * (spec.tune.gpus_per_worker or train.gpus_per_worker)
    # A local Ray needs CPUs for a trial and, afterwards, for training the best trial in full.
    in_full = train.workers_range[0] * train.cpus_per_worker + 1
    with connection.connected(
        spec.run.address,
        num_cpus=max(workers * train.cpus_per_worker, in_full),
        cpu_settings=f"tune.workers_per_trial={workers}, {cpu_settings(train)}",
        num_gpus=gpus if train.use_gpu else 0,
        data_cpus=0,
        worker_logs=spec.run.worker_logs,
        object_store_memory=spec.data.object_store_memory,
    ):
        from ray_jobs.tune.results.best_run import finalize_search

        preflight(spec, manifest)
        results = run_search(run, space)
        return finalize_search(spec, space, folder, results, should_use_features(spec, space))


def run_search(run: Run, space: Space) -> Search:
    """Run the trials of a search on the connected Ray cluster, and return their results.

    Writes the leaderboard and the page even if an error or the user ends the search.

    Raises:
        JobError: If a trial cannot run on the cluster, or every trial failed.
        Interrupted: If the user stopped the search.
    """
    from ray_jobs.tune.results.best_run import write_results
    from ray_jobs.tune.run_trials import run_trials

    spec, folder = run.spec, run.folder
    results = Search(
        name=str(spec.run.name),
        objectives=spec.tune.metrics or (spec.train.monitor,),
        trials=[],
        budget=spec.tune.budget.model_dump(exclude_none=True),
    )
    rows, folds = None, []
    if spec.tune.folds is not None:
        rows = read_fold_rows(Folder(spec.data.prepared), run.manifest)
        folds = make_folds(rows, spec.tune.folds, 1, spec.run.seed, "tune")
        # Each fold has a cache of its own.
        cache_bytes = spec.data.cache_bytes // len(folds)
        run = replace(run, spec=spec.overlay({"data.cache_bytes": cache_bytes}))
    try:
        if should_use_features(spec, space):
            print("computing the missing features of the frozen backbone")
            features = compute_feature_sets(spec, space)
            run_trials(spec, space, folder, results, _NO_DECODING, features, rows, folds)
        else:
            with shared_feed(run) as feed:
                run_trials(spec, space, folder, results, feed, rows=rows, folds=folds)
    finally:
        if results.trials:
            write_results(results, folder)
    return results
