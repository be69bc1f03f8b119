"""Train the fusion model on prepared shards.

Reads: the shards and manifest.json from `prepare`.  Writes: a run folder with checkpoints, history
and the calibrated best model. Running `train` again with the same `run.name` resumes an unfinished
run.

Run:   python -m ray_jobs.train ray_jobs/specs/houses.yaml --run.name first
       python -m ray_jobs.submit train ray_jobs/specs/houses.yaml
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import yaml

from mm_model.backbones import is_location
from ray_jobs.checks.preflight import preflight
from ray_jobs.cluster import connection
from ray_jobs.cluster.capacity import cpu_settings
from ray_jobs.cluster.environment import describe_environment
from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.config.text import count_text
from ray_jobs.data.manifest import Manifest, read_manifest, require_shards
from ray_jobs.data.sampler import TrainingSampler
from ray_jobs.data.text_input import TOKENIZER, text_reader
from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager
from ray_jobs.train.coordinator import make_coordinator
from ray_jobs.train.finalize import SUMMARY, write_reference
from ray_jobs.train.supervisor import fit_once, run_attempts
from ray_jobs.train.telemetry import console
from ray_jobs.train.telemetry.history import Tracker, require_tracking
from ray_jobs.train.worker import train_on_worker

S = TypeVar("S", bound=RunSpec)

if TYPE_CHECKING:
    from ray.train import UserCallback

SPEC = "run.yaml"
ENVIRONMENT = "environment.json"

SAME_RUN = (
    "run.seed", "data.image_size", "data.text_length", "data.shuffle_window_rows",
    "data.buffer_bytes", "model", "train",
)  # fmt: skip
"""Settings that must not change when a run resumes."""
CHANGEABLE = (
    "num_workers", "wait_for_workers_s", "use_gpu", "gpus_per_worker", "cpus_per_worker",
    "resources_per_worker", "checkpoint_every_steps", "keep_checkpoints", "keep_best",
    "max_failures", "max_preemptions", "hang_timeout_s",
)  # fmt: skip
"""Settings of `train` that may change anyway, since they do not change the rows of any step. The
weights then differ by rounding, or by more if they depend on the number of replicas, as they do
with mixup or with batch norms that use only a replica's own rows."""


@dataclass(frozen=True)
class Run:
    """A run whose settings are resolved and fit its data."""

    spec: RunSpec
    manifest: Manifest
    folder: Folder


def fit(spec: RunSpec, callbacks: Sequence["UserCallback"] = ()) -> dict[str, Any]:
    """Train a model and return the run's summary.

    Args:
        spec: The run's settings; without `run.name`, the run is named by date and time.
        callbacks: Callbacks of Ray Train, which run in its controller.

    Raises:
        JobError: If the data, the cluster or the run folder is unsuitable, or training failed.
        Interrupted: If the user stopped the run.
    """
    run = open_run(spec)
    resumes, finished = run.folder.exists(SPEC), run.folder.exists(SUMMARY)
    if resumes:
        require_same("run", run, SPEC, SAME_RUN, {"train": CHANGEABLE})
    if finished:
        print(f"run {run.spec.run.name} is already finished: {run.folder}")
    else:
        run = replace(run, spec=require_tracking(run.spec))
        if not resumes:
            begin_run(run.spec, run.manifest, run.folder)
        _train(run, callbacks)
    summary = run.folder.read_json(SUMMARY)
    # The last worker may have ended before it tracked the summary.
    Tracker(run.folder, run.spec).finish(summary)
    if not finished:
        _print_summary(summary, run.folder)
    return summary


def _train(run: Run, callbacks: Sequence["UserCallback"]) -> None:
    """Run attempts on a cluster until the run is finished."""
    spec, train, started = run.spec, run.spec.train, time.monotonic()
    with connection.connected(
        spec.run.address,
        num_cpus=train.workers_range[0] * train.cpus_per_worker,
        cpu_settings=cpu_settings(train),
        num_gpus=train.workers_range[0] * train.gpus_per_worker if train.use_gpu else 0,
        worker_logs=spec.run.worker_logs,
        object_store_memory=spec.data.object_store_memory,
    ):
        preflight(spec, run.manifest)
        # Imports Ray Data, which `connected` has configured.
        from ray_jobs.train.datasets import RunData

        ray_s, coordinator = time.monotonic() - started, make_coordinator()
        with console.show_progress(coordinator, _title(run)), shared_feed(run) as feed:
            config = {
                "spec": spec.model_dump(mode="json"),
                "run": run.folder.uri,
                "coordinator": coordinator,
                "ray_s": ray_s,
                **feed,
            }

            def attempt(num_workers: int) -> None:
                steps = CheckpointManager(run.folder).steps()
                step = steps[-1] if steps else 0
                data = RunData(
                    spec, run.manifest, feed["decode"], feed["cache"], step, num_workers,
                    coordinator,
                )  # fmt: skip
                own = {**config, "data": data, "attempt_start": time.time()}
                config["ray_s"] = 0.0  # Later attempts reuse the connection.
                fit_once(train, num_workers, train_on_worker, own, run.folder.uri, callbacks, data)

            try:
                run_attempts(train, attempt, lambda: run.folder.exists(SUMMARY), coordinator)
            except (Interrupted, KeyboardInterrupt):
                Tracker(run.folder, spec).stop()
                raise
            except Exception as error:
                Tracker(run.folder, spec).fail(str(error))
                raise


def open_run(spec: RunSpec) -> Run:
    """Resolve a spec, and check it against the prepared data.

    Raises:
        JobError: If the data does not fit the settings.
        ValueError: If the training split has fewer rows than a step.
    """
    if spec.run.name is None:
        spec = spec.overlay({"run.name": time.strftime("%Y%m%d-%H%M%S")})
    spec = with_absolute_paths(spec)
    manifest = read_manifest(Folder(spec.data.prepared))
    require_trainable(spec, manifest)
    return Run(spec, manifest, run_folder(spec))


def require_trainable(spec: RunSpec, manifest: Manifest) -> None:
    """Check in advance what would otherwise fail on every worker.

    Raises:
        JobError: If the data lacks columns that the model needs, or a shard.
        ValueError: If the training split has fewer rows than a step.
    """
    model = spec.model
    numeric = manifest.statistics is not None or bool(manifest.vocabularies)
    text = model.text.kind != "none" and bool(manifest.text_columns)
    if model.numeric.kind != "none" and not numeric:
        raise JobError(
            "the prepared data has no numeric columns and no categories; set "
            "model.numeric.kind=none, or prepare data with such columns"
        )
    if model.image.kind == model.numeric.kind == "none" and not text:
        raise JobError(
            "model.image.kind and model.numeric.kind are none, and the prepared data has no text "
            "columns; set one of the kinds, or prepare data with data.text"
        )
    if manifest.image.optional and model.numeric.kind == "none" and not text:
        raise JobError(
            "model.numeric.kind=none leaves no input for rows without an image, which the data may "
            "have (prepare.missing_image=keep); set model.numeric.kind, or prepare the data with "
            "prepare.missing_image=quarantine"
        )
    columns = [vocabulary.column for vocabulary in manifest.vocabularies]
    if missing := [name for name in spec.data.categorical if name not in columns]:
        raise JobError(
            f"the prepared data has no vocabulary for {', '.join(missing)} of data.categorical (it "
            f"has {', '.join(columns) or 'none'}); run `prepare` again with these settings"
        )
    if missing := [name for name in spec.data.text if name not in manifest.text_columns]:
        raise JobError(
            f"the prepared data has no text column {', '.join(missing)} of data.text (it has "
            f"{', '.join(manifest.text_columns) or 'none'}); run `prepare` again with these "
            "settings"
        )
    TrainingSampler.of_run(spec, manifest)
    require_shards(Folder(spec.data.prepared), manifest)


def run_folder(spec: RunSpec) -> Folder:
    """Return the folder of a named run."""
    return Folder(spec.run.storage_path) / str(spec.run.name)


def with_absolute_paths(spec: S) -> S:
    """Return a spec whose paths are valid in the working directory of any worker."""
    changes: dict[str, Any] = {
        "data.prepared": Folder(spec.data.prepared).uri,
        "run.storage_path": Folder(spec.run.storage_path).uri,
    }
    for branch in ("image", "text"):
        weights = getattr(spec.model, branch).weights
        if weights is not None and is_location(weights) and "://" not in weights:
            path = str(Path(weights).expanduser().absolute())
            changes[f"model.{branch}.weights"] = path
    return spec.overlay(changes)


def require_same(
    what: str, run: Run, name: str, paths: Sequence[str], changeable: Mapping[str, Sequence[str]]
) -> None:
    """Check that a run folder was started with the same settings and data.

    Args:
        what: What the folder contains, for the error message.
        run: The run to resume.
        name: The file with the settings that the folder was started with.
        paths: Settings and sections that must be the same.
        changeable: Settings that may differ, by section.

    Raises:
        JobError: If they differ.
    """

    def value(tree: Any, path: str) -> Any:
        for part in path.split("."):
            tree = tree.get(part) if isinstance(tree, dict) else None
        if isinstance(tree, dict):
            return {k: v for k, v in tree.items() if k not in changeable.get(path, ())}
        return tree

    try:
        before = yaml.safe_load(run.folder.read_bytes(name))
    except yaml.YAMLError as error:
        raise JobError(f"{run.folder}/{name} is damaged: {error}") from error
    now = run.spec.model_dump(mode="json")
    differing = [path for path in paths if value(before, path) != value(now, path)]
    if differing or read_manifest(run.folder) != run.manifest:
        reason = ", ".join(differing) or "the prepared data"
        raise JobError(
            f"{run.folder} contains a {what} with other settings ({reason}); choose another "
            "--run.name, or delete the folder"
        )


def begin_run(spec: RunSpec, manifest: Manifest, folder: Folder) -> None:
    """Write the first files of a run folder.

    Raises:
        JobError: If the tokenizer of the texts, or the training rows, cannot be read.
    """
    try:
        reader = text_reader(spec, manifest)
    except (ValueError, OSError) as error:
        raise JobError(f"cannot make the tokenizer of the texts: {error}") from error
    if reader is not None:
        folder.write_text(TOKENIZER, reader.to_json())
    data = Folder(spec.data.prepared)
    try:
        write_reference(folder, data, manifest)
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"could not read the rows in {data}: {error}; prepare them again") from error
    manifest.write(folder)
    folder.write_json(ENVIRONMENT, describe_environment(spec))
    folder.write_text(SPEC, yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False))


@contextmanager
def shared_feed(run: Run) -> Iterator[dict[str, Any]]:
    """Choose how rows are fed, and keep what the feeds of all workers share until the block ends.

    Yields:
        `decode`, where images are decoded; `cache`, the kind of cache; and `index`, the actor of
        the cache or None.
    """
    import ray

    from ray_jobs.data.cache import choose_cache, make_cache_index
    from ray_jobs.data.decoder import RowDecoder
    from ray_jobs.data.loader import choose_decode

    data, manifest = run.spec.data, run.manifest
    decode, kind = choose_decode(data, run.spec.train.use_gpu), "none"
    if decode == "trainer" and run.spec.model.image.kind != "none":
        row_bytes = RowDecoder(manifest, with_image=True, size=data.image_size).row_bytes
        object_store = ray.cluster_resources().get("object_store_memory", 0)
        kind = choose_cache(data, manifest, row_bytes, object_store)
    index = make_cache_index() if kind == "object_store" else None
    try:
        yield {"decode": decode, "cache": kind, "index": index}
    finally:
        if index is not None:
            ray.kill(index)


def _title(run: Run) -> str:
    from rich.markup import escape

    manifest, model, train = run.manifest, run.spec.model, run.spec.train
    inputs = []
    if model.image.kind != "none":
        size = run.spec.data.image_size or manifest.image.width
        several = f"{len(manifest.image.names)} × " if manifest.image.names else ""
        stored = "features of " if manifest.image.features else ""
        inputs.append(f"{stored}{several}{model.image.kind} at {size} px")
    if model.numeric.kind != "none" and manifest.numeric_columns:
        inputs.append(count_text(len(manifest.numeric_columns), "numeric column"))
    if model.numeric.kind != "none" and manifest.vocabularies:
        inputs.append(count_text(len(manifest.vocabularies), "categorical column"))
    if model.text.kind != "none" and manifest.text_columns:
        inputs.append(
            f"{count_text(len(manifest.text_columns), 'text column')} ({model.text.kind})"
        )
    low, high = train.workers_range
    workers = f"{low} to {high} workers" if low < high else count_text(low, "worker")
    rows = {name: f"{info.num_rows:,}" for name, info in manifest.splits.items()}
    return (
        f"[bold]{escape(str(run.spec.run.name))}[/bold]: {' + '.join(inputs)}; "
        f"{rows['train']} training rows, {rows['validation']} validation rows\n"
        f"  {workers}, {train.global_batch_size} rows per step, "
        f"at most {count_text(train.epochs, 'epoch')} → {escape(str(run.folder))}"
    )


def _print_summary(summary: dict[str, Any], folder: Folder) -> None:
    from rich.console import Console
    from rich.markup import escape

    validation, calibration = summary["validation"], summary["calibration"]
    Console(highlight=False, soft_wrap=True).print(
        f"  best epoch {summary['best_epoch']} of {summary['epochs']}; calibrated on validation: "
        f"AUC {validation['roc_auc']:.4f}, "
        f"log loss {calibration['validation_log_loss_before']:.4f} → "
        f"{validation['log_loss']:.4f}\n  [green]done[/green] → {escape(str(folder))}"
    )
