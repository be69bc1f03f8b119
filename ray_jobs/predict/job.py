r"""Give each row its probability, by a trained run.

Reads: a run folder from `train`, and prepared data or a table of raw rows with its images.
Writes: part-*.parquet in the output folder with the columns key, probability, predicted_label (0 or
1 by the run's threshold) and error; as many rows as there are, in their order. A row that cannot be
used has no probability, and its reason in `error`.

Run:   python -m ray_jobs.predict --run runs/first --data prepared --split test --output predictions
       python -m ray_jobs.predict --run runs/first --data new.csv --images 'photos/{key}.jpg' \
           --output predictions
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.cluster import connection
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS, PredictSpec, PrepareSpec
from ray_jobs.data.batch import KEY, LABEL
from ray_jobs.data.images import BadImage
from ray_jobs.data.manifest import NAME as MANIFEST
from ray_jobs.data.manifest import read_manifest
from ray_jobs.predict import predictor
from ray_jobs.predict.predictor import ERROR, PROBABILITY
from ray_jobs.predict.trained_run import TrainedRun, open_run
from ray_jobs.prepare.row_validation import read_rows
from ray_jobs.prepare.shard_writer import RowConverter, ShardRows, StoredImages
from ray_jobs.prepare.sources import open_source
from ray_jobs.prepare.sources.refs import ImageRefs, Source
from ray_jobs.prepare.table import read_table, require_columns
from ray_jobs.storage.folder import Folder

PREDICTED_LABEL = "predicted_label"
PREDICTIONS = pa.schema(
    {
        KEY: pa.string(),
        PROBABILITY: pa.float64(),
        PREDICTED_LABEL: pa.int8(),
        ERROR: pa.string(),
    }
)

# Columns of a task's rows beside the user's own, which are named like none of them.
_REASON = "\0error"
_PATH, _START, _SIZE = "\0path ", "\0start ", "\0size "
"""Parts of `ImageRefs`, numbered by image."""
# A column in braces, and not a range of tar files such as {000..012}.
_COLUMN = re.compile(r"\{[^{}.,]+\}")
_PART = re.compile(r"part-\d+\.parquet")
_ROWS_PER_PART = 1 << 18
_READ_ROWS = 16


def predict(spec: PredictSpec) -> dict[str, int]:
    """Write the predictions and return their counts: num_rows, num_positive, num_errors.

    Raises:
        JobError: if the run is not finished, or the data as a whole does not fit it.
    """
    run = open_run(spec.run)
    output = Folder(spec.output)
    earlier = [name for name in output.names() if _PART.fullmatch(name)]
    if Folder(spec.data).uri in [f"{output}/{name}" for name in earlier]:
        raise JobError(
            f"--data {spec.data} would be replaced by the predictions; give another --output"
        )
    source = _open_source(run, spec)
    tally = _Tally()
    with tempfile.TemporaryDirectory() as local:
        with connection.connected(
            spec.address,
            num_cpus=spec.num_workers * spec.cpus_per_worker,
            num_gpus=spec.num_workers if spec.use_gpu else 0,
            worker_logs=spec.worker_logs,
        ):
            tables = predictor.predict_rows(run, source, spec)
            _write_parts(tally.counted(labelled(rows, run.threshold) for rows in tables), local)
        # Only now, so that the folder never holds some of the rows, or those of two jobs.
        for name in earlier:
            output.delete(name)
        for part in sorted(Path(local).iterdir()):
            output.upload(part, part.name)
    tally.print(run, output)
    return {
        "num_rows": tally.num_rows,
        "num_positive": tally.num_positive,
        "num_errors": tally.reasons.total(),
    }


def labelled(rows: pa.Table, threshold: float) -> pa.Table:
    """Return `PREDICTIONS` of some `inference.RESULT`."""
    probability = rows[PROBABILITY].to_numpy()
    called = pa.array(probability >= threshold, mask=np.isnan(probability)).cast(pa.int8())
    return pa.table([rows[KEY], rows[PROBABILITY], called, rows[ERROR]], schema=PREDICTIONS)


def _write_parts(tables: Iterable[pa.Table], local: str) -> None:
    pending: list[pa.Table] = []
    num_parts = 0

    def flush() -> None:
        nonlocal num_parts
        table = pa.concat_tables([PREDICTIONS.empty_table(), *pending])
        pq.write_table(table, Path(local) / f"part-{num_parts:05d}.parquet")
        num_parts += 1
        pending.clear()

    for table in tables:
        pending.append(table)
        if sum(table.num_rows for table in pending) >= _ROWS_PER_PART:
            flush()
    # No rows are a file too, which says which columns there would be.
    if pending or not num_parts:
        flush()


class _Tally:
    """Counts rows as they pass."""

    def __init__(self) -> None:
        self.num_rows = self.num_positive = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def counted(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            self.num_rows += table.num_rows
            self.num_positive += int(np.nansum(table[PREDICTED_LABEL].to_numpy()))
            for error in table[ERROR].drop_null().to_pylist():
                reason, _, detail = error.partition(": ")
                self.reasons[reason] += 1
                self.examples.setdefault(reason, detail)
            yield table

    def print(self, run: TrainedRun, output: Folder) -> None:
        from rich.console import Console
        from rich.markup import escape

        console = Console(highlight=False, soft_wrap=True)
        good = self.num_rows - self.reasons.total()
        console.print(
            f"[bold]{self.num_rows:,} rows[/bold]: {good:,} predicted, {self.num_positive:,} of "
            f"them {escape(repr(run.manifest.positive_label))} (probability ≥ {run.threshold:.4g})"
        )
        for reason, count in self.reasons.most_common():
            example = escape(self.examples[reason])
            console.print(f"  [yellow]{count:,} × {escape(reason)}[/yellow], such as {example}")
        console.print(f"  [green]done[/green] → {escape(str(output))}")


def _open_source(run: TrainedRun, spec: PredictSpec) -> predictor.Source:
    data = Folder(spec.data)
    if data.exists(MANIFEST):
        if spec.images:
            raise JobError(
                f"--images is for a table of raw rows; {data} is prepared data, which holds its "
                "images. Leave --images out"
            )
        splits = SPLITS if spec.split is None else (spec.split,)
        return predictor.PreparedSource(run, data, read_manifest(data), splits, spec)
    if spec.split:
        raise JobError(
            f"--split is for prepared data, and there is no {MANIFEST} in {data}; leave --split "
            "out, or give the folder that `python -m ray_jobs.prepare` wrote"
        )
    if run.manifest.image.features and run.takes_images:
        raise JobError(
            f"the model of {run.folder} is a trial's, which looks at features in place of images; "
            "give a run that was trained on images"
        )
    return RawSource(run, spec)


class RawSource:
    """Rows that were never prepared, read by the rules in the run's own manifest.

    Cells are checked here, as a whole column tells what they are; images are read by the tasks.

    Args:
        run: whose model sees the rows, and whose manifest holds the rules.
        spec: of the job.

    Raises:
        JobError: if the table or its images are not there, or a column is missing.
    """

    def __init__(self, run: TrainedRun, spec: PredictSpec) -> None:
        self.run = run
        manifest = run.decoder.manifest
        categorical = tuple(vocabulary.column for vocabulary in manifest.vocabularies)
        rules = _rules(run, spec, manifest.numeric_columns)
        try:
            if run.takes_images or not rules.table:
                source = open_source(rules, categorical, labelled=False)
            else:
                source = Source(read_table(rules.table), images={}, readers={})
                require_columns(source.table, rules, categorical, labelled=False)
        except JobError as error:
            raise JobError(_by_flag(str(error), run, spec)) from None
        rows = read_rows(source, rules, manifest.numeric_columns, None, categorical)
        self.converter = RowConverter(
            tuple(source.readers[name] for name in rules.image_columns or ("",))
            if run.takes_images
            else (),
            manifest.numeric_columns,
            categorical,
            rules,
        )
        self.num_rows = len(rows)
        self.task_rows = predictor.rows_per_task(self.num_rows, spec)
        errors: list[str | None] = [None] * len(rows)
        for row, (reason, detail) in rows.bad.items():
            errors[row] = f"{reason}: {detail}"
        columns: dict[str, Any] = {KEY: rows.keys, _REASON: pa.array(errors, pa.string())}
        numbers = zip(manifest.numeric_columns, rows.numeric_RF.T, strict=True)
        columns |= {name: pa.array(column, from_pandas=True) for name, column in numbers}
        columns |= rows.categories
        for position, refs in enumerate(rows.images if run.takes_images else ()):
            columns[f"{_PATH}{position}"] = refs.path
            for part, values in ((_START, refs.start), (_SIZE, refs.size)):
                if values is not None:
                    columns[f"{part}{position}"] = pa.array(values)
        self.rows: pa.Table | None = pa.table(columns)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the rows behind: every task is handed its own."""
        return {**self.__dict__, "rows": None}

    def tasks(self) -> list[pa.Table]:
        """Return the rows, some for each task."""
        rows = self.rows or pa.table({})
        starts = range(0, self.num_rows, self.task_rows)
        return [rows.slice(start, self.task_rows) for start in starts]

    def read(self, task: pa.Table) -> Iterator[pa.Table]:
        """Yield the rows of one task, by way of the very bytes that `prepare` would store."""
        if not self.converter.readers:
            rows = task.append_column(LABEL, pa.nulls(task.num_rows, pa.int8()))
            yield predictor.decoded_rows(self.run, rows, task[_REASON].to_pylist(), "memory")
            return
        rows, errors = self._shard_rows(task), task[_REASON].to_pylist()
        none_there: StoredImages = (None,) * len(rows.images)
        stored: list[StoredImages] = []
        for row, images in enumerate(self.converter.images_of(rows)):
            if isinstance(images, BadImage):
                errors[row] = errors[row] or str(images)
                images = none_there
            stored.append(images)
            if len(stored) == _READ_ROWS or row + 1 == task.num_rows:
                here = np.arange(row + 1 - len(stored), row + 1)
                table = self.converter.table(rows.take(here), stored)
                some = errors[here[0] : here[-1] + 1]
                yield predictor.decoded_rows(self.run, table, some, "memory")
                stored.clear()

    def _shard_rows(self, task: pa.Table) -> ShardRows:
        def column(name: str) -> Any:
            return task[name].combine_chunks()

        def numbers(name: str) -> np.ndarray | None:
            return column(name).to_numpy() if name in task.column_names else None

        images = tuple(
            ImageRefs(column(f"{_PATH}{i}"), numbers(f"{_START}{i}"), numbers(f"{_SIZE}{i}"))
            for i in range(len(self.converter.readers))
        )
        names = self.converter.numeric_columns
        numeric = np.empty((task.num_rows, len(names)), np.float32)
        for i, name in enumerate(names):
            numeric[:, i] = task[name].to_numpy()
        return ShardRows(
            split="test",
            index=0,
            keys=column(KEY),
            images=images,
            numeric_RF=numeric,
            categories={name: column(name) for name in self.converter.categorical},
            labels=np.zeros(task.num_rows, np.int8),
        )


def _rules(run: TrainedRun, spec: PredictSpec, numeric_columns: tuple[str, ...]) -> PrepareSpec:
    """Return how to read raw rows: as the run's were, from where this job says."""
    rules = run.manifest.prepare
    number_rules = {n: rule for n, rule in rules.number_rules.items() if n in numeric_columns}
    changes: dict[str, Any] = {"numeric_columns": numeric_columns, "number_rules": number_rules}
    if rules.images and not rules.table:
        if spec.images:
            raise JobError(
                f"the records of {run.folder} stood beside its images, in {rules.images}: give "
                "files of the same kind as --data, and leave --images out"
            )
        return rules.model_copy(update={**changes, "images": spec.data})
    changes["table"] = spec.data
    if not run.takes_images:
        # No column has to say where an image is.
        changes |= {"image_column": None, "image_columns": (), "image_pattern": "{key}"}
    elif not spec.images:
        raise JobError(
            f"the model of {run.folder} looks at images: give --images, such as "
            f"'photos/{rules.image_pattern}', or the folder in which the run's own "
            f"{rules.image_column or rules.image_pattern!r} finds them"
        )
    elif _COLUMN.search(spec.images):
        fixed = spec.images.partition("{")[0]
        base, slash, _ = fixed.rpartition("/")
        changes |= {"image_column": None, "image_pattern": spec.images[len(base + slash) :]}
        changes |= {"source": "folder", "images": (base or slash) or "."}
    else:
        changes["images"] = spec.images
    return rules.model_copy(update=changes)


def _by_flag(text: str, run: TrainedRun, spec: PredictSpec) -> str:
    """Return an error about settings of `prepare` as one about this job's flags or its run."""
    if "{" in (spec.images or ""):
        text = text.replace("prepare.image_pattern", "--images")
    text = text.replace("prepare.images", "--images")
    if "prepare." in text:
        text += f"; these settings are the run's, in {run.folder}/{MANIFEST}"
    return text
