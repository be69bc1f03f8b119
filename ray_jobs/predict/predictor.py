"""A trained run and rows → the probability of each row; what `evaluate` and `predict` share.

Enters: a `TrainedRun`, whose model each process loads for itself, and a `Source` of rows.
Leaves: Arrow tables of `RESULT`, the rows in the source's order, each exactly once.

    source ─ read (tasks: bytes → pixels, numbers) ─→ Predictor (actors: one model each) ─→ driver

Pixels and probabilities stream: no process holds more than a few batches.

    B rows of a batch   H × W pixels   F numeric columns
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.cluster.connection import first_line, reason
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import InferenceSpec, Split
from ray_jobs.data.batch import INPUT_TYPES, KEY, LABEL
from ray_jobs.data.manifest import Manifest, require_shards
from ray_jobs.data.reader import StoredRows, bytes_column
from ray_jobs.predict.trained_run import TrainedRun, require_fit
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import MODEL

if TYPE_CHECKING:
    import ray.data

PROBABILITY = "probability"
ERROR = "error"
RESULT = pa.schema(
    {KEY: pa.string(), LABEL: pa.int8(), PROBABILITY: pa.float64(), ERROR: pa.string()}
)
"""What each row becomes: without a probability, `error` says why."""

# What ends the job travels as a row, since an exception in a Ray Data task comes with a traceback.
_FAILURE = "failure"
_PREDICTED = RESULT.append(pa.field(_FAILURE, pa.string()))

_MOST_TASK_ROWS = 512
_TASKS_PER_WORKER = 4
_LEAST_BLOCK_BYTES = 1 << 20


class Source(Protocol):
    """Rows to predict. Picklable, since its tasks run anywhere in the cluster."""

    num_rows: int

    def tasks(self) -> list[pa.Table]:
        """Return what each task is given, in the order of the rows."""
        ...

    def read(self, task: pa.Table) -> Iterator[pa.Table]:
        """Yield one task's rows as `model_rows` makes them, a batch or so at a time.

        Raises:
            JobError: if they cannot be read, which ends the job.
        """
        ...


class PreparedSource:
    """The rows of prepared splits, in stored order.

    Args:
        run: whose model sees the rows.
        folder: prepared data.
        manifest: of it.
        splits: to read, one after the other.
        spec: of the job, for the size of batches and tasks.

    Raises:
        JobError: if the data does not fit the run, or shards are missing or of another size.
    """

    def __init__(
        self,
        run: TrainedRun,
        folder: Folder,
        manifest: Manifest,
        splits: Sequence[Split],
        spec: InferenceSpec,
    ) -> None:
        require_fit(run, manifest, folder)
        self.run, self.folder = run, folder
        self.shards = [shard for split in splits for shard in manifest.splits[split].shards]
        self.num_rows = sum(shard.num_rows for shard in self.shards)
        self.batch_rows, self.task_rows = spec.batch_size, rows_per_task(self.num_rows, spec)
        require_shards(folder, manifest, splits)

    def tasks(self) -> list[pa.Table]:
        """Return the row groups that each task reads, of one shard."""
        return [
            pa.table({"shard": [shard.path], "row_groups": [groups]})
            for shard in self.shards
            for groups in _grouped(shard.row_groups, self.task_rows)
        ]

    def read(self, task: pa.Table) -> Iterator[pa.Table]:
        """Yield the rows of some row groups; a stored image that is damaged becomes an error."""
        shard, row_groups = task["shard"][0].as_py(), task["row_groups"][0].as_py()
        columns = self.run.decoder.columns
        try:
            file = self.folder.filesystem.open_input_file(self.folder.locate(shard))
            with pq.ParquetFile(file) as parquet:
                for rows in parquet.iter_batches(
                    self.batch_rows, row_groups=row_groups, columns=columns, use_threads=False
                ):
                    table = pa.Table.from_batches([rows])
                    yield decoded_rows(self.run, table, [None] * table.num_rows, shard)
        except (OSError, pa.ArrowException) as error:
            raise JobError(
                f"{self.folder}/{shard} cannot be read: {first_line(error)}; the prepared data is "
                "damaged, prepare it again"
            ) from error


def decoded_rows(run: TrainedRun, rows: pa.Table, errors: list[str | None], place: str) -> pa.Table:
    """Return rows as they are stored as a `Predictor` takes them.

    Args:
        run: whose model sees them.
        rows: with the columns of a shard that the model needs.
        errors: why a row cannot be used already, else None.
        place: what an error text calls the file of an image that is damaged.
    """
    decoder, stored, every = run.decoder, StoredRows([rows]), np.arange(rows.num_rows)

    def note(row: int, error: ValueError) -> None:
        errors[row] = errors[row] or f"the stored image in {place} is damaged: {error}"

    batch = decoder.batch(stored, every)
    decoder.fill(batch, stored, every, on_error=note)
    inputs = {name: batch[name] for name in run.input_shapes}
    return model_rows(rows.column(KEY), rows.column(LABEL), errors, inputs)


def rows_per_task(num_rows: int, spec: InferenceSpec) -> int:
    """Return the rows of one task: whole batches, few enough that every worker gets several."""
    share = min(num_rows // (spec.num_workers * _TASKS_PER_WORKER), _MOST_TASK_ROWS)
    return max(share // spec.batch_size, 1) * spec.batch_size


def model_rows(
    keys: pa.Array | pa.ChunkedArray,
    labels: pa.Array | pa.ChunkedArray | None,
    errors: Sequence[str | None],
    inputs: dict[str, np.ndarray],
) -> pa.Table:
    """Return the table of some rows that a `Predictor` takes; a row with an error is not used.

    Args:
        keys: of the rows.
        labels: of the rows, if they have any.
        errors: why a row cannot be used, else None.
        inputs: of the model, by name, as in `ray_jobs.data.batch`.
    """
    num_rows = len(errors)
    columns = {
        KEY: keys.cast(pa.string()),
        LABEL: pa.nulls(num_rows, pa.int8()) if labels is None else labels.cast(pa.int8()),
        ERROR: pa.array(errors, pa.string()),
        _FAILURE: pa.nulls(num_rows, pa.string()),
    }
    # Ray's tensor columns would also do, but these are plain Arrow, and are never copied.
    return pa.table(columns | {name: bytes_column(array) for name, array in inputs.items()})


class Predictor:
    """Holds the model of a run in one process, and gives each row its probability.

    Args:
        run: with the model.
        batch_size: rows that the model sees at once; fewer are filled up, so that the model is
            traced for one shape only.
        num_cpus: that it computes with.
        use_gpu: whether it computes on a GPU.
    """

    def __init__(self, run: TrainedRun, batch_size: int, num_cpus: float, use_gpu: bool) -> None:
        os.environ["KERAS_BACKEND"] = "tensorflow"
        import tensorflow as tf

        from mm_model import load_model
        from ray_jobs.cluster.strategy import set_devices

        set_devices(num_cpus, use_gpu)
        self.batch_size, self.failure = batch_size, None
        try:
            with tempfile.TemporaryDirectory() as local:
                model = load_model(run.folder.download(MODEL, f"{local}/model.keras"))
        except (OSError, ValueError, KeyError) as error:
            self.failure = f"{run.folder}/{MODEL} cannot be loaded: {first_line(error)}"
            return
        self.shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            name: ((batch_size, *shape), INPUT_TYPES[name])
            for name, shape in run.input_shapes.items()
        }
        signature = {
            name: tf.TensorSpec(shape, kind)  # type: ignore[call-arg]
            for name, (shape, kind) in self.shapes.items()
        }
        self.predict = tf.function(
            lambda inputs: model(inputs, training=False), input_signature=[signature]
        )

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Yield `RESULT` of any number of rows, batch by batch, and what ends the job."""
        failures = [text for text in rows[_FAILURE].to_pylist() if text]
        if self.failure or failures:
            yield _failure(self.failure or failures[0])
            return
        for start in range(0, rows.num_rows, self.batch_size):
            yield self._predict_batch(rows.slice(start, self.batch_size))

    def _predict_batch(self, rows: pa.Table) -> pa.Table:
        inputs: dict[str, np.ndarray] = {}
        for name, (shape, kind) in self.shapes.items():
            inputs[name] = np.zeros(shape, kind)
            inputs[name][: rows.num_rows] = _values(rows[name], shape[1:], kind)
        probability_B1 = self.predict(inputs).numpy()  # type: ignore[union-attr]
        probability = probability_B1[: rows.num_rows, 0].astype(np.float64)
        errors = rows[ERROR].to_pylist()
        for i in np.flatnonzero(~np.isfinite(probability)):
            errors[i] = errors[i] or "the model gives no finite probability for it"
        bad = np.array([error is not None for error in errors], bool)
        return pa.table(
            {
                KEY: rows[KEY],
                LABEL: rows[LABEL],
                PROBABILITY: pa.array(probability, pa.float64(), mask=bad),
                ERROR: pa.array(errors, pa.string()),
                _FAILURE: rows[_FAILURE],
            },
            schema=_PREDICTED,
        )


def _failure(text: str) -> pa.Table:
    return pa.Table.from_pylist([{_FAILURE: text}], _PREDICTED)


def _values(column: pa.ChunkedArray, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """Return a column of `model_rows` as an array of rows × shape."""
    array = column.combine_chunks()
    values = np.frombuffer(array.buffers()[1], kind).reshape(-1, *shape)
    return values[array.offset : array.offset + len(array)]


def predict_rows(run: TrainedRun, source: Source, spec: InferenceSpec) -> Iterator[pa.Table]:
    """Yield `RESULT` of every row of a source once, in its order; needs a connection to Ray.

    Raises:
        JobError: if a task or a model's process fails, or rows got lost.
    """
    if not source.num_rows:
        return
    from ray.exceptions import RayError

    done = 0
    try:
        with _progress(source.num_rows) as advance:
            dataset = _dataset(run, source, spec)
            tables: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
            for table in tables:
                failures = table[_FAILURE].drop_null()
                if len(failures):
                    raise JobError(failures[0].as_py())
                done += table.num_rows
                advance(table.num_rows)
                yield table.select(RESULT.names)
    except RayError as error:
        raise JobError(
            f"a process of the job failed: {reason(error)}; --worker_logs true shows its log"
        ) from error
    if done != source.num_rows:
        raise JobError(
            f"{source.num_rows} rows were expected and {done} were read; the data is damaged, "
            "prepare it again"
        )


def _dataset(run: TrainedRun, source: Source, spec: InferenceSpec) -> "ray.data.Dataset":
    import ray.data

    batch_size = min(spec.batch_size, source.num_rows)

    def read(task: pa.Table) -> Iterator[pa.Table]:
        try:
            yield from source.read(task)
        except JobError as error:
            yield _unread(run, str(error))

    dataset = (
        ray.data.from_arrow(source.tasks())
        .map_batches(read, batch_size=None, batch_format="pyarrow")
        .map_batches(
            Predictor,  # type: ignore[arg-type]
            fn_constructor_args=(run, batch_size, spec.cpus_per_worker, spec.use_gpu),
            compute=ray.data.ActorPoolStrategy(size=spec.num_workers),
            num_cpus=spec.cpus_per_worker,
            num_gpus=1 if spec.use_gpu else 0,
            # The predictor cuts batches itself: Ray Data would gather many tasks' rows for one.
            batch_size=None,
            batch_format="pyarrow",
        )
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    # A block is a batch: larger ones would hold back the first rows, and starve other actors.
    batch_bytes = batch_size * run.decoder.row_bytes
    context.target_max_block_size = max(batch_bytes, _LEAST_BLOCK_BYTES)
    context.enable_progress_bars = False
    return dataset


def _unread(run: TrainedRun, text: str) -> pa.Table:
    """Return a row in which a task says what ends the job, in the shape of the others."""
    inputs = {
        name: np.zeros((1, *shape), INPUT_TYPES[name]) for name, shape in run.input_shapes.items()
    }
    rows = model_rows(pa.nulls(1), None, [None], inputs)
    at = rows.column_names.index(_FAILURE)
    return rows.set_column(at, _FAILURE, pa.array([text]))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal until the block ends; the function counts rows on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("predicting rows", total=total)
        yield lambda num_rows: bar.advance(task, num_rows)


def _grouped(row_groups: Sequence[int], least_rows: int) -> Iterator[list[int]]:
    """Yield the numbers of neighbouring row groups that have so many rows together."""
    group: list[int] = []
    rows = 0
    for number, num_rows in enumerate(row_groups):
        group.append(number)
        rows += num_rows
        if rows >= least_rows:
            yield group
            group, rows = [], 0
    if group:
        yield group
