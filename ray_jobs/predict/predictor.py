"""Predicts the probability of each row with a trained run, for `predict` and `evaluate`.

Input: a `TrainedRun`, whose model each process loads, and a `RowSource`. Output: Arrow tables of
`RESULT`, each row exactly once and in the source's order.

    source ─ read (tasks: bytes → pixels, numbers) ─→ Predictor (actors: one model each) ─→ driver

Rows are streamed: no process has more than a few batches in memory.

    B rows of a batch   M heads
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.cluster import connection
from ray_jobs.cluster.capacity import cpu_settings
from ray_jobs.cluster.connection import first_line, root_cause
from ray_jobs.cluster.stderr_filter import ACTOR_ARGUMENTS, drop_stderr_lines
from ray_jobs.cluster.worker_group import import_keras
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import InferenceSpec
from ray_jobs.data.batch import IMAGE, IMAGE_MASK, INPUT_TYPES, KEY, LABEL
from ray_jobs.data.decoder import column_values
from ray_jobs.predict.row_distance import RowDistance
from ray_jobs.predict.row_sources import ERROR, FAILURE, RowSource, model_rows
from ray_jobs.predict.trained_run import TrainedRun
from ray_jobs.train.finalize import MODEL

PROBABILITY = "probability"
HAS_IMAGE = "has_image"
LOGITS = "logits"
BRIGHTNESS = "brightness"
DISTANCE = "distance"
RESULT = pa.schema(
    {
        KEY: pa.string(),
        LABEL: pa.int8(),
        PROBABILITY: pa.float64(),
        ERROR: pa.string(),
        HAS_IMAGE: pa.bool_(),
        LOGITS: pa.list_(pa.float32()),
        BRIGHTNESS: pa.float32(),
        DISTANCE: pa.float32(),
    }
)
"""Columns of the predicted rows; a row without a probability has an error. `has_image` is null for
rows with an error, and if the model takes no mask. `logits` has one number for each of the run's
heads. `brightness` is the mean of the pixels, 0 to 255; null without an image. `distance` is the
result of `RowDistance`; null if it is not computed."""

_PREDICTED = RESULT.append(pa.field(FAILURE, pa.string()))
_BRIGHTNESS_SIZE = 128
_MIN_BLOCK_BYTES = 1 << 20


def connected(spec: InferenceSpec) -> AbstractContextManager[None]:
    """Return a connection to Ray that `predict_rows` can use."""
    return connection.connected(
        spec.address,
        num_cpus=spec.num_workers * spec.cpus_per_worker,
        cpu_settings=cpu_settings(spec),
        num_gpus=spec.num_workers if spec.use_gpu else 0,
        worker_logs=spec.worker_logs,
    )


def predict_rows(
    run: TrainedRun, source: RowSource, spec: InferenceSpec, with_distance: bool = False
) -> Iterator[pa.Table]:
    """Yield the predicted rows of a source in order, as tables of `RESULT`; requires `connected`.

    Args:
        run: The run.
        source: The rows.
        spec: Settings of the job.
        with_distance: Whether to compute the distance from the training rows, if the run stores
            their embeddings.

    Raises:
        JobError: If a task or a process with a model fails, or rows are missing.
    """
    if not source.num_rows:
        return
    from ray.exceptions import RayError
    from rich.progress import Progress

    num_done = 0
    try:
        with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
            task = progress.add_task("predicting rows", total=source.num_rows)
            for table in _predicted_blocks(run, source, spec, with_distance):
                failures = table[FAILURE].drop_null()
                if len(failures):
                    raise JobError(failures[0].as_py())
                num_done += table.num_rows
                progress.advance(task, table.num_rows)
                yield table.select(RESULT.names)
    except RayError as error:
        raise JobError(
            f"a process of the job failed: {root_cause(error)}; set --worker_logs true to print "
            "its log"
        ) from error
    if num_done != source.num_rows:
        raise JobError(
            f"read {num_done} rows instead of {source.num_rows}; the prepared data is damaged; "
            "prepare it again"
        )


class Predictor:
    """Loads the model of a run into a process and predicts the probability of each row.

    By default, smaller batches are padded to `batch_size` rows: all calls have the same shape.

    Args:
        run: The run.
        batch_size: Maximum rows per call of the model.
        num_cpus: CPUs of this process.
        use_gpu: Whether it uses a GPU.
        with_distance: Whether to compute the distance from the training rows, if the run stores
            their embeddings.
        pad: Whether to pad smaller batches.
    """

    def __init__(
        self,
        run: TrainedRun,
        batch_size: int,
        num_cpus: float,
        use_gpu: bool,
        with_distance: bool = False,
        pad: bool = True,
    ) -> None:
        os.environ["KERAS_BACKEND"] = "tensorflow"
        import_keras()
        import tensorflow as tf

        from mm_model import load_model
        from mm_model.model_inputs import inputs_by_name
        from mm_model.model_parts import with_embeddings
        from ray_jobs.cluster.strategy import set_devices

        set_devices(num_cpus, use_gpu)
        self.batch_size, self.pad, self.failure = batch_size, pad, None
        try:
            with tempfile.TemporaryDirectory() as local:
                model = load_model(run.folder.download(MODEL, f"{local}/model.keras"))
        except (OSError, ValueError, KeyError) as error:
            self.failure = f"could not load {run.folder}/{MODEL}: {first_line(error)}"
            return
        self.model = model
        self.shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            name: (shape, INPUT_TYPES[name]) for name, shape in run.input_shapes.items()
        }
        signature = {
            name: tf.TensorSpec((batch_size if pad else None, *shape), dtype)  # type: ignore[call-arg]
            for name, (shape, dtype) in self.shapes.items()
        }

        self.distance = RowDistance.of(run) if with_distance else None
        embedder = None if self.distance is None else with_embeddings(model)

        def predict(inputs: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
            if not run.heads:
                probability_B1 = model(inputs, training=False)
                return probability_B1, probability_B1[:, :0], []
            if embedder is None:
                logits_BM = model.head_logits(inputs)
                return model.probability(logits_BM), logits_BM, []
            logits_BM, *embeddings = embedder(
                inputs_by_name(inputs, model.input_names), training=False
            )
            if model.inference_views > 1:
                logits_BM = model.head_logits(inputs)
            return model.probability(logits_BM), logits_BM, embeddings

        self.predict = tf.function(predict, input_signature=[signature], autograph=False)

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Predict any number of rows; yield `RESULT` and a failure column, batch by batch."""
        failures = [text for text in rows[FAILURE].to_pylist() if text]
        if self.failure or failures:
            yield pa.Table.from_pylist([{FAILURE: self.failure or failures[0]}], _PREDICTED)
            return
        for start in range(0, rows.num_rows, self.batch_size):
            yield self._predict_batch(rows.slice(start, self.batch_size))

    def warm_up(self, num_rows: int) -> None:
        """Call the model once, with zeros."""
        shapes = self.shapes.items()
        self.predict({name: np.zeros((num_rows, *shape), dtype) for name, (shape, dtype) in shapes})

    def inputs(self, rows: pa.Table) -> dict[str, np.ndarray]:
        """Return the inputs of the model for rows as `__call__` accepts them."""
        shapes = self.shapes.items()
        return {name: column_values(rows[name], shape, dtype) for name, (shape, dtype) in shapes}

    def _predict_batch(self, rows: pa.Table) -> pa.Table:
        inputs = self.inputs(rows)
        if self.pad and rows.num_rows < self.batch_size:
            for name, (shape, dtype) in self.shapes.items():
                padded = np.zeros((self.batch_size, *shape), dtype)
                padded[: rows.num_rows] = inputs[name]
                inputs[name] = padded
        probability_B1, logits_BM, embeddings = self.predict(inputs)
        probability = probability_B1.numpy()[: rows.num_rows, 0].astype(np.float64)
        errors = rows[ERROR].to_pylist()
        for i in np.flatnonzero(~np.isfinite(probability)):
            errors[i] = errors[i] or "the model's probability is not finite"
        has_error = np.array([error is not None for error in errors], bool)
        has_image: Any = pa.nulls(rows.num_rows, pa.bool_())
        if IMAGE_MASK in inputs:
            any_image = inputs[IMAGE_MASK][: rows.num_rows].any(axis=1)
            has_image = pa.array(any_image, mask=has_error)
        distance: Any = pa.nulls(rows.num_rows, pa.float32())
        if self.distance is not None:
            own = [embedding_BF.numpy()[: rows.num_rows] for embedding_BF in embeddings]
            distance = pa.array(self.distance(own), pa.float32(), mask=has_error)
        return pa.table(
            {
                KEY: rows[KEY],
                LABEL: rows[LABEL],
                PROBABILITY: pa.array(probability, pa.float64(), mask=has_error),
                ERROR: pa.array(errors, pa.string()),
                HAS_IMAGE: has_image,
                LOGITS: pa.array(list(logits_BM.numpy()[: rows.num_rows]), pa.list_(pa.float32())),
                BRIGHTNESS: _brightness(inputs, rows.num_rows),
                DISTANCE: distance,
                FAILURE: rows[FAILURE],
            },
            schema=_PREDICTED,
        )


def logits_array(column: pa.ChunkedArray) -> np.ndarray:
    """Return the column `logits` as an array of rows × heads."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), -1).astype(np.float64)


def _brightness(inputs: dict[str, np.ndarray], num_rows: int) -> pa.Array:
    """Return the mean of each row's pixels, over its images; of large images, a grid of pixels."""
    if IMAGE not in inputs:
        return pa.nulls(num_rows, pa.float32())
    image = inputs[IMAGE][:num_rows]
    step = max(image.shape[-2] // _BRIGHTNESS_SIZE, 1)
    mean = image[..., ::step, ::step, :].mean(axis=(-3, -2, -1), dtype=np.float32)
    if IMAGE_MASK not in inputs:
        return pa.array(mean)
    mask_BN = inputs[IMAGE_MASK][:num_rows]
    count_B = mask_BN.sum(axis=1)
    total_B = (mean * mask_BN).sum(axis=1)
    return pa.array(total_B / np.maximum(count_B, 1), mask=count_B == 0)


def _predicted_blocks(
    run: TrainedRun, source: RowSource, spec: InferenceSpec, with_distance: bool
) -> Iterator[pa.Table]:
    import ray.data

    batch_size = min(spec.batch_size, source.num_rows)

    def read(task: pa.Table) -> Iterator[pa.Table]:
        try:
            yield from source.read(task)
        except JobError as error:
            # One row with the same columns as all other blocks.
            inputs = {n: np.zeros((1, *s), INPUT_TYPES[n]) for n, s in run.input_shapes.items()}
            yield model_rows(pa.nulls(1), pa.nulls(1), [None], inputs, failure=str(error))

    dataset = (
        ray.data.from_arrow(source.tasks())
        .map_batches(read, batch_size=None, batch_format="pyarrow")
        .map_batches(
            Predictor,  # type: ignore[arg-type]
            fn_constructor_args=(
                run,
                batch_size,
                spec.cpus_per_worker,
                spec.use_gpu,
                with_distance,
            ),
            compute=ray.data.ActorPoolStrategy(size=spec.num_workers),
            num_cpus=spec.cpus_per_worker,
            num_gpus=1 if spec.use_gpu else 0,
            # The predictor cuts batches itself: Ray Data would collect the rows of many tasks.
            batch_size=None,
            batch_format="pyarrow",
        )
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    # One batch per block: larger blocks would delay the first rows and leave actors idle.
    batch_bytes = batch_size * run.decoder.row_bytes
    context.target_max_block_size = max(batch_bytes, _MIN_BLOCK_BYTES)
    context.enable_progress_bars = False
    batches: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    blocks = iter(batches)
    # The first block starts the actors.
    with drop_stderr_lines(ACTOR_ARGUMENTS):
        first = list(islice(blocks, 1))
    yield from chain(first, blocks)
