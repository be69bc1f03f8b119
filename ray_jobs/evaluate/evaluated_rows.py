"""Collects the label, the predictions and the columns of each evaluated row.

Shapes: N rows, M heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.config.prepare_spec import Split
from ray_jobs.data.batch import GROUP, KEY, LABEL, ORIGINAL_PIXELS, WEIGHT
from ray_jobs.data.manifest import Manifest, Shard
from ray_jobs.data.reader import read_columns
from ray_jobs.predict.predictor import BRIGHTNESS, DISTANCE, LOGITS, PROBABILITY, logits_array
from ray_jobs.predict.trained_run import TrainedRun
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import VALIDATION, read_sample
from ray_jobs.train.metrics import row_log_loss

BRIGHTNESS_COLUMN = "(image brightness)"
PIXELS_COLUMN = "(pixels of the original image)"
DISTANCE_COLUMN = "(distance from the training rows)"


@dataclass(frozen=True)
class EvaluatedRows:
    """The rows of a split in stored order, with the predictions of a run."""

    label_N: np.ndarray
    """0 or 1."""
    probability_N: np.ndarray
    keys: Sequence[str] = ()
    weight_N: np.ndarray | None = None
    """Weights; None if the data has none."""
    group_N: np.ndarray | None = None
    """Index of each row's group; None if the data has no groups."""
    logits_NM: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """Logits of the heads, before blending and calibration."""
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Columns of numbers (N,), NaN for missing ones."""
    words: Mapping[str, pa.Array] = field(default_factory=dict)
    """Columns of words (N,), null for missing ones."""

    @cached_property
    def weights_N(self) -> np.ndarray:
        """Weight of each row; 1 if the data has none."""
        return np.ones(len(self.label_N)) if self.weight_N is None else self.weight_N

    @cached_property
    def units_N(self) -> np.ndarray:
        """Index of each row's independent unit: its group, or the row itself without groups."""
        return np.arange(len(self.label_N)) if self.group_N is None else self.group_N

    @cached_property
    def log_loss_N(self) -> np.ndarray:
        """Log loss of each row."""
        return row_log_loss(self.label_N, self.probability_N)

    @property
    def num_unfamiliar(self) -> int | None:
        """Number of rows farther from the training rows than validation rows; None if unknown."""
        distance_N = self.numbers.get(DISTANCE_COLUMN)
        return None if distance_N is None else int((distance_N > 1).sum())

    def take(self, rows: np.ndarray) -> "EvaluatedRows":
        """Return the rows with these indices."""
        return replace(
            self,
            label_N=self.label_N[rows],
            probability_N=self.probability_N[rows],
            keys=[self.keys[row] for row in rows] if self.keys else (),
            weight_N=None if self.weight_N is None else self.weight_N[rows],
            group_N=None if self.group_N is None else self.group_N[rows],
            logits_NM=self.logits_NM[rows] if self.logits_NM.size else self.logits_NM,
            numbers={name: values[rows] for name, values in self.numbers.items()},
            words={name: values.take(pa.array(rows)) for name, values in self.words.items()},
        )

    @classmethod
    def of(
        cls, predicted: pa.Table, folder: Folder, manifest: Manifest, split: Split
    ) -> "EvaluatedRows":
        """Join the predicted rows of a split with its stored columns.

        Args:
            predicted: Rows of `predictor.RESULT`, without errors.
            folder: Prepared data.
            manifest: Its manifest.
            split: The split.
        """
        categories = [vocabulary.column for vocabulary in manifest.vocabularies]
        columns = [*manifest.numeric_columns, *categories, *manifest.text_columns]
        columns += [WEIGHT] if manifest.is_weighted else []
        columns += [GROUP] if manifest.prepare.group_column else []
        has_images = predicted[BRIGHTNESS].null_count < predicted.num_rows
        columns += [ORIGINAL_PIXELS] if has_images else []
        shards = manifest.splits[split].shards
        stored = read_columns(folder, shards, [KEY, *columns])
        numbers = {name: stored[name].to_numpy() for name in manifest.numeric_columns}
        for name in manifest.text_columns:
            lengths: Any = pa.compute.utf8_length(stored[name])  # type: ignore[attr-defined]
            numbers[f"(characters of {name})"] = lengths.to_numpy().astype(np.float64)
        # Data that was prepared by an earlier version has no sizes of images and no groups.
        if ORIGINAL_PIXELS in stored.column_names:
            numbers[PIXELS_COLUMN] = stored[ORIGINAL_PIXELS].cast(pa.float64()).to_numpy()
        for name, column in ((BRIGHTNESS_COLUMN, BRIGHTNESS), (DISTANCE_COLUMN, DISTANCE)):
            if predicted[column].null_count < predicted.num_rows:
                numbers[name] = predicted[column].to_numpy()
        group_N = None
        if manifest.prepare.group_column and GROUP in stored.column_names:
            group_N = np.unique(stored[GROUP].to_numpy(), return_inverse=True)[1]
        return cls(
            label_N=predicted[LABEL].to_numpy(),
            probability_N=predicted[PROBABILITY].to_numpy(),
            keys=predicted[KEY].to_pylist(),
            weight_N=stored[WEIGHT].to_numpy() if manifest.is_weighted else None,
            group_N=group_N,
            logits_NM=logits_array(predicted[LOGITS]),
            numbers=numbers,
            words={name: stored[name].combine_chunks() for name in categories},
        )

    def table(self, heads: Sequence[str]) -> pa.Table:
        """Return the content of rows.parquet."""
        logits = zip(heads, self.logits_NM.T, strict=True)
        columns = {
            KEY: self.keys,
            LABEL: self.label_N,
            PROBABILITY: self.probability_N,
            **{f"logit_{head}": logit_N for head, logit_N in logits},
            **{f"column_{name}": values for name, values in self.numbers.items()},
            **{f"column_{name}": values for name, values in self.words.items()},
        }
        return pa.table(columns | ({} if self.weight_N is None else {WEIGHT: self.weight_N}))


def is_held_out(run: TrainedRun, manifest: Manifest, split: Split) -> bool:
    """Whether the run neither trained on the shards of a split nor validated on them."""
    used = [shard for name in ("train", "validation") for shard in run.manifest.splits[name].shards]
    hashes = {shard.sha256 for shard in used}
    return not any(shard.sha256 in hashes for shard in manifest.splits[split].shards)


def num_shared_groups(
    folder: Folder, manifest: Manifest, split: Split, train: Sequence[Shard]
) -> int:
    """Return how many groups of a split have rows among the training rows."""
    if not manifest.prepare.group_column:
        return 0
    tables = (read_columns(folder, s, [GROUP]) for s in (train, manifest.splits[split].shards))
    groups = [set(t[GROUP].to_pylist()) if GROUP in t.column_names else set() for t in tables]
    return len(groups[0] & groups[1])


def validation_rows(run: TrainedRun) -> EvaluatedRows | None:
    """Return the validation rows of a run; None if an earlier version trained it."""
    rows = read_sample(run.folder, VALIDATION)
    if rows is None:
        return None
    names = rows.column_names
    return EvaluatedRows(
        label_N=rows[LABEL].to_numpy(),
        probability_N=rows[PROBABILITY].to_numpy(),
        weight_N=rows[WEIGHT].to_numpy() if WEIGHT in names else None,
        logits_NM=logits_array(rows[LOGITS]) if LOGITS in names else np.zeros((rows.num_rows, 0)),
    )
