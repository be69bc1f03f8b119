"""Runs searches of tiny trials, and checks that nothing of them remains on the cluster."""

import time
from pathlib import Path
from typing import Any

from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest
from ray_jobs.train.job import open_run
from ray_jobs.tune import job
from ray_jobs.tune.results.search_state import Search
from ray_jobs.tune.search.space import Space
from tests.ray_jobs.tiny import write_prepared

SPACE = {
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "model.dropout": {"uniform": [0.1, 0.5]},
}


def spec_in(folder: Path, **changes: Any) -> RunSpec:
    """Return a search on the data in a folder; `tune__scheduler="pbt"` changes a setting."""
    tree = {
        "run": {"storage_path": str(folder / "runs"), "name": "search"},
        "data": {"prepared": str(folder / "prepared")},
        "model": {
            "image": {"kind": "tiny", "weights": None, "units": 8},
            "numeric": {"units": [8]},
            "fusion": {"units": 8},
        },
        "train": {"global_batch_size": 16, "epochs": 4, "max_failures": 0},
        "tune": {"space": SPACE, "budget": {"trials": 4}, "max_concurrent_trials": 2},
    }
    spec = RunSpec.model_validate(tree)
    return spec.overlay({name.replace("__", "."): value for name, value in changes.items()})


def prepare_in(folder: Path) -> Manifest:
    """Write prepared data for `spec_in`."""
    return write_prepared(folder / "prepared", {"train": 64, "validation": 32, "test": 32})


def run_search(spec: RunSpec) -> Search:
    """Run the trials of a search on the connected Ray."""
    run = open_run(spec)
    return job.run_search(run, Space(run.spec))


def require_nothing_left(timeout_s: float = 20.0) -> None:
    """Wait until no actor and no placement group remains and all resources are free."""
    deadline = time.monotonic() + timeout_s
    while (left := _remaining()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left


def _remaining() -> dict[str, Any]:
    import ray
    from ray.util import placement_group_table
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address
    actors = list_actors(address=address, filters=[("state", "!=", "DEAD")], detail=True)
    groups = [group["state"] for group in placement_group_table().values()]
    total, free = ray.cluster_resources(), ray.available_resources()
    held = {name: total[name] - free.get(name, 0) for name in ("CPU", "GPU") if name in total}
    left = {
        # Ray Data keeps some detached actors without CPUs while the cluster exists.
        "actors": [actor.class_name for actor in actors if not actor.is_detached],
        "placement groups": [state for state in groups if state != "REMOVED"],
        "held": {name: amount for name, amount in held.items() if amount > 1e-6},
    }
    return {kind: items for kind, items in left.items() if items}
