r"""Predict the probability of each row with a trained run.

Reads: a run folder from `train`, and prepared data or a table of raw rows with its images.
Writes: part-*.parquet in the output folder with the columns key, probability, predicted_label (0 or
1 at the run's threshold) and error; one row per input row, in order. A row that cannot be used has
no probability; `error` gives the reason. With --distance true, also distance.

Run:   python -m ray_jobs.predict --run runs/first --data prepared --split test --output predictions
       python -m ray_jobs.predict --run runs/first --data new.csv --images 'photos/{key}.jpg' \
           --output predictions
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.config.errors import EmptyTableError, JobError
from ray_jobs.config.inference_spec import PredictSpec
from ray_jobs.config.prepare_spec import SPLITS
from ray_jobs.config.text import count_text, number_text
from ray_jobs.data.batch import IMAGE_MASK, KEY
from ray_jobs.data.manifest import MANIFEST, read_manifest
from ray_jobs.predict.input_drift import drift_findings, input_drift
from ray_jobs.predict.predictor import (
    DISTANCE,
    HAS_IMAGE,
    LOGITS,
    PROBABILITY,
    connected,
    logits_array,
    predict_rows,
)
from ray_jobs.predict.row_sources import ERROR, MAX_COMPARED, PreparedRows, RawRows, RowSource
from ray_jobs.predict.trained_run import TrainedRun, open_run
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import EMBEDDINGS

PREDICTED_LABEL = "predicted_label"
PREDICTIONS = pa.schema(
    {
        KEY: pa.string(),
        PROBABILITY: pa.float64(),
        PREDICTED_LABEL: pa.int8(),
        ERROR: pa.string(),
    }
)

_DISTANCE = pa.field(DISTANCE, pa.float32())
_PART = re.compile(r"part-\d+\.parquet")
_ROWS_PER_PART = 1 << 18
_MAX_PRINTED = 5


def predict(spec: PredictSpec) -> dict[str, int]:
    """Write the predictions and return their counts: num_rows, num_positive, num_errors.

    If rows may lack an image, also returns num_without_image.

    Raises:
        JobError: If the run is not finished, or the data as a whole does not match the run.
    """
    run = open_run(spec.run)
    output = Folder(spec.output)
    earlier = [name for name in output.names() if _PART.fullmatch(name)]
    if Folder(spec.data).uri in [f"{output}/{name}" for name in earlier]:
        raise JobError(
            f"--data={spec.data} would be replaced by the predictions; choose another --output"
        )
    if spec.distance and not run.folder.exists(EMBEDDINGS):
        raise JobError(
            f"--distance=true needs {EMBEDDINGS}, which {run.folder} lacks: an earlier version "
            "trained the run, or it is the mean of several models; leave --distance out"
        )
    source = _open_rows(run, spec)
    tally = _Tally()
    with tempfile.TemporaryDirectory() as local:
        with connected(spec):
            rows = predict_rows(run, source, spec, spec.distance)
            schema = PREDICTIONS.append(_DISTANCE) if spec.distance else PREDICTIONS
            _write_parts(tally.count(rows, run.threshold, schema), schema, local)
        # Last, so that a failed prediction leaves the folder unchanged.
        for name in earlier:
            output.delete(name)
        for part in sorted(Path(local).iterdir()):
            output.upload(part, part.name)
    drift = input_drift(run, *source.columns(), tally.logits())
    notes = (finding.text for finding in drift_findings(drift))
    tally.print(run, output, (*source.notes, *notes))
    counts = {
        "num_rows": tally.num_rows,
        "num_positive": tally.num_positive,
        "num_errors": tally.reasons.total(),
    }
    if IMAGE_MASK in run.input_shapes and run.manifest.image.optional:
        counts["num_without_image"] = tally.num_without_image
    return counts


def _open_rows(run: TrainedRun, spec: PredictSpec) -> RowSource:
    data = Folder(spec.data)
    if data.exists(MANIFEST):
        if spec.images:
            raise JobError(
                f"--images={spec.images} is for a table of raw rows, but {data} is prepared data, "
                "which contains images; leave --images out"
            )
        splits = SPLITS if spec.split is None else (spec.split,)
        return PreparedRows(run, data, read_manifest(data), splits, spec)
    if spec.split:
        raise JobError(
            f"--split={spec.split} is for prepared data, but {data} has no {MANIFEST}; leave "
            "--split out, or set --data to the folder that `python -m ray_jobs.prepare` wrote"
        )
    if run.manifest.image.features and run.takes_images:
        raise JobError(
            f"{run.folder} is a tuning trial whose model was trained on backbone features; choose "
            "a run that was trained on images"
        )
    try:
        return RawRows(run, spec)
    except EmptyTableError:
        return PreparedRows(run, run.folder, run.manifest, (), spec)


def _predictions(rows: pa.Table, threshold: float, schema: pa.Schema) -> pa.Table:
    """Convert a table with the schema `predictor.RESULT` to `PREDICTIONS`, and the distance."""
    probability = rows[PROBABILITY].to_numpy()
    label = pa.array(probability >= threshold, mask=np.isnan(probability)).cast(pa.int8())
    table = rows.append_column(PREDICTED_LABEL, label)
    return table.select(schema.names).cast(schema)


def _write_parts(tables: Iterable[pa.Table], schema: pa.Schema, local: str) -> None:
    pending: list[pa.Table] = []
    num_parts = 0

    def flush() -> None:
        nonlocal num_parts
        table = pa.concat_tables([schema.empty_table(), *pending])
        pq.write_table(table, Path(local) / f"part-{num_parts:05d}.parquet")
        num_parts += 1
        pending.clear()

    for table in tables:
        pending.append(table)
        if sum(table.num_rows for table in pending) >= _ROWS_PER_PART:
            flush()
    # Even without rows, write one file with the schema.
    if pending or not num_parts:
        flush()


class _Tally:
    """Counts rows and errors, and keeps the first predictions to print."""

    def __init__(self) -> None:
        self.num_rows = self.num_positive = self.num_without_image = self.num_far = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.first: list[str] = []
        self._logits: list[pa.ChunkedArray] = []
        self._num_logits = 0

    def logits(self) -> np.ndarray:
        """Return the logits of the heads of some rows."""
        parts = [logits_array(column) for column in self._logits]
        return np.concatenate(parts) if parts else np.zeros((0, 0))

    def count(
        self, tables: Iterable[pa.Table], threshold: float, schema: pa.Schema
    ) -> Iterator[pa.Table]:
        """Convert tables to predictions, and count their rows."""
        for result in tables:
            self.num_without_image += result[HAS_IMAGE].drop_null().to_pylist().count(False)
            if self._num_logits < MAX_COMPARED:
                usable = result.filter(result[ERROR].is_null())
                self._logits.append(usable[LOGITS])
                self._num_logits += usable.num_rows
            table = _predictions(result, threshold, schema)
            self.num_far += int(np.sum(result[DISTANCE].drop_null().to_numpy() > 1))
            self.num_rows += table.num_rows
            for row in table.slice(0, _MAX_PRINTED - len(self.first)).to_pylist():
                self.first.append(f"{row[KEY]}  {number_text(row[PROBABILITY], 4)}")
            self.num_positive += int(np.nansum(table[PREDICTED_LABEL].to_numpy()))
            for error in table[ERROR].drop_null().to_pylist():
                reason, _, detail = error.partition(": ")
                self.reasons[reason] += 1
                self.examples.setdefault(reason, detail)
            yield table

    def print(self, run: TrainedRun, output: Folder, notes: Iterable[str]) -> None:
        from rich.console import Console
        from rich.markup import escape

        console = Console(highlight=False, soft_wrap=True)
        good = self.num_rows - self.reasons.total()
        console.print(
            f"[bold]{count_text(self.num_rows, 'row')}[/bold]: {good:,} predicted, "
            f"{self.num_positive:,} of them as {escape(repr(run.manifest.positive_label))} "
            f"(probability ≥ {run.threshold:.4g})"
        )
        if self.num_without_image:
            console.print(
                f"  [yellow]{count_text(self.num_without_image, 'row')} without an image[/yellow], "
                "predicted from numbers and words alone"
            )
        if self.num_far:
            console.print(
                f"  [yellow]{count_text(self.num_far, 'row')} farther from the training rows than "
                "99 % of the validation rows[/yellow]"
            )
        for line in self.first:
            console.print(f"  {escape(line)}")
        if self.num_rows > len(self.first):
            console.print("  …")
        for reason, count in self.reasons.most_common():
            example = f", such as {self.examples[reason]}" if self.examples[reason] else ""
            console.print(f"  [yellow]{count:,} × {escape(reason)}[/yellow]{escape(example)}")
        for note in notes:
            console.print(f"  [yellow]{escape(note)}[/yellow]")
        console.print(f"  [green]done[/green] → {escape(str(output))}")
