"""Reads prepared or raw rows into the tables that a `Predictor` accepts.

A `RowSource` is created on the driver, which checks the data, and read in tasks anywhere in the
cluster.
"""

# pyright: reportAttributeAccessIssue=false

import pickle
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_jobs.cluster.connection import first_line
from ray_jobs.config.errors import EmptyTableError, JobError
from ray_jobs.config.inference_spec import InferenceSpec, PredictSpec
from ray_jobs.config.prepare_spec import PrepareSpec, Split
from ray_jobs.config.text import count_text, number_text
from ray_jobs.data.batch import KEY, LABEL
from ray_jobs.data.decoder import bytes_column
from ray_jobs.data.images import BadImage
from ray_jobs.data.manifest import MANIFEST, Manifest, require_shards
from ray_jobs.data.reader import sample_columns
from ray_jobs.predict.trained_run import TrainedRun, require_match
from ray_jobs.prepare.row_validation import Rows, read_rows
from ray_jobs.prepare.shards.shard_writer import RowConverter, StoredImages
from ray_jobs.prepare.sources import open_source
from ray_jobs.prepare.sources.source import Source
from ray_jobs.prepare.table import require_columns
from ray_jobs.prepare.table_files import open_table
from ray_jobs.storage.folder import Folder

ERROR = "error"
FAILURE = "failure"
"""Column with an error that ends the job; exceptions in Ray Data tasks would print a traceback."""

MAX_COMPARED = 20_000
"""Rows that are compared with the training rows."""
_MAX_TASK_ROWS = 512
_TASKS_PER_WORKER = 4
_READ_ROWS = 16
# A column in braces, but not a range of tar files such as {000..012}.
_COLUMN = re.compile(r"\{[^{}.,]+\}")


class PreparedRows:
    """The rows of prepared splits in stored order, one split after the other.

    Raises:
        JobError: If the data does not match the run, or shards are missing or have the wrong size.
    """

    def __init__(
        self,
        run: TrainedRun,
        folder: Folder,
        manifest: Manifest,
        splits: Sequence[Split],
        spec: InferenceSpec,
    ) -> None:
        require_match(run, manifest, folder)
        require_shards(folder, manifest, splits)
        self.run, self.folder, self.batch_size = run, folder, spec.batch_size
        self.shards = [shard for split in splits for shard in manifest.splits[split].shards]
        self.num_rows = sum(shard.num_rows for shard in self.shards)
        self.task_rows = rows_per_task(self.num_rows, spec)
        self.notes: tuple[str, ...] = ()

    def columns(self) -> tuple[dict[str, np.ndarray], dict[str, pa.Array]]:
        """Return the numbers and the words of some rows, by column."""
        manifest = self.run.decoder.manifest
        words = [vocabulary.column for vocabulary in manifest.vocabularies]
        names = [*manifest.numeric_columns, *words]
        rows = sample_columns(self.folder, self.shards, names, MAX_COMPARED)
        numbers = {name: rows[name].to_numpy() for name in manifest.numeric_columns}
        return numbers, {name: rows[name].combine_chunks() for name in words}

    def tasks(self) -> list[pa.Table]:
        """Return the shard and the row groups of each task."""
        return [
            pa.table({"shard": [shard.path], "row_groups": [groups]})
            for shard in self.shards
            for groups in _combine_groups(shard.row_groups, self.task_rows)
        ]

    def read(self, task: pa.Table) -> Iterator[pa.Table]:
        """Yield the rows of a task's row groups; a row with a damaged image has an error."""
        shard, row_groups = task["shard"][0].as_py(), task["row_groups"][0].as_py()
        columns = self.run.decoder.columns
        try:
            file = self.folder.filesystem.open_input_file(self.folder.locate(shard))
            with pq.ParquetFile(file) as parquet:
                for rows in parquet.iter_batches(
                    self.batch_size, row_groups=row_groups, columns=columns, use_threads=False
                ):
                    table = pa.Table.from_batches([rows])
                    yield _decode_rows(self.run, table, [None] * table.num_rows, shard)
        except (OSError, pa.ArrowException) as error:
            raise JobError(
                f"could not read {self.folder}/{shard}: {first_line(error)}; the prepared data is "
                "damaged; prepare it again"
            ) from error


class RawRows:
    """Rows of a user's table, read with the settings in the run's manifest.

    The driver checks whole columns; the tasks read the images.

    Raises:
        EmptyTableError: If the table has no columns.
        JobError: If the table, its images or a column is missing.
    """

    def __init__(self, run: TrainedRun, spec: PredictSpec) -> None:
        self.run = run
        manifest = run.decoder.manifest
        categorical = tuple(vocabulary.column for vocabulary in manifest.vocabularies)
        text = manifest.text_columns
        rules = _raw_rules(run, spec)
        try:
            if run.takes_images or not rules.table:
                source = open_source(rules, categorical, text, labelled=False)
            else:
                table, notes = open_table(rules.table, rules.number_rules)
                source = Source(table, images={}, readers={}, notes=notes)
                require_columns(source.table, rules, categorical, text, labelled=False)
        except EmptyTableError:
            raise
        except JobError as error:
            raise JobError(_with_flag_names(str(error), run, spec)) from None
        names = (rules.image_columns or ("",)) if run.takes_images else ()
        readers = tuple(source.readers[name] for name in names)
        pixel_range = manifest.image.pixel_range
        self.converter = RowConverter(
            readers,
            manifest.numeric_columns,
            (*categorical, *text),
            rules,
            pixel_range=pixel_range,
        )
        rows = read_rows(source, rules, manifest.numeric_columns, None, (*categorical, *text))
        self.num_rows = len(rows)
        self.task_rows = rows_per_task(self.num_rows, spec)
        self._rows = rows
        usable = rows.take(np.flatnonzero(rows.good))
        self.notes = (*source.notes, *_unfamiliar(usable, manifest))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the source without its rows; each task receives its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_rows"}

    def columns(self) -> tuple[dict[str, np.ndarray], dict[str, pa.Array]]:
        """Return the numbers and the words of the usable rows, by column."""
        rows = self._rows.take(np.flatnonzero(self._rows.good)[:MAX_COMPARED])
        numbers = dict(zip(self.converter.numeric_columns, rows.numeric_RF.T, strict=True))
        words = [vocabulary.column for vocabulary in self.run.decoder.manifest.vocabularies]
        return numbers, {name: rows.categories[name] for name in words}

    def tasks(self) -> list[pa.Table]:
        """Return the pickled rows and errors of each task."""
        tasks: list[pa.Table] = []
        for start in range(0, self.num_rows, self.task_rows):
            indices = range(start, min(start + self.task_rows, self.num_rows))
            reasons = [self._rows.quarantined.get(row) for row in indices]
            errors = [reason and ": ".join(reason) for reason in reasons]
            rows = self._rows.take(np.array(indices))
            tasks.append(pa.table({"rows": [pickle.dumps((rows, errors))]}))
        return tasks

    def read(self, task: pa.Table) -> Iterator[pa.Table]:
        """Yield the rows of a task, converted to the bytes that `prepare` would store."""
        rows, errors = pickle.loads(task["rows"][0].as_py())
        yield from decode_raw_rows(self.run, self.converter, rows, errors)


def decode_raw_rows(
    run: TrainedRun, converter: RowConverter, rows: Rows, errors: list[str | None]
) -> Iterator[pa.Table]:
    """Yield raw rows in the format that a `Predictor` accepts, a few at a time.

    Args:
        run: Run whose model predicts the rows.
        converter: Reads and converts their images as `prepare` does.
        rows: The rows.
        errors: For each row, the reason why it cannot be used, or None; unusable images are added.
    """
    if not converter.readers:
        numeric = zip(converter.numeric_columns, rows.numeric_RF.T, strict=True)
        columns = {KEY: rows.keys, LABEL: rows.labels, **dict(numeric), **rows.categories}
        yield _decode_rows(run, pa.table(columns), errors, "memory")
        return
    no_images: StoredImages = (None,) * len(rows.images)
    stored: list[StoredImages] = []
    for row, images in enumerate(converter.convert_images(rows)):
        if isinstance(images, BadImage):
            errors[row] = errors[row] or str(images)
            images = no_images
        stored.append(images)
        if len(stored) == _READ_ROWS or row + 1 == len(rows):
            read = np.arange(row + 1 - len(stored), row + 1)
            table = converter.table(rows.take(read), stored)
            yield _decode_rows(run, table, errors[read[0] : row + 1], "memory")
            stored.clear()


RowSource = PreparedRows | RawRows
"""Rows to predict: picklable, with `num_rows`, `notes`, `columns()`, `tasks()` and
`read(task)`."""


def rows_per_task(num_rows: int, spec: InferenceSpec) -> int:
    """Return the rows per task: whole batches, but few enough for several tasks per worker."""
    limit = min(num_rows // (spec.num_workers * _TASKS_PER_WORKER), _MAX_TASK_ROWS)
    return max(limit // spec.batch_size, 1) * spec.batch_size


def model_rows(
    keys: pa.Array | pa.ChunkedArray,
    labels: pa.Array | pa.ChunkedArray,
    errors: Sequence[str | None],
    inputs: dict[str, np.ndarray],
    failure: str | None = None,
) -> pa.Table:
    """Return rows in the format that a `Predictor` accepts.

    Args:
        keys: Keys of the rows.
        labels: Labels of the rows, null if unknown.
        errors: For each row, the reason why it cannot be used, or None.
        inputs: Inputs of the model by name, as in `ray_jobs.data.batch`.
        failure: Error that ends the job.
    """
    columns = {
        KEY: keys.cast(pa.string()),
        LABEL: labels.cast(pa.int8()),
        ERROR: pa.array(errors, pa.string()),
        FAILURE: pa.array([failure] * len(errors), pa.string()),
    }
    # Unlike Ray's tensor columns, fixed-size binary columns are never copied.
    return pa.table(columns | {name: bytes_column(array) for name, array in inputs.items()})


def _decode_rows(
    run: TrainedRun, rows: pa.Table, errors: list[str | None], location: str
) -> pa.Table:
    """Return stored rows in the format that a `Predictor` accepts.

    Args:
        run: Run whose model predicts the rows.
        rows: Rows with those columns of a shard that the model needs.
        errors: For each row, the reason why it cannot be used, or None.
        location: File of the rows, for error messages.
    """

    def add_error(row: int, error: ValueError) -> None:
        errors[row] = errors[row] or f"the stored image in {location} is damaged: {error}"

    batch = run.decoder.decode(rows, on_error=add_error)
    inputs = {name: batch[name] for name in run.input_shapes}
    return model_rows(rows.column(KEY), rows.column(LABEL), errors, inputs)


def _combine_groups(row_groups: Sequence[int], min_rows: int) -> Iterator[list[int]]:
    """Yield the indices of consecutive row groups with at least `min_rows` rows together."""
    groups: list[int] = []
    rows = 0
    for group, num_rows in enumerate(row_groups):
        groups.append(group)
        rows += num_rows
        if rows >= min_rows:
            yield groups
            groups, rows = [], 0
    if groups:
        yield groups


def raw_row_rules(run: TrainedRun) -> PrepareSpec:
    """Return the run's settings for reading rows that have no label, group, fold or weight."""
    rules, columns = run.manifest.prepare, run.decoder.manifest.numeric_columns
    number_rules = {name: rule for name, rule in rules.number_rules.items() if name in columns}
    changes = {"numeric_columns": columns, "number_rules": number_rules}
    changes |= {"fold_column": None, "group_column": None, "weight_column": None}
    return rules.model_copy(update=changes)


def _raw_rules(run: TrainedRun, spec: PredictSpec) -> PrepareSpec:
    """Return the run's settings for reading rows, with this job's file locations."""
    rules = raw_row_rules(run)
    changes: dict[str, Any] = {}
    if rules.images and not rules.table:
        if spec.images:
            raise JobError(
                f"--images={spec.images} does not match the run {run.folder}, whose data files "
                f"({rules.images}) contain both records and images; leave --images out and set "
                "--data to files of the same kind"
            )
        return rules.model_copy(update={**changes, "images": spec.data})
    changes["table"] = spec.data
    if not run.takes_images:
        # The table needs no column with image paths.
        changes |= {"image_column": None, "image_columns": (), "image_pattern": "{key}"}
        changes |= {"image_separator": None}
    elif not spec.images:
        raise JobError(
            f"the model of {run.folder} takes images; set --images to a pattern such as "
            f"'photos/{rules.image_pattern}', or to the folder of the files that "
            f"{rules.image_column or rules.image_pattern!r} names"
        )
    elif _COLUMN.search(spec.images):
        fixed = spec.images.partition("{")[0]
        base, slash, _ = fixed.rpartition("/")
        changes |= {"image_column": None, "image_pattern": spec.images[len(base + slash) :]}
        changes |= {"image_separator": None}
        changes |= {"source": "folder", "images": (base or slash) or "."}
    else:
        changes["images"] = spec.images
    return rules.model_copy(update=changes)


def _unfamiliar(rows: Rows, manifest: Manifest) -> Iterator[str]:
    """Yield what is unlike the training split: unknown words and numbers outside of its range."""
    for vocabulary in manifest.vocabularies:
        words = rows.categories[vocabulary.column].drop_null()
        unknown = words.filter(pc.invert(pc.is_in(words, pa.array(vocabulary.words, words.type))))
        if len(unknown):
            counted = count_text(len(unknown), "row")
            yield f"{vocabulary.column}: {counted} with an unknown word, such as {unknown[0]}"
    quantiles = manifest.statistics.quantiles if manifest.statistics else ()
    for name, known, values in zip(
        manifest.numeric_columns, quantiles, rows.numeric_RF.T, strict=False
    ):
        low, *_, high = known or (-np.inf, np.inf)
        outside = values[(values < np.float32(low)) | (values > np.float32(high))]
        if len(outside):
            yield (
                f"{name}: {count_text(len(outside), 'row')} outside the training range of "
                f"{number_text(low)} to {number_text(high)}, such as {number_text(outside[0])}"
            )


def _with_flag_names(text: str, run: TrainedRun, spec: PredictSpec) -> str:
    """Rewrite an error about `prepare` settings to name this job's flags or its run."""
    if "{" in (spec.images or ""):
        text = text.replace("prepare.image_pattern", "--images")
    text = text.replace("prepare.images", "--images")
    if "prepare." in text:
        text += f"; these settings come from the run, in {run.folder}/{MANIFEST}"
    return text
