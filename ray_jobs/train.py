"""Train the fusion model on prepared shards.

Reads: the shards and manifest.json from `prepare`.  Writes: a run folder with checkpoints, history
and the best model, calibrated. The same run name again resumes a run that did not finish.

Run:   python -m ray_jobs.train ray_jobs/specs/houses.yaml --run.name first
       ray job submit --working-dir . -- python -m ray_jobs.train ray_jobs/specs/houses.yaml
"""

import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs import cli, cluster, report
from ray_jobs.batch import INPUT_TYPES
from ray_jobs.cli import JobError
from ray_jobs.environment import describe_environment
from ray_jobs.manifest import Manifest, read_manifest, require_shards
from ray_jobs.order import TrainingOrder
from ray_jobs.spec import RunSpec
from ray_jobs.storage import Folder

if TYPE_CHECKING:
    from ray.train import UserCallback

    from ray_jobs.loop import Loop, Outcome

CHECKPOINTS = "checkpoints"
SPEC = "run.yaml"
SUMMARY = "summary.json"

_SAME_RUN = (
    "run.seed", "data.image_size", "data.shuffle_window_rows", "data.buffer_bytes",
    "model", "train",
)  # fmt: skip
"""Parts of a spec in which a resumed run must agree with the one it goes on from, with its data."""
_MAY_DIFFER = (
    "num_workers", "use_gpu", "cpus_per_worker", "resources_per_worker", "max_failures",
)  # fmt: skip
"""Settings of `train` by which no weight differs but in its last bits."""


def fit(spec: RunSpec, callbacks: Sequence["UserCallback"] = ()) -> dict[str, Any]:
    """Train a model and return the run's summary.

    Args:
        spec: of the run; without `run.name`, date and time name it.
        callbacks: of Ray Train, run in its controller.

    Raises:
        JobError: if the data, the cluster or the run folder does not allow it, or training failed.
    """
    spec = _resolved(spec)
    folder = run_folder(spec)
    manifest = read_manifest(Folder(spec.data.prepared))
    require_trainable(spec, manifest)
    if _open_run(spec, manifest, folder):
        print(f"run {spec.run.name} is finished already: {folder}")
        return folder.read_json(SUMMARY)
    train = spec.train
    with cluster.connected(
        spec.run.address,
        num_cpus=train.workers_range[0] * train.cpus_per_worker,
        num_gpus=train.workers_range[0] if train.use_gpu else 0,
        worker_logs=spec.run.worker_logs,
        object_store_memory=spec.data.object_store_memory,
    ):
        board = report.make_board()
        title = _title(spec, manifest, folder)
        with report.shown(board, title), _feeding(spec, manifest) as feeding:
            _fit_workers(spec, folder, {"board": board, **feeding}, callbacks)
    summary = folder.read_json(SUMMARY)
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
    TrainingOrder.of(train, spec.train.global_batch_size, spec.run.seed, spec.data)
    require_shards(Folder(spec.data.prepared), manifest)


def run_folder(spec: RunSpec) -> Folder:
    """Return the folder of a run that has a name."""
    return Folder(spec.run.storage_path) / str(spec.run.name)


def _resolved(spec: RunSpec) -> RunSpec:
    # Workers run elsewhere, where a relative path would mean something else.
    changes: dict[str, Any] = {
        "data.prepared": Folder(spec.data.prepared).uri,
        "run.storage_path": Folder(spec.run.storage_path).uri,
    }
    weights = spec.model.image.weights
    if weights and weights != "imagenet" and "://" not in weights:
        changes["model.image.weights"] = str(Path(weights).expanduser().absolute())
    if spec.run.name is None:
        changes["run.name"] = time.strftime("%Y%m%d-%H%M%S")
    return spec.overlay(changes)


def _open_run(spec: RunSpec, manifest: Manifest, folder: Folder) -> bool:
    """Begin a run folder, or find that it goes on; return whether the run has finished already."""
    import yaml

    if folder.exists(SPEC):
        try:
            before = yaml.safe_load(folder.read_bytes(SPEC))
        except yaml.YAMLError as error:
            raise JobError(f"{folder}/{SPEC} is damaged: {error}") from error
        now = spec.model_dump(mode="json")
        differing = [part for part in _SAME_RUN if _part(before, part) != _part(now, part)]
        if differing or read_manifest(folder) != manifest:
            what = ", ".join(differing) or "the prepared data"
            raise JobError(
                f"{folder} holds a run with other settings ({what}); choose another --run.name, "
                "or delete the folder"
            )
        return folder.exists(SUMMARY)
    manifest.write(folder)
    folder.write_json("environment.json", describe_environment(spec))
    folder.write_text(SPEC, yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False))
    return False


def _part(tree: dict[str, Any], path: str) -> Any:
    value: Any = tree
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if path == "train" and isinstance(value, dict):
        return {name: setting for name, setting in value.items() if name not in _MAY_DIFFER}
    return value


@contextmanager
def _feeding(spec: RunSpec, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Hold what all workers' feeds share, decided once for all of them."""
    import ray

    from ray_jobs.cache import choose_kind, make_index
    from ray_jobs.dataset import choose_decode
    from ray_jobs.rows import RowDecoder

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


def _fit_workers(
    spec: RunSpec,
    folder: Folder,
    shared: dict[str, Any],
    callbacks: Sequence["UserCallback"],
) -> None:
    from ray.exceptions import RayError
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    from ray_jobs.tf_backend import KerasTrainer

    train = spec.train
    try:
        # Not bound to a name: a frame that an exception keeps would keep the controller alive.
        KerasTrainer(
            train_on_worker,
            train_loop_config={"spec": spec.model_dump(mode="json"), **shared},
            scaling_config=ScalingConfig(
                num_workers=train.workers_range[0],
                use_gpu=train.use_gpu,
                resources_per_worker={
                    "CPU": train.cpus_per_worker,
                    **({"GPU": 1} if train.use_gpu else {}),
                    **train.resources_per_worker,
                },
            ),
            run_config=RunConfig(
                name=CHECKPOINTS,
                storage_path=folder.uri,
                # A group that cannot start waits a minute a time: half an hour is enough for an
                # autoscaler, and then the user should know.
                failure_config=FailureConfig(
                    max_failures=train.max_failures, controller_failure_limit=30
                ),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                callbacks=list(callbacks),
            ),
        ).fit()
    except WorkerGroupError as error:
        rank, failure = min(error.worker_failures.items())
        text = f"worker {rank} failed: {_reason(failure)}"
        raise JobError(text) from error.with_traceback(None)
    except TrainingFailedError as error:
        raise JobError(f"training failed: {error}") from error.with_traceback(None)
    except RayError as error:
        raise JobError(
            f"Ray lost the controller of the training ({type(error).__name__}); run the same "
            "command again, it goes on from the last epoch"
        ) from error.with_traceback(None)


def _reason(failure: BaseException) -> str:
    cause = getattr(failure, "cause", None) or failure.__cause__ or failure
    return f"{type(cause).__name__}: {cause}"


def train_on_worker(config: dict[str, Any]) -> None:
    """Run the loop on one Ray worker: checkpoints to Ray, history and model to the run folder.

    Args:
        config: `spec`; `board` for progress; `decode`, `cache` and `index` of the feed.
    """
    import ray.train

    from ray_jobs.cache import open_cache
    from ray_jobs.checkpoint import read_checkpoint, write_checkpoint
    from ray_jobs.dataset import FeedOptions
    from ray_jobs.loop import Loop, Place, Saved, set_devices

    spec = RunSpec.model_validate(config["spec"])
    folder = run_folder(spec)
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size())
    first = place.rank == 0
    set_devices(spec.train.cpus_per_worker, spec.train.use_gpu)
    board = config["board"]

    def post(event: report.Event) -> None:
        if first:
            board.post.remote(event)

    manifest = read_manifest(folder)
    cache = open_cache(config["cache"], manifest, spec.data.image_size, config["index"])
    feeding = FeedOptions(
        data=spec.data,
        decode=config["decode"],
        threads=max(math.ceil(spec.train.cpus_per_worker), 1),
        cache=cache,
    )
    loop = Loop(spec, manifest, place, feeding=feeding)
    checkpoint = ray.train.get_checkpoint()
    saved = None
    if checkpoint is not None:
        with checkpoint.as_directory() as path:
            saved = Saved(*read_checkpoint(path))
    writer = TensorBoard(folder) if first else None

    def on_epoch(record: dict[str, Any], copy: Any) -> None:
        # Every rank reports, since a report waits for all of them; rank 0 brings the files.
        if not first:
            ray.train.report(record)
            return
        with tempfile.TemporaryDirectory() as path:
            now: Saved = copy()
            write_checkpoint(path, now.state, now.model, now.optimizer, now.best)
            lines = [json.dumps(epoch) + "\n" for epoch in now.state.history]
            folder.write_text("history.jsonl", "".join(lines))
            if writer is not None:
                writer.write(record)
            ray.train.report(record, checkpoint=ray.train.Checkpoint.from_directory(path))

    started = time.monotonic()
    outcome = loop.run(on_epoch, post, saved)
    if cache is not None:
        cache.close()
    if first:
        post({"kind": "note", "text": "writing the best model, calibrated"})
        finish(loop, outcome, folder, time.monotonic() - started)


def finish(loop: "Loop", outcome: "Outcome", folder: Folder, train_s: float) -> dict[str, Any]:
    """Write the best model, blended and calibrated on the validation rows, and the summary.

    The summary comes last: a run folder that has one is finished.
    """
    from mm_model.calibrate import fit_blend, fit_calibration, log_loss, sigmoid
    from ray_jobs.checkpoint import assign
    from ray_jobs.loop import new_model
    from ray_jobs.metrics import choose_threshold, validation_metrics

    spec, label_N = loop.spec, outcome.label_N
    # A model of its own, outside the strategy, whose variables are plain ones.
    model = new_model(spec, loop.manifest)
    assign(model.variables, outcome.best_model, "best weights")
    blend_M, bias = model.blend.weights_M(), -loop.logit_shift
    logits_NM = outcome.head_logits_NM.astype("float64")
    before = log_loss(logits_NM @ blend_M + bias, label_N)
    scale = 1.0
    if spec.train.calibrate:
        if model.blends:
            blend_M = fit_blend(logits_NM, label_N)
            model.blend.set(blend_M)
        scale, bias = fit_calibration(logits_NM @ blend_M, label_N)
    model.calibration.set([scale], bias)
    probability_N = sigmoid(scale * (logits_NM @ blend_M) + bias)
    threshold = choose_threshold(label_N, probability_N, spec.train.decision_threshold)
    with tempfile.TemporaryDirectory() as path:
        model.save(f"{path}/model.keras")
        export_saved_model(model, f"{path}/saved_model")
        folder.delete("model")
        folder.upload(path, "model")
    state = outcome.state
    summary = {
        "run": spec.run.name,
        "epochs": state.epoch,
        "steps": state.step,
        "best_epoch": (state.best_epoch or 0) + 1,
        "stopped_early": state.epoch < spec.train.epochs,
        "decision_threshold": threshold,
        "validation": validation_metrics(label_N, probability_N),
        "calibration": {
            "scale": scale,
            "bias": bias,
            "blend": dict(zip(model.heads, map(float, blend_M), strict=True)),
            "validation_log_loss_before": before,
        },
        "num_parameters": model.count_params(),
        "num_workers": loop.place.num_workers,
        "train_s": train_s,
    }
    folder.write_json(SUMMARY, summary)
    return summary


def export_saved_model(model: Any, path: str) -> None:
    """Write a TensorFlow SavedModel: `serve(image uint8, numeric float32, …)` → probability."""
    import keras
    import tensorflow as tf

    signature = {
        name: tf.TensorSpec(tensor.shape, INPUT_TYPES[name], name=name)  # type: ignore[call-arg]
        for name, tensor in model.network.input.items()
    }
    archive: Any = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serve", lambda inputs: {"probability": model(inputs, training=False)}, [signature]
    )
    archive.write_out(path, verbose=False)


class TensorBoard:
    """Writes the numbers of each epoch for TensorBoard, below the run folder."""

    def __init__(self, folder: Folder) -> None:
        """Open a log; a remote run folder gets a copy after each epoch."""
        import tensorflow as tf

        self.folder = folder
        self.local = Path(tempfile.mkdtemp(prefix="tensorboard-"))
        self.writer = tf.summary.create_file_writer(str(self.local))

    def write(self, record: dict[str, Any]) -> None:
        """Write one epoch."""
        import tensorflow as tf

        with self.writer.as_default(step=record[report.EPOCH]):
            for key, value in record.items():
                if isinstance(value, float):
                    tf.summary.scalar(key, value)
        self.writer.flush()
        self.folder.upload(self.local, "tensorboard")


def _title(spec: RunSpec, manifest: Manifest, folder: Folder) -> str:
    from rich.markup import escape

    rows = {name: f"{info.num_rows:,}" for name, info in manifest.splits.items()}
    model, train = spec.model, spec.train
    inputs = []
    if model.image.kind != "none":
        size = spec.data.image_size or manifest.image.width
        several = f"{len(manifest.image.names)} × " if manifest.image.names else ""
        inputs.append(f"{several}{model.image.kind} at {size} px")
    if model.numeric.kind != "none" and manifest.numeric_columns:
        inputs.append(f"{len(manifest.numeric_columns)} numbers")
    if model.numeric.kind != "none" and manifest.vocabularies:
        inputs.append(f"{len(manifest.vocabularies)} categories")
    num_workers = train.workers_range[0]
    workers = "1 worker" if num_workers == 1 else f"{num_workers} workers"
    name = escape(str(spec.run.name))
    return (
        f"[bold]{name}[/bold]: {' + '.join(inputs)}, {rows['train']} rows to train on, "
        f"{rows['validation']} to validate\n"
        f"  {workers} × {train.global_batch_size // num_workers} rows a step, "
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


def main() -> None:
    """Run from the command line."""
    cli.main(RunSpec, fit, __doc__)


if __name__ == "__main__":
    main()
