"""Metrics of a replica, which Ray exports to Prometheus with those of Ray Serve itself.

    multimodal_batch_rows       rows per call of the model (histogram)
    multimodal_rows             rows by `outcome`: ok, or why a row cannot be used
    multimodal_input_psi        population stability index of each `column` and of each head's
                                logit, from the last rows, against those of the training

Ray Serve's own metrics have latency, errors and the length of the queue.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ray_jobs.data.batch import CATEGORY, NUMERIC
from ray_jobs.data.decoder import column_values
from ray_jobs.predict.input_drift import input_drift
from ray_jobs.predict.predictor import LOGITS, logits_array
from ray_jobs.predict.row_sources import ERROR
from ray_jobs.predict.trained_run import TrainedRun

MIN_ROWS = 100
"""Rows before the first comparison with the training rows."""
_MAX_ROWS = 2000
_BOUNDARIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ReplicaMetrics:
    """Counts the rows of one replica and compares them with the training rows of its run."""

    def __init__(self, run: TrainedRun) -> None:
        from ray.serve import metrics

        self.run = run
        self.batch_rows = metrics.Histogram(
            "multimodal_batch_rows", "Rows per call of the model.", list(_BOUNDARIES)
        )
        self.rows = metrics.Counter(
            "multimodal_rows", "Rows by outcome: ok, or why a row cannot be used.", ("outcome",)
        )
        self.psi = metrics.Gauge(
            "multimodal_input_psi",
            "Population stability index of a column against the training rows.",
            ("column",),
        )
        self._recent: deque[tuple[pa.Table, pa.Table]] = deque()
        self._num_recent = self._num_seen = 0
        self._next = MIN_ROWS

    def count(self, rows: pa.Table, predicted: pa.Table) -> bool:
        """Count a batch; return whether it is time for `compare`.

        Args:
            rows: Inputs of the model, as a `Predictor` accepts them.
            predicted: The same rows as it returns them.
        """
        self.batch_rows.observe(rows.num_rows)
        errors = predicted[ERROR].to_pylist()
        for error in errors:
            self.rows.inc(tags={"outcome": error.partition(":")[0] if error else "ok"})
        good = pa.array([error is None for error in errors])
        names = [name for name in (NUMERIC, CATEGORY) if name in rows.column_names]
        part = (rows.select(names).filter(good), predicted.select([LOGITS]).filter(good))
        if not part[1].num_rows:
            return False
        self._recent.append(part)
        self._num_recent += part[1].num_rows
        self._num_seen += part[1].num_rows
        while self._num_recent - self._recent[0][1].num_rows >= _MAX_ROWS:
            self._num_recent -= self._recent.popleft()[1].num_rows
        if self._num_seen < self._next:
            return False
        self._next = self._num_seen + min(self._num_seen, _MAX_ROWS // 2)
        return True

    def compare(self) -> None:
        """Compare the last rows with the training rows."""
        parts = list(self._recent)
        rows = pa.concat_tables(inputs for inputs, _ in parts)
        logits = pa.concat_tables(predicted for _, predicted in parts)
        manifest, shapes = self.run.decoder.manifest, self.run.input_shapes
        numbers: dict[str, np.ndarray] = {}
        if NUMERIC in shapes:
            values = column_values(rows[NUMERIC], shapes[NUMERIC], np.float32)
            numbers = dict(zip(manifest.numeric_columns, values.T, strict=True))
        words: dict[str, pa.Array] = {}
        if CATEGORY in shapes:
            codes = column_values(rows[CATEGORY], shapes[CATEGORY], np.int32)
            for vocabulary, codes_N in zip(manifest.vocabularies, codes.T, strict=True):
                words[vocabulary.column] = pa.array(_words(codes_N, vocabulary.words), pa.string())
        for entry in input_drift(self.run, numbers, words, logits_array(logits[LOGITS])):
            if entry["psi"] is not None:
                self.psi.set(entry["psi"], tags={"column": entry["name"]})


def _words(codes_N: np.ndarray, words: Sequence[str]) -> list[str | None]:
    """Return the words of codes, None for missing ones, and an invented word for unknown ones."""
    names = [None, "\0", *words]
    return [names[code] for code in codes_N]
