"""Train the fusion model on prepared shards.

Reads: the shards and manifest.json from `prepare`.  Writes: a run folder with checkpoints, history
and the best model, calibrated. The same run name again resumes a run that did not finish.

Run:   python -m ray_jobs.train ray_jobs/specs/houses.yaml --run.name first
       python -m ray_jobs.submit train ray_jobs/specs/houses.yaml
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ray_jobs.cluster import connection
from ray_jobs.cluster.environment import describe_environment
from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest, read_manifest, require_shards
from ray_jobs.data.sampler import TrainingSampler
from ray_jobs.storage.folder import Folder
from ray_jobs.train.coordinator import make_coordinator
from ray_jobs.train.finalize import SUMMARY, is_finished
from ray_jobs.train.supervisor import fit_once, run_attempts
from ray_jobs.train.telemetry import console
from ray_jobs.train.telemetry.history import Tracker, require_tracking
from ray_jobs.train.worker import train_on_worker

S = TypeVar("S", bound=RunSpec)

if TYPE_CHECKING:
    from ray.train import UserCallback

SPEC = "run.yaml"

_SAME_RUN = (
    "run.seed", "data.image_size", "data.shuffle_window_rows", "data.buffer_bytes",
    "model", "train",
)  # fmt: skip
"""Parts of a spec in which a resumed run must agree with the one it goes on from, with its data."""
_MAY_DIFFER = (
    "num_workers", "use_gpu", "gpus_per_worker", "cpus_per_worker", "resources_per_worker",
    "checkpoint_every_steps", "keep_checkpoints", "keep_best", "max_failures", "max_preemptions",
    "hang_timeout_s",
)  # fmt: skip
"""Settings of `train` that a run may go on with otherwise: rows and steps stay the same ones. So do
weights but for rounding (which ReLU lets grow), unless a replica computes for itself: with batch
norm of its own rows, or mixup, the number of replicas has a part in them."""


def fit(spec: RunSpec, callbacks: Sequence["UserCallback"] = ()) -> dict[str, Any]:
    """Train a model and return the run's summary.

    Args:
        spec: of the run; without `run.name`, date and time name it.
        callbacks: of Ray Train, run in its controller.

    Raises:
        JobError: if the data, the cluster or the run folder does not allow it, or training failed.
    """
    spec = resolved(spec)
    folder = run_folder(spec)
    manifest = read_manifest(Folder(spec.data.prepared))
    require_trainable(spec, manifest)
    goes_on = folder.exists(SPEC)
    if goes_on:
        require_same("run", spec, manifest, folder, SPEC, _SAME_RUN, {"train": _MAY_DIFFER})
    if is_finished(folder):
        print(f"run {spec.run.name} is finished already: {folder}")
        return _summary(spec, folder)
    spec = require_tracking(spec)
    if not goes_on:
        begin_run(spec, manifest, folder)
    train, started = spec.train, time.monotonic()
    with connection.connected(
        spec.run.address,
        num_cpus=train.workers_range[0] * train.cpus_per_worker,
        num_gpus=train.workers_range[0] * train.gpus_per_worker if train.use_gpu else 0,
        worker_logs=spec.run.worker_logs,
        object_store_memory=spec.data.object_store_memory,
    ):
        from ray_jobs.checks.preflight import preflight

        preflight(spec, manifest)
        # The attempts after the first one find the connection there.
        connecting_s = iter([time.monotonic() - started])
        coordinator = make_coordinator()
        title = _title(spec, manifest, folder)
        with console.shown(coordinator, title), feeding(spec, manifest) as feed:
            config = {
                "spec": spec.model_dump(mode="json"),
                "run": folder.uri,
                "coordinator": coordinator,
                **feed,
            }

            def attempt(num_workers: int) -> None:
                own = {**config, "ray_s": next(connecting_s, 0.0), "began": time.time()}
                fit_once(train, num_workers, train_on_worker, own, folder.uri, callbacks)

            with _end_tracked(spec, folder):
                run_attempts(train, attempt, lambda: is_finished(folder), coordinator)
    summary = _summary(spec, folder)
    _print_summary(summary, folder)
    return summary


def require_trainable(spec: RunSpec, manifest: Manifest) -> None:
    """Check what would end every worker, before any is started.

    Raises:
        JobError: if the data lacks numbers or words for the model, or a step's rows.
        ValueError: likewise.
    """
    numeric = manifest.statistics is not None or bool(manifest.vocabularies)
    if spec.model.numeric.kind != "none" and not numeric:
        raise JobError(
            "the prepared data has no numeric columns and no categories; set "
            "model.numeric.kind=none, or prepare it with some"
        )
    words = [vocabulary.column for vocabulary in manifest.vocabularies]
    if absent := [name for name in spec.data.categorical if name not in words]:
        raise JobError(
            f"data.categorical names {absent}, of which the prepared data holds no words (it has "
            f"{words or 'none'}); prepare it again with these settings"
        )
    train = manifest.splits["train"]
    TrainingSampler.of(train, spec.train.global_batch_size, spec.run.seed, spec.data)
    require_shards(Folder(spec.data.prepared), manifest)


def run_folder(spec: RunSpec) -> Folder:
    """Return the folder of a run that has a name."""
    return Folder(spec.run.storage_path) / str(spec.run.name)


def resolved(spec: RunSpec) -> RunSpec:
    """Return a spec with a name, and with paths that mean the same everywhere."""
    if spec.run.name is None:
        spec = spec.overlay({"run.name": time.strftime("%Y%m%d-%H%M%S")})
    return with_absolute_paths(spec)


def with_absolute_paths(spec: S) -> S:
    """Return a spec for workers: they run elsewhere, where a relative path would mean another."""
    changes: dict[str, Any] = {
        "data.prepared": Folder(spec.data.prepared).uri,
        "run.storage_path": Folder(spec.run.storage_path).uri,
    }
    weights = spec.model.image.weights
    if weights and weights != "imagenet" and "://" not in weights:
        changes["model.image.weights"] = str(Path(weights).expanduser().absolute())
    return spec.overlay(changes)


def require_same(
    what: str,
    spec: RunSpec,
    manifest: Manifest,
    folder: Folder,
    name: str,
    parts: Sequence[str],
    may_differ: Mapping[str, Sequence[str]],
) -> None:
    """Check that a folder is one that a spec goes on with.

    Args:
        what: the folder holds, for the text.
        spec: to go on with.
        manifest: of its data.
        folder: that was begun with another spec, perhaps.
        name: of the file that holds that one.
        parts: of the specs that must agree, by their paths.
        may_differ: settings that need not, by their section.

    Raises:
        JobError: naming the parts that differ.
    """
    import yaml

    try:
        before = yaml.safe_load(folder.read_bytes(name))
    except yaml.YAMLError as error:
        raise JobError(f"{folder}/{name} is damaged: {error}") from error
    now = spec.model_dump(mode="json")
    differing = [p for p in parts if _part(before, p, may_differ) != _part(now, p, may_differ)]
    if differing or read_manifest(folder) != manifest:
        why = ", ".join(differing) or "the prepared data"
        raise JobError(
            f"{folder} holds a {what} with other settings ({why}); choose another --run.name, "
            "or delete the folder"
        )


def begin_run(spec: RunSpec, manifest: Manifest, folder: Folder) -> None:
    """Write what a run folder begins with."""
    import yaml

    manifest.write(folder)
    folder.write_json("environment.json", describe_environment(spec))
    folder.write_text(SPEC, yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False))


def _summary(spec: RunSpec, folder: Folder) -> dict[str, Any]:
    """Return the summary of a finished run, which its last worker may not have lived to track."""
    summary = folder.read_json(SUMMARY)
    Tracker(folder, spec).finish(summary)
    return summary


def _part(tree: dict[str, Any], path: str, may_differ: Mapping[str, Sequence[str]]) -> Any:
    value: Any = tree
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if path in may_differ and isinstance(value, dict):
        return {name: one for name, one in value.items() if name not in may_differ[path]}
    return value


@contextmanager
def _end_tracked(spec: RunSpec, folder: Folder) -> Iterator[None]:
    """Tell MLflow of a stop, and of a failure that no worker lived to tell."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        Tracker(folder, spec).stop()
        raise
    except Exception as error:
        Tracker(folder, spec).fail(str(error))
        raise


@contextmanager
def feeding(spec: RunSpec, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Hold what all workers' feeds share, decided once for all of them.

    Yields:
        `decode`; the kind of `cache`; and its `index`, an actor, where it has one.
    """
    import ray

    from ray_jobs.data.cache import choose_kind, make_index
    from ray_jobs.data.loader import choose_decode
    from ray_jobs.data.reader import RowDecoder

    decode, kind = choose_decode(spec.data, spec.train.use_gpu), "none"
    if decode == "trainer" and spec.model.image.kind != "none":
        row_bytes = RowDecoder(manifest, with_image=True, size=spec.data.image_size).row_bytes
        object_store = ray.cluster_resources().get("object_store_memory", 0)
        kind = choose_kind(spec.data, manifest, row_bytes, object_store)
    index = make_index() if kind == "object_store" else None
    try:
        yield {"decode": decode, "cache": kind, "index": index}
    finally:
        if index is not None:
            ray.kill(index)


def _title(spec: RunSpec, manifest: Manifest, folder: Folder) -> str:
    from rich.markup import escape

    rows = {name: f"{info.num_rows:,}" for name, info in manifest.splits.items()}
    model, train = spec.model, spec.train
    inputs = []
    if model.image.kind != "none":
        size = spec.data.image_size or manifest.image.width
        several = f"{len(manifest.image.names)} × " if manifest.image.names else ""
        stored = "features of " if manifest.image.features else ""
        inputs.append(f"{stored}{several}{model.image.kind} at {size} px")
    if model.numeric.kind != "none" and manifest.numeric_columns:
        inputs.append(f"{len(manifest.numeric_columns)} numbers")
    if model.numeric.kind != "none" and manifest.vocabularies:
        inputs.append(f"{len(manifest.vocabularies)} categories")
    low, high = train.workers_range
    workers = f"{low} to {high} workers" if low < high else f"{low} worker{'s' * (low > 1)}"
    name = escape(str(spec.run.name))
    return (
        f"[bold]{name}[/bold]: {' + '.join(inputs)}, {rows['train']} rows to train on, "
        f"{rows['validation']} to validate\n"
        f"  {workers}, {train.global_batch_size} rows a step, "
        f"at most {train.epochs} epochs → {escape(str(folder))}"
    )


def _print_summary(summary: dict[str, Any], folder: Folder) -> None:
    from rich.console import Console
    from rich.markup import escape

    validation = summary["validation"]
    auc = validation["roc_auc"]
    Console(highlight=False, soft_wrap=True).print(
        f"  best epoch {summary['best_epoch']} of {summary['epochs']}; calibrated on validation: "
        f"AUC {auc:.4f}, log loss {summary['calibration']['validation_log_loss_before']:.4f} → "
        f"{validation['log_loss']:.4f}\n  [green]done[/green] → {escape(str(folder))}"
    )
